"""Reducers as functions: Nüwa's stage 1 against outputs of the published code, and against a slow implementation."""

import math
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from reroute_kernels.reducers import Nuwa, VisionFeatures, nuwa_anchors

GOLDEN = load_file(Path(__file__).parent / "golden" / "nuwa" / "stage1_24x24.safetensors")
BUDGETS = {64: (112, 1), 128: (224, 2), 192: (336, 3)}


def image(features, grid, saliency=None, similarity_features=None):
    return VisionFeatures(features, grid, lambda: saliency, lambda: similarity_features)


@pytest.mark.parametrize("budget", BUDGETS)
def test_published_outputs(budget, device):
    count, per_cell = BUDGETS[budget]
    anchors, tokens = nuwa_anchors(
        *(GOLDEN[name].to(device) for name in ("features", "similarity_features", "saliency")),
        grid=(24, 24),
        count=count,
        per_cell=per_cell,
        distance=math.sqrt(280),
        quantile=0.55,
    )
    assert torch.equal(anchors.cpu(), GOLDEN[f"b{budget}/anchors"])
    torch.testing.assert_close(tokens.cpu(), GOLDEN[f"b{budget}/tokens"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("budget", BUDGETS)
def test_defaults_are_those_of_llava(budget):
    count, per_cell = BUDGETS[budget]
    reducer = Nuwa(count / 576, per_cell)
    anchors, tokens = reducer.reduce(
        image(GOLDEN["features"], (24, 24), GOLDEN["saliency"], GOLDEN["similarity_features"])
    )
    assert torch.equal(anchors, GOLDEN[f"b{budget}/anchors"])
    torch.testing.assert_close(tokens, GOLDEN[f"b{budget}/tokens"], atol=1e-5, rtol=0)
    assert reducer.survivors(576) == count


def slow_anchors(features, similar, saliency, grid, count, per_cell, distance, quantile, keeps_own):
    """One image, token by token."""
    height, width = grid
    cells = {}
    for place in range(height * width):
        cells.setdefault((place // width // 2, place % width // 2), []).append(place)
    proposed = []
    for places in cells.values():
        proposed += sorted(places, key=lambda place: (-saliency[place].item(), place))[:per_cell]
    anchors = sorted(sorted(proposed, key=lambda place: (-saliency[place].item(), place))[:count])
    border = torch.quantile(saliency[anchors], quantile)
    tokens = []
    for anchor in anchors:
        weights = torch.zeros(height * width)
        for place in range(height * width):
            apart = math.dist(divmod(anchor, width), divmod(place, width))
            alike = torch.cosine_similarity(similar[anchor], similar[place], dim=0).clamp(min=0)
            if place == anchor or saliency[anchor] < border:
                weights[place] = alike * max(0, 1 - apart / distance)
        weights /= weights.sum() + 1e-8
        if keeps_own:
            weights[anchor] = 1
        tokens.append(weights @ features)
    return torch.tensor(anchors), torch.stack(tokens)


@pytest.mark.parametrize("keeps_own", [True, False])
@pytest.mark.parametrize(
    ("grid", "count", "per_cell"), [((4, 6), 5, 1), ((5, 7), 20, 3), ((3, 2), 6, 4), ((1, 1), 1, 2)]
)
def test_any_grid_against_the_slow_way(grid, count, per_cell, keeps_own, device):
    generator = torch.Generator().manual_seed(count)
    tokens = grid[0] * grid[1]
    features, similar = (torch.randn(2, tokens, size, generator=generator) for size in (8, 5))
    saliency = torch.randint(0, 6, (2, tokens), generator=generator).float()  # with ties
    options = {"grid": grid, "count": count, "per_cell": per_cell, "distance": 3.0, "quantile": 0.4}
    anchors, made = nuwa_anchors(
        *(tensor.to(device) for tensor in (features, similar, saliency)), **options, keeps_own=keeps_own
    )
    for number in range(2):
        expected = slow_anchors(features[number], similar[number], saliency[number], **options, keeps_own=keeps_own)
        assert torch.equal(anchors[number].cpu(), expected[0])
        torch.testing.assert_close(made[number].cpu(), expected[1], atol=1e-5, rtol=0)


def test_odd_grid_proposes_what_is_there():
    anchors, _ = Nuwa(1.0, 1).reduce(image(torch.ones(1, 15, 4), (3, 5), torch.rand(1, 15), torch.ones(1, 15, 2)))
    assert anchors.shape == (1, 6)  # of 2 x 3 cells


def test_half_precision_features_keep_their_dtype():
    features = torch.randn(1, 16, 8)
    saliency, similar = torch.rand(1, 16), torch.randn(1, 16, 4)
    for dtype in (torch.float16, torch.bfloat16):
        _, tokens = Nuwa(0.5, 2).reduce(image(features.to(dtype), (4, 4), saliency, similar.to(dtype)))
        assert tokens.dtype == dtype
        assert tokens.isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"keep": "half"}, TypeError, "keep must be a number, got 'half'"),
        ({"keep": 0}, ValueError, "keep must be in (0, 1], got 0"),
        ({"keep": 1.5}, ValueError, "keep must be in (0, 1], got 1.5"),
        ({"per_cell": 5}, ValueError, "per_cell must be 1, 2, 3 or 4, got 5"),
        ({"distance": 0}, ValueError, "distance must be above 0, got 0"),
        ({"quantile": 2}, ValueError, "quantile must be in [0, 1], got 2"),
        ({"keeps_own": 1}, TypeError, "keeps_own must be a bool, got 1"),
    ],
)
def test_refuses_and_says_why(arguments, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        Nuwa(**{"keep": 0.2, "per_cell": 1, **arguments})


def test_autocast_changes_nothing(device):
    names = ("features", "similarity_features", "saliency")
    options = {"grid": (24, 24), "count": 112, "per_cell": 1, "distance": math.sqrt(280), "quantile": 0.55}
    tensors = [GOLDEN[name].to(device) for name in names]
    expected = nuwa_anchors(*tensors, **options)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        anchors, tokens = nuwa_anchors(*tensors, **options)
    assert torch.equal(anchors, expected[0])
    assert torch.equal(tokens, expected[1])
