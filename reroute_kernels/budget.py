"""Schedules solved for a budget."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise, product
from numbers import Real
from operator import index as as_integer

import torch

from .checks import expect_one_of
from .cost import Decoder, cost, surviving_tokens
from .policy import ACTIONS, LAST_QUERY, Budget, Policy, Stage
from .rankings import RankingLike
from .reducers import ReducerLike

SHAPES = ("uniform", "pyramid")

# The attribute of `Cost` that each kind of budget limits.
_COSTS = {"avg_tokens": "average_visual_tokens", "flops": "prefill_flops", "kv_bytes": "kv_bytes"}

KINDS = tuple(_COSTS)

# How many stages are raised together; all their subsets are tried.
_TOGETHER = 10


class OverBudget(ValueError):
    """A budget is below the least that these decision layers cost.

    Attributes:
        least: the cost of one token at every decision.
    """

    def __init__(self, kind: str, least: float, limit: float):
        super().__init__(kind, least, limit)
        self.least = least

    def __str__(self) -> str:
        kind, least, limit = self.args
        return f"{kind} must be {least} or more, which one token at every decision costs, got {limit}"


def keep_ratio(selected: int, visual_tokens: int) -> float:
    """A keep ratio that selects exactly `selected` of the visual tokens."""
    return min(1.0, (selected + 0.5) / visual_tokens)


def solve(
    config,
    decision_layers: Sequence[int],
    shape: str | Sequence[float] = "uniform",
    *,
    avg_tokens: float | None = None,
    flops: float | None = None,
    kv_bytes: float | None = None,
    visual_tokens: int = 576,
    text_tokens: int = 64,
    batch: int = 1,
    dtype: str | torch.dtype = "float16",
    action: str = "reroute",
    ranking: RankingLike = LAST_QUERY,
    positions: str = "original",
    reducer: ReducerLike | None = None,
    rankings: Sequence[RankingLike | None] | None = None,
    align: str | None = None,
    recycle: float = 0.0,
) -> Policy:
    """A policy of a given shape that comes close to a budget and never exceeds it, as `reroute_kernels.cost` counts.

    Each stage selects K = max(1, trunc(scale * shape)) tokens or one more. Of all scales, and all choices of stages
    with one more, the one closest to the budget is taken. If the budget admits everything, all tokens are selected.

    Args:
        config: whose decoder is costed, as in `reroute_kernels.cost.Decoder.of`.
        decision_layers: ascending.
        shape: how the K of the stages relate: `"uniform"`, all alike; `"pyramid"`, each half of the one before; or a
            positive number for each decision layer. Under `remove` it must not increase.
        avg_tokens: budget of visual tokens, mean over the layers. Exactly one budget must be given.
        flops: budget of FLOPs of the prefill, without the LM head.
        kv_bytes: budget of bytes that the prompt leaves in the cache, text included.
        visual_tokens, text_tokens, batch, dtype: of the prompt that is costed, as in `reroute_kernels.cost`.
        action, ranking, positions, reducer, align, recycle: as in `Policy`.
        rankings: one for each decision layer, as in `Stage`: None is `ranking`.

    Returns:
        The policy; `policy.budget` has the cost that it reached, and by how much it stays under the limit.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: not exactly one budget is given, or it is below the cost of one token at every decision; or an
            argument is out of range.
        NotImplementedError: the decoder has layers without full attention, or latent attention.

    >>> policy = solve("llava-1.5-7b", [3, 7, 15], "pyramid", avg_tokens=96)
    >>> [round(stage.keep, 4) for stage in policy.schedule], policy.budget.reached
    ([0.1901, 0.0946, 0.0495], 96.0)
    """
    kind, limit = _the_budget(avg_tokens=avg_tokens, flops=flops, kv_bytes=kv_bytes)
    decoder = Decoder.of(config)
    layers = _decision_layers(decision_layers, decoder)
    expect_one_of(action=(action, ACTIONS))
    parts = _shape(shape, len(layers), action)
    of_stages = _rankings(rankings, len(layers))
    most = surviving_tokens(reducer, visual_tokens)
    if most < 1:
        raise ValueError(f"visual_tokens must be 1 or more, got {visual_tokens}")

    def policy_of(counts: Sequence[int]) -> Policy:
        keeps = [keep_ratio(count, visual_tokens) for count in counts]
        stages = list(map(Stage, layers, keeps, of_stages))
        return Policy(stages, action, ranking, positions, reducer, align=align, recycle=recycle)

    def reached(counts: Sequence[int]) -> float:
        return getattr(cost(decoder, policy_of(counts), text_tokens, visual_tokens, batch, dtype), _COSTS[kind])

    least = reached([1] * len(layers))
    if not least <= limit:
        raise OverBudget(kind, least, limit)

    def at_scale(scale: Fraction) -> list[int]:
        return [min(most, max(1, int(scale * part))) for part in parts]

    # Scales at which some K grows; costs grow with them.
    scales = sorted({Fraction(count) / part for count in range(1, most + 1) for part in parts})
    largest = bisect_right(scales, limit, key=lambda scale: reached(at_scale(scale)))
    best = at_scale(scales[largest - 1])
    for scale in reversed(scales[:largest]):
        counts = at_scale(scale)
        if reached([min(most, count + 1) for count in counts]) <= reached(best):
            break  # nothing comes closer from here on
        for first in range(0, len(counts), _TOGETHER):
            before, together, after = counts[:first], counts[first : first + _TOGETHER], counts[first + _TOGETHER :]
            raised = [
                [*before, *(count + more for count, more in zip(together, mores, strict=True)), *after]
                for mores in product((0, 1), repeat=len(together))
            ]
            possible = [each for each in raised if max(each) <= most and (action != "remove" or _descends(each))]
            counts = max((each for each in possible if reached(each) <= limit), key=reached)
        best = max(best, counts, key=reached)
    return replace(policy_of(best), budget=Budget(kind, limit, reached(best)))


def solve_like(config, policy: Policy, **budget) -> Policy:
    """A policy like another one, with its keep ratios as the shape; budget and prompt as in `solve`."""
    return solve(
        config,
        [stage.layer for stage in policy.schedule],
        [stage.keep for stage in policy.schedule],
        action=policy.action,
        ranking=policy.ranking,
        positions=policy.positions,
        reducer=policy.reducer,
        rankings=[stage.ranking for stage in policy.schedule],
        align=policy.align,
        recycle=policy.recycle,
        **budget,
    )


def _the_budget(**given: float | None) -> tuple[str, float]:
    budgets = {kind: limit for kind, limit in given.items() if limit is not None}
    if len(budgets) != 1:
        raise ValueError(f"exactly one of {', '.join(given)} must be given, got {', '.join(budgets) or 'none'}")
    ((kind, limit),) = budgets.items()
    if isinstance(limit, bool) or not isinstance(limit, Real):
        raise TypeError(f"{kind} must be a number, got {limit!r}")
    if not math.isfinite(limit):
        raise ValueError(f"{kind} must be finite, got {limit!r}")
    return kind, limit


def _decision_layers(layers: Sequence[int], decoder: Decoder) -> list[int]:
    try:
        layers = [as_integer(layer) for layer in layers]
    except TypeError:
        raise TypeError(f"decision_layers must be a sequence of integers, got {layers!r}") from None
    if not layers or min(layers) < 0 or max(layers) >= decoder.layers or not _descends(layers[::-1], strictly=True):
        raise ValueError(
            f"decision_layers must hold at least one layer, ascending, from 0 to {decoder.layers - 1}, got {layers}"
        )
    return layers


def _shape(shape: str | Sequence[float], stages: int, action: str) -> list[Fraction]:
    if isinstance(shape, str) and shape in SHAPES:
        return [Fraction(1, 2**stage if shape == "pyramid" else 1) for stage in range(stages)]
    if isinstance(shape, str) or not isinstance(shape, Iterable):
        raise ValueError(f"shape must be one of {', '.join(map(repr, SHAPES))} or numbers, got {shape!r}")
    parts = list(shape)
    if len(parts) != stages or not all(isinstance(part, Real) and 0 < part < math.inf for part in parts):
        raise ValueError(f"shape must hold a positive number for each of {stages} decision layers, got {parts}")
    if action == "remove" and not _descends(parts):
        raise ValueError(f"shape must not increase under 'remove', got {parts}")
    return [Fraction(part) for part in parts]


def _rankings(rankings: Sequence[RankingLike | None] | None, stages: int) -> list[RankingLike | None]:
    if rankings is None:
        return [None] * stages
    if isinstance(rankings, str) or not isinstance(rankings, Iterable):
        raise TypeError(f"rankings must be a sequence of rankings, got {rankings!r}")
    given = list(rankings)
    if len(given) != stages:
        raise ValueError(f"rankings must hold a ranking or None for each of {stages} decision layers, got {given}")
    return given


def _descends(numbers: Sequence[float], strictly: bool = False) -> bool:
    return all(later < earlier or (later == earlier and not strictly) for earlier, later in pairwise(numbers))
