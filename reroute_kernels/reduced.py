"""Policies of methods that reduce before the decoder, as published and rerouted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Real

from .budget import solve
from .checks import expect_one_of
from .cost import Decoder
from .policy import LAST_QUERY, Policy, Stage
from .rankings import LastQuery
from .reducers import CDPruner, DivPrune, FlashVid, HoloV, Reducer, VidCom2, VisionZip, VisPruner

IMAGE_METHODS: dict[str, Callable[[float], Reducer]] = {
    "visionzip": VisionZip,
    "divprune": DivPrune,
    "cdpruner": CDPruner,
    "holov": HoloV,
    "vispruner": VisPruner,
}
"""Methods for images, whose budget is a number of tokens, with the reducer for a share of them."""

VIDEO_METHODS = ("flashvid", "vidcom2")
"""Methods for videos, whose budget is a percentage of the tokens."""

REDUCED = tuple(f"{prefix}{method}" for method in (*IMAGE_METHODS, *VIDEO_METHODS) for prefix in ("", "reroute-"))
"""Methods that reduce before the decoder, each as published and rerouted."""

PERCENTAGES = ("25%", "20%", "15%", "10%")
"""The budgets that FlashVID was published for, which serve VidCom2, too."""

EXPANSION = 1.25
"""How many times as many tokens as its budget FlashVID leaves, until the decoder drops some."""

POOL = 2
"""How many times as many tokens as its budget a rerouted reducer leaves, as the pool of its decisions."""

_PRUNING_LAYERS = {28: 20, 36: 28}
"""The layer at which FlashVID drops tokens, by the number of layers: LLaVA-OneVision and Qwen2.5-VL; Qwen3-VL."""


def amounts(method: str) -> tuple[int | str, ...]:
    """The budgets that presets of a method are stated for: tokens of 576, or percentages.

    >>> amounts("reroute-divprune"), amounts("flashvid")
    ((192, 128, 64, 56), ('25%', '20%', '15%', '10%'))
    """
    if is_for_videos(method):
        return PERCENTAGES
    return (192, 128, 64, 56) if _name_of(method) == "divprune" else (192, 128, 64)


def is_for_videos(method: str) -> bool:
    """Whether a method takes a percentage."""
    return _name_of(method) in VIDEO_METHODS


def share_of(method: str, amount: object, visual_tokens: int) -> float:
    """The share of the visual tokens that a budget of a method is.

    Args:
        method: one of `REDUCED`.
        amount: a number of tokens for images, and for videos a percentage, such as `"10%"`.
        visual_tokens: of which a number is stated.

    Raises:
        TypeError: the amount is neither a number nor a text.
        ValueError: it is none that the method takes.
    """
    if is_for_videos(method):
        return _percentage(method, amount)
    accepted = f"avg_tokens must be a number of visual tokens from 1 to {visual_tokens} for {method!r}, got {amount!r}"
    if isinstance(amount, str):
        raise ValueError(accepted)
    if isinstance(amount, bool) or not isinstance(amount, Real):
        raise TypeError(accepted)
    number = float(amount)
    if not 1 <= number <= visual_tokens:
        raise ValueError(accepted)
    return number / visual_tokens


def _percentage(method: str, amount: object) -> float:
    most = 100 / EXPANSION if _name_of(method) == "flashvid" else 100
    accepted = f"avg_tokens must be a percentage above 0% and at most {most:g}%, such as '10%', for {method!r}, got "
    if not isinstance(amount, str | Real):
        raise TypeError(f"{accepted}{amount!r}")
    number, _, after = str(amount).partition("%")
    try:
        percents = float(number)
    except ValueError:
        percents = 0.0
    if not isinstance(amount, str) or "%" not in amount or after or not 0 < percents <= most:
        raise ValueError(f"{accepted}{amount!r}")
    return percents / 100


def reduced_policy(
    method: str,
    share: float,
    count: int,
    able: Sequence[int],
    decisions: Sequence[float],
    model_type: str,
    visual_tokens: int,
) -> Policy:
    """Policy of a method that reduces.

    Args:
        method: one of `REDUCED`.
        share: of the visual tokens that run in a layer on average.
        count: decoder layers.
        able: those that can decide.
        decisions: layers at which a rerouted method decides, unless it is FlashVID; the nearest that can are taken.
        model_type: `config.model_type`.
        visual_tokens: of which a budget is met to the token.

    Raises:
        ValueError: no layer can decide.
    """
    expect_one_of(method=(method, REDUCED))
    name, reroutes = _name_of(method), method.startswith("reroute-")
    if name == "flashvid":
        return _flashvid(share, count, able, model_type, 2 if reroutes else 1)
    make = IMAGE_METHODS.get(name, VidCom2)
    if not reroutes:
        return Policy((), "remove", positions=_positions(model_type), reducer=make(share))
    reducer = make(min(1.0, POOL * share))
    layers = _nearest([layer for layer in able if layer], decisions, below=count / POOL)
    if name == "vidcom2":
        keep = share * _left(count, layers[0], min(POOL, 1 / share))
        return Policy([Stage(layer, keep) for layer in layers], reducer=reducer)
    return solve(
        of_layers(count), layers, avg_tokens=share * visual_tokens, visual_tokens=visual_tokens, reducer=reducer
    )


def _name_of(method: str) -> str:
    return method.removeprefix("reroute-")


def _positions(model_type: str) -> str:
    """LLaVA's published codes build a shorter sequence, and those for Qwen's models keep the rotary positions."""
    return "contiguous" if model_type.startswith("llava") else "original"


def _left(layers: int, first: int, times: float) -> float:
    """How many times its budget may run from a layer on, if before it `times` as much does."""
    return (layers - times * first) / (layers - first)


def _flashvid(share: float, count: int, able: Sequence[int], model_type: str, decisions: int) -> Policy:
    """FlashVID with one decision, or with a second one halfway between that and the end, which keeps as many tokens."""
    # With all layers but the last few at more than the budget, it cannot be met.
    firsts = [layer for layer in able if 0 < layer * EXPANSION < count and (decisions == 1 or layer < able[-1])]
    _check_some(firsts, able)
    wanted = _PRUNING_LAYERS.get(count, round(5 * count / 7))
    layers = [min(firsts, key=lambda layer: abs(layer - wanted))]
    if decisions > 1:
        half = (layers[0] + count) / 2
        layers.append(min((layer for layer in able if layer > layers[0]), key=lambda layer: abs(layer - half)))
    keep = share * _left(count, layers[0], EXPANSION)
    is_qwen = model_type.startswith("qwen")
    reducer = FlashVid(share, EXPANSION, min_segments=4 if is_qwen else 8, selection="v1" if is_qwen else "v2")
    ahead = all(layer - 1 in able for layer in layers)
    return Policy(
        [Stage(layer, keep) for layer in layers],
        "reroute" if decisions > 1 else "remove",
        LastQuery(layer="previous") if ahead else LAST_QUERY,
        positions="original" if decisions > 1 else _positions(model_type),
        reducer=reducer,
    )


def _check_some(firsts: Sequence[int], able: Sequence[int]) -> None:
    if not firsts:
        raise ValueError(f"model must have a layer that can decide early enough for the budget, got {list(able)}")


def _nearest(able: Sequence[int], decisions: Sequence[float], below: float) -> list[int]:
    """Layers that can decide nearest to some; the first so early that a pool leaves room in the budget."""
    firsts = [layer for layer in able if layer < below]
    _check_some(firsts, able)
    first = min(firsts, key=lambda layer: abs(layer - decisions[0]))
    return sorted(
        {first, *(min(able, key=lambda layer: abs(layer - each)) for each in decisions[1:])} - set(range(first))
    )


def of_layers(count: int) -> Decoder:
    """A decoder of so many layers, to count tokens by."""
    return Decoder(1, count, 1, 1, 1, 1, mlp_weights=(1,) * count)
