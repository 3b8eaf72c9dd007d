"""FlashVID as a function: against outputs of the published code, and against its steps done frame by frame."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from reroute_kernels.reducers import FlashVid, VisionFeatures, flashvid_diverse, flashvid_segments, flashvid_tokens

FOLDER = Path(__file__).parent / "golden" / "flashvid"
GOLDEN = load_file(FOLDER / "compression.safetensors")
CASES = {case["name"]: case for case in json.loads((FOLDER / "cases.json").read_text())}
OPTIONS = ("retention", "expansion", "alpha", "tau", "segment_threshold", "min_segments", "selection")


def clip(frames, tokens, seed=0, width=12, noise=0.4):
    """A video whose frames change slowly, with a cut in the middle."""
    generator = torch.Generator().manual_seed(seed)
    scenes = torch.randn(2, tokens, width, generator=generator) + torch.randn(2, 1, width, generator=generator)
    shown = torch.stack([scenes[2 * frame // frames] for frame in range(frames)])
    features = shown + noise * torch.randn(frames, tokens, width, generator=generator)
    return features, torch.rand(frames, tokens, generator=generator)


@pytest.mark.parametrize("name", CASES)
def test_published_segments_and_diverse_tokens(name):
    case, features = CASES[name], GOLDEN[f"{name}/features"]
    segments = flashvid_segments(features, threshold=case["segment_threshold"], least=case["min_segments"])
    assert segments.bincount().tolist() == GOLDEN[f"{name}/segment_lengths"].tolist()
    expected = GOLDEN[f"{name}/diverse"]
    diverse = flashvid_diverse(
        features, GOLDEN[f"{name}/saliency"], segments, keep=expected.shape[1], selection=case["selection"]
    )
    assert torch.equal(diverse, expected)


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_published_outputs(name, published):
    options = {key: CASES[name][key] for key in OPTIONS}
    features = GOLDEN[f"{name}/features"].clone()
    index, merged = flashvid_tokens(features, GOLDEN[f"{name}/saliency"], **options, published=published)
    ending = "_published" if published else ""
    expected = GOLDEN[f"{name}/merged{ending}"].clone()
    assert torch.equal(index, GOLDEN[f"{name}/index{ending}"])
    # The published code sorts places that come twice in either order.
    for place in (index[1:] == index[:-1]).nonzero().flatten().tolist():
        assert published
        if (expected[place] - merged[place]).abs().max() > 1e-5:
            expected[[place, place + 1]] = expected[[place + 1, place]]
    torch.testing.assert_close(merged, expected, atol=1e-5, rtol=0)
    assert torch.equal(features, GOLDEN[f"{name}/features"])


def slow_trees(features, picked, tau, budget):
    """Means of the trees of one segment, by place (frame, token)."""
    frames, tokens, _ = features.shape
    best = {}
    for frame in range(1, frames):
        for token in range(tokens):
            others = [other for other in range(tokens) if other not in picked[frame - 1]]
            if token in picked[frame] or not others:
                continue
            alike = torch.cosine_similarity(features[frame, token], features[frame - 1, others], dim=-1)
            best[frame, token] = alike.max().item(), (frame - 1, others[int(alike.argmax())])
    joins = {place for place, (alike, _) in best.items() if alike > tau}
    if frames * tokens - len(joins) < budget * frames:
        ranked = sorted((alike for alike, _ in best.values()), reverse=True)
        limit = ranked[frames * (tokens - budget) - 1]
        joins = {place for place, (alike, _) in best.items() if alike > limit}
    trees = {}
    for frame in range(frames):
        for token in set(range(tokens)) - picked[frame]:
            root = (frame, token)
            while root in joins:
                root = best[root][1]
            trees.setdefault(root, []).append(features[frame, token])
    return {root: torch.stack(members).mean(dim=0) for root, members in trees.items()}


def slow_clusters(values, count):
    """Means of the clusters of one frame, by token."""
    tokens = sorted(values)
    stacked = torch.stack([values[token] for token in tokens]).double()
    apart = (stacked[:, None] - stacked).norm(dim=-1) / math.sqrt(stacked.shape[-1])
    near = min(count, 7)
    density = (-apart.sort(dim=1).values[:, :near].square().mean(dim=1)).exp()
    scores = []
    for token in range(len(tokens)):
        denser = [apart[token, other] for other in range(len(tokens)) if density[other] > density[token]]
        scores.append(density[token] * (min(denser) if denser else apart.max()))
    peaks = torch.stack(scores).argsort(descending=True)[:count].tolist()
    members = {peak: [] for peak in peaks}
    for token in range(len(tokens)):
        members[token if token in peaks else min(peaks, key=lambda peak, t=token: apart[t, peak])].append(token)
    return {tokens[peak]: stacked[group].mean(dim=0).float() for peak, group in members.items()}


def slow_flashvid(features, saliency, retention, expansion, alpha, tau, min_segments, selection):
    tokens = features.shape[1]
    budget = min(tokens, math.ceil(tokens * retention * expansion - 1e-9))
    keep = math.ceil(budget * alpha)
    segments = flashvid_segments(features, least=min_segments)
    diverse = flashvid_diverse(features, saliency, segments, keep=keep, selection=selection)
    found = {}
    for number in segments.unique():
        own = (segments == number).nonzero().flatten().tolist()
        picked = [set(diverse[frame].tolist()) for frame in own]
        trees = slow_trees(features[own], picked, tau, budget)
        most = (budget - keep) * len(own)
        for position, frame in enumerate(own):
            found |= {frame * tokens + token: features[frame, token] for token in picked[position]}
            values = {token: value for (at, token), value in trees.items() if at == position}
            if most < len(trees) and values:
                values = slow_clusters(values, -(-len(values) * most // len(trees))) if most else {}
            found |= {frame * tokens + token: value for token, value in values.items()}
    index = sorted(found)
    return torch.tensor(index), torch.stack([found[place] for place in index])


@pytest.mark.parametrize(
    ("frames", "tokens", "retention", "alpha", "tau", "min_segments"),
    [
        (6, 20, 0.25, 0.7, 0.8, 2),
        (5, 16, 0.3, 0.5, 0.6, 1),  # so many join that the threshold is raised
        (3, 12, 0.2, 0.7, 0.8, 8),  # fewer frames than segments
        (1, 18, 0.3, 0.7, 0.8, 8),
        (4, 12, 0.3, 1.0, 0.8, 1),  # diverse tokens alone
        (4, 12, 0.3, 0.0, 0.8, 1),  # none
        (4, 12, 0.4, 0.7, 1.0, 1),  # nothing joins
        (2, 6, 1.0, 0.5, 0.8, 1),  # everything stays
    ],
)
def test_equals_the_slow_way(frames, tokens, retention, alpha, tau, min_segments):
    features, saliency = clip(frames, tokens, seed=frames + tokens)
    options = {"retention": retention, "alpha": alpha, "tau": tau, "min_segments": min_segments, "selection": "v1"}
    index, merged = flashvid_tokens(features, saliency, **options)
    expected = slow_flashvid(features, saliency, expansion=1.25, **options)
    assert torch.equal(index, expected[0])
    torch.testing.assert_close(merged, expected[1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    features, saliency = (each.to(dtype) for each in clip(4, 16))
    index, merged = flashvid_tokens(features, saliency, retention=0.3, min_segments=2)
    expected = flashvid_tokens(features.float(), saliency.float(), retention=0.3, min_segments=2)
    assert torch.equal(index, expected[0])
    assert torch.equal(merged, expected[1].to(dtype))


def test_segments_of_short_and_of_equal_frames():
    assert flashvid_segments(torch.ones(1, 4, 2)).tolist() == [0]
    assert flashvid_segments(torch.ones(3, 4, 2)).tolist() == [0, 1, 2]
    assert flashvid_segments(torch.ones(5, 4, 2), least=3).tolist() == [0, 1, 2, 2, 2]
    assert flashvid_segments(torch.eye(3)[:, None], least=1).tolist() == [0, 1, 2]


def test_images_are_clips_of_one_frame():
    features, saliency = clip(3, 20)
    together = FlashVid(0.25).reduce(VisionFeatures(features, (4, 5), lambda: saliency, lambda: None))
    alone = [flashvid_tokens(features[t : t + 1], saliency[t : t + 1], retention=0.25) for t in range(3)]
    assert torch.equal(together[0], torch.cat([20 * t + index for t, (index, _) in enumerate(alone)]))
    torch.testing.assert_close(together[1], torch.cat([merged for _, merged in alone]))
    assert len(alone[0][0]) == FlashVid(0.25).survivors(20)
    video = FlashVid(0.25).reduce(VisionFeatures(features, (4, 5), lambda: saliency, lambda: None, is_video=True))
    expected = flashvid_tokens(features, saliency, retention=0.25)
    assert torch.equal(video[0], expected[0])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"retention": 0}, ValueError, "retention must be in (0, 1], got 0"),
        ({"retention": "half"}, TypeError, "retention must be a number, got 'half'"),
        ({"expansion": 0.5}, ValueError, "expansion must be 1 or more, got 0.5"),
        ({"alpha": 2}, ValueError, "alpha must be in [0, 1], got 2"),
        ({"min_segments": 0}, ValueError, "min_segments must be 1 or more, got 0"),
        ({"min_segments": 2.0}, TypeError, "min_segments must be an integer, got 2.0"),
        ({"selection": "v3"}, ValueError, "selection must be one of 'v1', 'v2', got 'v3'"),
    ],
)
def test_refuses_and_says_why(arguments, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        FlashVid(**{"retention": 0.2, **arguments})


def test_refuses_other_shapes():
    features, saliency = clip(2, 4)
    with pytest.raises(ValueError, match=r"^saliency must be \(2, 4\) on cpu, got \(2, 3\) on cpu$"):
        flashvid_tokens(features, saliency[:, :3], retention=0.2)
    with pytest.raises(ValueError, match=r"^features must be \(T, N, d\)"):
        flashvid_tokens(features[0], saliency, retention=0.2)
