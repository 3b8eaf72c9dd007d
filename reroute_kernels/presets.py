"""The configurations that the Reroute paper released (arXiv 2606.12412), and those of the methods' own authors."""

from __future__ import annotations

import math
from typing import NamedTuple

from .budget import keep_ratio, solve_like
from .checks import expect_one_of
from .cost import DECODERS
from .policy import Policy, Stage
from .rankings import LastQuery
from .reducers import Nuwa

MODELS = ("llava-1.5-7b", "qwen2.5-vl-7b")
NUM_LAYERS = {model: DECODERS[model].layers for model in MODELS}

# Visual tokens that all presets are stated for: 24 x 24 patches of LLaVA-1.5, and 451,584 pixels of Qwen2.5-VL.
VISUAL_TOKENS = 576

# Decision layers after the first, which is 3 where a schedule is matched to FastV and 2 elsewhere.
_LATER_LAYERS = {"llava-1.5-7b": (7, 15, 23), "qwen2.5-vl-7b": (6, 13, 20)}

_KEEPS = {
    192: {
        "fastv": 0.2644,
        "pdrop": (0.5965, 0.3558, 0.2123, 0.1266),
        "reroute-pdrop": (0.4502, 0.4502, 0.2251, 0.1126),
    },
    128: {
        "fastv": 0.1418,
        "pdrop": (0.4570, 0.2088, 0.0954, 0.0436),
        "reroute-pdrop": (0.2655, 0.2655, 0.1328, 0.0664),
    },
    64: {
        "fastv": 0.01916,
        "pdrop": (0.2789, 0.0937, 0.0315, 0.0106),
        "reroute-pdrop": (0.1392, 0.1392, 0.0696, 0.0348),
    },
}

METHODS = (
    "fastv",
    "pdrop",
    "reroute-fastv",
    "reroute-fastv-stagewise",
    "reroute-pdrop",
    "reroute-pdrop-stagewise",
)
"""Those of the Reroute paper."""

ORIGINALS = ("fastv-original", "pdrop-original", "nuwa", "reroute-nuwa")
"""FastV, PyramidDrop and Nüwa as their own authors run them, and Nüwa under `reroute`."""

TIERS = tuple(_KEEPS)

_PYRAMIDDROP_LAYERS = {"llava-1.5-7b": (8, 16, 24), "qwen2.5-vl-7b": (7, 14, 21)}

# By tier: the reducer, and how many of 576 tokens stage 2 keeps (on Qwen2.5-VL a share of the anchors).
_NUWA = {
    "llava-1.5-7b": {
        192: (Nuwa(keep=336 / 576, per_cell=3), 48),
        128: (Nuwa(keep=224 / 576, per_cell=2), 32),
        64: (Nuwa(keep=112 / 576, per_cell=1), 16),
    },
    "qwen2.5-vl-7b": {
        tier: (
            Nuwa(keep=fraction, per_cell=per_cell, distance=0.8, quantile=0.1, keeps_own=False),
            math.trunc(math.ceil(VISUAL_TOKENS * fraction) * share),
        )
        for tier, fraction, share, per_cell in ((432, 0.85, 0.7, 4), (288, 0.6, 0.66, 3), (144, 0.35, 0.42, 3))
    },
}
_NUWA_LAYERS = {"llava-1.5-7b": (16, 23), "qwen2.5-vl-7b": (15, 21)}
_NUWA_RANKINGS = {
    "llava-1.5-7b": LastQuery(layer="previous"),
    "qwen2.5-vl-7b": LastQuery(layer="previous", queries=3, head_reduction="max"),
}


class Preset(NamedTuple):
    """The name of a published configuration; `preset(*name)` builds its policy."""

    model: str
    method: str
    avg_tokens: int


def presets(*, originals: bool = False) -> list[Preset]:
    """The configurations that the Reroute paper released.

    Args:
        originals: whether those in `ORIGINALS` follow.
    """
    methods = METHODS + ORIGINALS if originals else METHODS
    return [Preset(model, method, tier) for model in MODELS for method in methods for tier in tiers(model, method)]


def tiers(model: str, method: str) -> tuple[int, ...]:
    """The published budgets of a method, in visual tokens per layer on average.

    Raises:
        ValueError: a name is unknown.
    """
    expect_one_of(model=(model, MODELS), method=(method, METHODS + ORIGINALS))
    if method == "pdrop-original":
        return (270,)
    return tuple(_NUWA[model]) if method.endswith("nuwa") else TIERS


def preset(model: str, method: str, avg_tokens: int, *, matched: bool = False) -> Policy:
    """Policy of a published configuration.

    Args:
        model: `"llava-1.5-7b"` (32 decoder layers) or `"qwen2.5-vl-7b"` (28).
        method: `"fastv"` and `"pdrop"` remove tokens as the Reroute paper's code runs these methods; `"reroute-fastv"`
            and `"reroute-pdrop"` defer them at a matched budget. The authors also list a `-stagewise` variant of both,
            which computes the same thing faster; here every policy runs stagewise, so it is the same policy.
            `"fastv-original"` (arXiv 2403.06764; at the Reroute paper's keep ratios), `"pdrop-original"` (arXiv
            2410.17247; on Qwen2.5-VL at the same depths) and `"nuwa"` (arXiv 2602.02951) follow their own authors'
            code. `"reroute-nuwa"` defers in the second stage of Nüwa, by two decisions, and runs as many tokens in
            every layer.
        avg_tokens: the published tier, one of `tiers(model, method)`: visual tokens per layer on average, of 576. It is
            a name. On LLaVA the true averages are within 1 of it, but for the pdrop pair at 64, which averages 80 and
            84. On Qwen2.5-VL they are 197, 134 and 72 for what is named after FastV (the original at 128: 135), 192,
            129 and 83 for pdrop, 193, 131 and 88 for reroute-pdrop, and 422, 291 and 147 for both of Nüwa at 432, 288
            and 144. `reroute_kernels.cost` counts.
        matched: solve the schedule anew, with its published keep ratios as the shape, so that pairs match at 576
            tokens. What removes comes as close to `avg_tokens` as `solve` does, never above: with one decision, as in
            FastV, to less than 1 token, with several to an eighth of one. What defers comes as close to what its
            partner that removes then averages. `policy.budget` tells how close.

    Raises:
        ValueError: an argument names no published configuration.
    """
    expect_one_of(avg_tokens=(avg_tokens, tiers(model, method)))
    policy = _published(model, method.removesuffix("-stagewise"), avg_tokens)
    if not matched:
        return policy
    limit = avg_tokens
    if policy.action == "reroute":
        partner = method.removeprefix("reroute-").removesuffix("-stagewise")
        limit = preset(model, partner, avg_tokens, matched=True).budget.reached
    return solve_like(model, policy, avg_tokens=limit, visual_tokens=VISUAL_TOKENS)


def _published(model: str, method: str, tier: int) -> Policy:
    if method == "pdrop-original":
        return Policy(_stages(_PYRAMIDDROP_LAYERS[model], (0.5, 0.25, 0.125)), "remove", positions="contiguous")
    if method.endswith("nuwa"):
        reducer, selected = _NUWA[model][tier]
        decisions = 1 if method == "nuwa" else 2
        stages = _stages(_NUWA_LAYERS[model][:decisions], (keep_ratio(selected, VISUAL_TOKENS),) * decisions)
        action = "remove" if method == "nuwa" else "reroute"
        return Policy(stages, action, _NUWA_RANKINGS[model], reducer=reducer)
    keeps = _KEEPS[tier]
    if method == "fastv-original":
        keep = keep_ratio(round(VISUAL_TOKENS * keeps["fastv"]), VISUAL_TOKENS)
        return Policy(_stages((3,), (keep,)), "remove", LastQuery(layer="previous"))
    if method == "fastv":
        return Policy(_stages((3,), (keeps["fastv"],)), "remove")
    if method == "reroute-fastv":
        return Policy(_stages((3, *_LATER_LAYERS[model]), (keeps["fastv"],) * 4))
    action = "remove" if method == "pdrop" else "reroute"
    return Policy(_stages((2, *_LATER_LAYERS[model]), keeps[method]), action)


def _stages(layers: tuple[int, ...], keeps: tuple[float, ...]) -> list[Stage]:
    return [Stage(layer, keep) for layer, keep in zip(layers, keeps, strict=True)]
