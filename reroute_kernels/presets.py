"""The configurations that the Reroute paper released (arXiv 2606.12412), by name."""

from __future__ import annotations

from typing import NamedTuple

from .cost import DECODERS
from .policy import Policy, Stage

NUM_LAYERS = {name: decoder.layers for name, decoder in DECODERS.items()}

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

MODELS = tuple(NUM_LAYERS)
METHODS = (
    "fastv",
    "pdrop",
    "reroute-fastv",
    "reroute-fastv-stagewise",
    "reroute-pdrop",
    "reroute-pdrop-stagewise",
)
TIERS = tuple(_KEEPS)


class Preset(NamedTuple):
    """The name of a published configuration; `preset(*name)` builds its policy."""

    model: str
    method: str
    avg_tokens: int


def presets() -> list[Preset]:
    """All published configurations."""
    return [Preset(model, method, tier) for model in MODELS for method in METHODS for tier in TIERS]


def preset(model: str, method: str, avg_tokens: int) -> Policy:
    """Policy of a published configuration.

    Args:
        model: `"llava-1.5-7b"` (32 decoder layers) or `"qwen2.5-vl-7b"` (28).
        method: `"fastv"` and `"pdrop"` remove tokens as the paper's code runs these methods; `"reroute-fastv"` and
            `"reroute-pdrop"` defer them at a matched budget. The authors also list a `-stagewise` variant of both,
            which computes the same thing faster; here every policy runs stagewise, so it is the same policy.
        avg_tokens: the published tier, 192, 128 or 64 visual tokens per layer on average. The schedules of the pdrop
            pair at tier 64 really average 80 and 84; `reroute_kernels.cost.average_visual_tokens` counts.

    Raises:
        ValueError: an argument names no published configuration.
    """
    for name, value, accepted in (
        ("model", model, MODELS),
        ("method", method, METHODS),
        ("avg_tokens", avg_tokens, TIERS),
    ):
        if value not in accepted:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, accepted))}, got {value!r}")
    keeps = _KEEPS[avg_tokens]
    method = method.removesuffix("-stagewise")
    if method == "fastv":
        return Policy(schedule=(Stage(3, keeps["fastv"]),), action="remove")
    matched_to_fastv = method == "reroute-fastv"
    layers = (3 if matched_to_fastv else 2, *_LATER_LAYERS[model])
    ratios = (keeps["fastv"],) * 4 if matched_to_fastv else keeps[method]
    return Policy(
        schedule=tuple(Stage(layer, keep) for layer, keep in zip(layers, ratios, strict=True)),
        action="remove" if method == "pdrop" else "reroute",
    )
