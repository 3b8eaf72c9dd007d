"""Reducers of several papers, each against its formula done token by token."""

import math
import re

import pytest
import torch
from torch import cosine_similarity

from reroute_kernels import reducers
from reroute_kernels.reducers import (
    CDPruner,
    DivPrune,
    HoloV,
    VidCom2,
    VisionFeatures,
    VisionZip,
    VisPruner,
    cdpruner_relevance,
    vidcom2_tokens,
)

SHAPES = [(2, 24, 6), (1, 37, 16), (3, 10, 10), (2, 12, 1)]  # images, tokens, tokens that stay


def image(images, tokens, seed=0, **given):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(images, tokens, 8, generator=generator)
    saliency = torch.rand(images, tokens, generator=generator)
    keys = torch.randn(images, tokens, 5, generator=generator)
    projected = torch.randn(images, tokens, 7, generator=generator)
    text = torch.randn(4, 7, generator=generator)
    texts = [text[number:] for number in range(images)]  # each image has its own
    values = {"_keys": lambda: keys, "_projected": lambda: projected, "_text": lambda: texts}
    return VisionFeatures(features, (1, tokens), lambda: saliency, lambda: None, **values | given)


def slow_divprune(image, number, count):
    apart = [[1 - cosine_similarity(a, b, dim=0) for b in image.projected[number]] for a in image.projected[number]]
    tokens = range(len(apart))
    picked = [max(tokens, key=lambda token: sorted(apart[token])[:2][-1])]
    while len(picked) < count:
        left = [token for token in tokens if token not in picked]
        picked.append(max(left, key=lambda token: min(apart[other][token] for other in picked)))
    return {token: image.features[number, token] for token in picked}


def slow_visionzip(image, number, count):
    contextual = min(count - 1, int(count * 10 / 64 + 0.5))
    salient = image.saliency[number].argsort(descending=True)[: count - contextual].tolist()
    found = {token: image.features[number, token] for token in salient}
    rest = [token for token in range(image.features.shape[1]) if token not in salient]
    targets = rest[:: max(1, len(rest) // contextual)][:contextual] if contextual and rest else []
    groups = {target: [] for target in targets}
    for token in set(rest) - set(targets) if targets else ():
        alike = [cosine_similarity(image.keys[number, token], image.keys[number, target], dim=0) for target in targets]
        groups[targets[int(torch.stack(alike).argmax())]].append(image.features[number, token])
    for target, members in groups.items():
        found[target] = image.features[number, target] + (torch.stack(members).mean(dim=0) if members else 0)
    return found


def slow_holov(image, number, count):
    features, salient = image.features[number], image.saliency[number]
    tokens = len(features)
    parts = min(16, tokens)
    chunks = [[token for token in range(tokens) if token * parts // tokens == part] for part in range(parts)]
    variance = torch.zeros(tokens)
    for chunk in chunks:
        for token in chunk if len(chunk) > 2 else ():
            others = [cosine_similarity(features[token], features[other], dim=0) for other in chunk if other != token]
            variance[token] = torch.stack(others).var()
    scale = salient.mean() / variance.mean() if variance.any() else 0
    scores = salient + 0.09 * variance * scale
    means = torch.stack([scores[chunk].mean() for chunk in chunks])
    quotas = [min(len(chunk), int(count * mean / means.sum())) for chunk, mean in zip(chunks, means, strict=True)]
    for part in means.argsort(descending=True).tolist():
        quotas[part] += min(len(chunks[part]) - quotas[part], count - sum(quotas))
    found = {}
    for chunk, quota in zip(chunks, quotas, strict=True):
        best = sorted(chunk, key=lambda token: -scores[token])[:quota]
        found |= {token: features[token] for token in best}
    return found


def slow_vispruner(image, number, count):
    features = image.features[number]
    order = image.saliency[number].argsort(descending=True).tolist()
    salient, rest = order[: count // 2], order[count // 2 :]
    while len(rest) > count - count // 2:
        even, odd = rest[::2], rest[1::2]
        alike = {
            token: max(cosine_similarity(features[token], features[other], dim=0) for other in odd) for token in even
        }
        drop = sorted(even, key=lambda token: -alike[token])[: min(8, len(rest) - count + count // 2)]
        rest = [token for token in rest if token not in drop]
    return {token: features[token] for token in salient + rest}


def slow_cdpruner(image, number, count):
    projected = torch.nn.functional.normalize(image.projected[number].double(), dim=-1)
    text = torch.nn.functional.normalize(image.text[number].double(), dim=-1)
    relevance = torch.stack([-torch.stack([token @ word for word in text]).mean() for token in projected])
    relevance = (relevance - relevance.min()) / (relevance.max() - relevance.min())
    kernel = relevance[:, None] * (projected @ projected.T) * relevance
    picked = []
    while len(picked) < count:
        left = [token for token in range(len(kernel)) if token not in picked]
        picked.append(max(left, key=lambda token: torch.det(kernel[[*picked, token]][:, [*picked, token]])))
    return {token: image.features[number, token] for token in picked}


SLOW = {
    DivPrune: slow_divprune,
    VisionZip: slow_visionzip,
    HoloV: slow_holov,
    VisPruner: slow_vispruner,
    CDPruner: slow_cdpruner,
}


@pytest.mark.parametrize(("images", "tokens", "count"), SHAPES)
@pytest.mark.parametrize("method", SLOW, ids=lambda method: method.__name__)
def test_equals_the_slow_way(method, images, tokens, count):
    # Determinants of more tokens than there are channels are 0: their order is rounding.
    count = min(count, 6) if method is CDPruner else count
    subject = image(images, tokens, seed=tokens)
    given = [each.clone() for each in (subject.features, subject.saliency, subject.keys, subject.projected)]
    reducer = method(keep=count / tokens)
    index, made = reducer.reduce(subject)
    assert reducer.survivors(tokens) == count
    for number in range(images):
        expected = SLOW[method](subject, number, count)
        assert index[number].tolist() == sorted(expected)
        torch.testing.assert_close(made[number], torch.stack([expected[token] for token in sorted(expected)]))
    after = (subject.features, subject.saliency, subject.keys, subject.projected)
    assert all(map(torch.equal, given, after))


def slow_vidcom2(features, keep):
    frames, tokens, width = features.shape
    variance = features.flatten(0, 1).var(dim=0)
    calm = variance.argsort()[: width // 2]
    unit = torch.nn.functional.normalize(features[..., calm], dim=-1)

    def likeness(token, centre):
        apart = float((token - centre / centre.norm()).square().sum())
        return sum(math.exp(-apart / (2 * 2.0**power)) for power in (-3, -2, -1, 0, 1))

    of_video = torch.tensor([[likeness(token, unit.mean(dim=(0, 1))) for token in frame] for frame in unit])
    of_frame = torch.tensor([[likeness(token, frame.mean(dim=0)) for token in frame] for frame in unit])
    distinct = (-of_video.mean(dim=1) / 0.01).softmax(dim=0)
    found = []
    for frame in range(frames):
        count = max(1, min(tokens, int(tokens * keep * float(1 + distinct[frame] - distinct.mean()))))
        best = (of_video + of_frame)[frame].argsort()[:count].tolist()
        found += [frame * tokens + token for token in sorted(best)]
    return found


@pytest.mark.parametrize(("frames", "tokens", "keep"), [(4, 12, 0.3), (1, 16, 0.25), (6, 9, 1.0), (2, 20, 0.01)])
def test_vidcom2_equals_the_slow_way(frames, tokens, keep):
    subject = image(frames, tokens, seed=frames, is_video=True)
    index, made = VidCom2(keep).reduce(subject)
    assert index.tolist() == slow_vidcom2(subject.projected, keep)
    assert torch.equal(made, subject.features.flatten(0, 1)[index])


def test_vidcom2_leaves_images_whole():
    subject = image(3, 12)
    index, made = VidCom2(0.25).reduce(subject)
    assert index.tolist() == [list(range(12))] * 3
    assert torch.equal(made, subject.features)
    assert made.data_ptr() != subject.features.data_ptr()
    assert len(vidcom2_tokens(subject.projected[:1], keep=0.25)) == VidCom2(0.25).survivors(12)


@pytest.mark.parametrize(
    ("given", "tiles"), [({"is_video": True}, [5]), ({"_tiles": lambda: [2, 1, 2]}, [2, 1, 2]), ({}, [1] * 5)]
)
def test_divprune_compares_all_tiles_of_an_image(given, tiles):
    subject, found, first = image(5, 8, **given), [], 0
    assert subject.tiles == tuple(tiles)
    for size in tiles:
        own = slice(first, first + size)
        features, projected = (each[own].flatten(0, 1)[None] for each in (subject.features, subject.projected))
        whole = VisionFeatures(features, (1, 8), None, None, _projected=lambda projected=projected: projected)
        found += [8 * first + token for token in sorted(slow_divprune(whole, 0, math.ceil(0.3 * 8 * size)))]
        first += size
    index, made = DivPrune(0.3).reduce(subject)
    flat = index if index.ndim == 1 else (index + 8 * torch.arange(5)[:, None]).flatten()
    assert flat.tolist() == found
    assert torch.equal(made.flatten(0, -2), subject.features.flatten(0, 1)[found])


def test_relevance_is_scaled_in_each_image():
    features = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0))
    text = torch.ones(3, 4)
    together = cdpruner_relevance(features, text)
    assert torch.equal(together[1:], cdpruner_relevance(features[1:], text))
    assert together.aminmax(dim=1) == (pytest.approx([0, 0]), pytest.approx([1, 1]))
    assert cdpruner_relevance(torch.ones(1, 3, 4), text).tolist() == [[1, 1, 1]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", [*SLOW, VidCom2], ids=lambda method: method.__name__)
def test_half_precision_features_keep_their_dtype(method, dtype):
    subject = image(2, 18)
    subject.features, projected = subject.features.to(dtype), subject.projected.to(dtype)
    subject._projected = lambda: projected
    index, made = method(keep=0.5).reduce(subject)
    assert made.dtype == dtype
    assert made.isfinite().all()
    assert made.shape[:-1] == index.shape


def test_towers_without_keys_or_text():
    plain = image(1, 6, _keys=None, _text=None)
    with pytest.raises(NotImplementedError, match=r"^reducer must not compare keys on this vision tower"):
        VisionZip(0.5).reduce(plain)
    with pytest.raises(NotImplementedError, match=r"^reducer must not depend on text where images come without"):
        CDPruner(0.5).reduce(plain)


@pytest.mark.parametrize(
    ("method", "arguments", "error", "message"),
    [
        ("DivPrune", {"keep": 0}, ValueError, "keep must be in (0, 1], got 0"),
        ("VidCom2", {"keep": "half"}, TypeError, "keep must be a number, got 'half'"),
        ("VisionZip", {"contextual": 0}, ValueError, "contextual must be in (0, 1], got 0"),
        ("HoloV", {"chunks": 0}, ValueError, "chunks must be 1 or more, got 0"),
        ("HoloV", {"variation": -1}, ValueError, "variation must be 0 or more, got -1"),
        ("VisPruner", {"salient": 2}, ValueError, "salient must be in [0, 1], got 2"),
    ],
)
def test_refuses_and_says_why(method, arguments, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        getattr(reducers, method)(**{"keep": 0.5, **arguments})
