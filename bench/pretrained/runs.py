"""The ways to run the pretrained decoder that are compared, fixed before any item of the comparison was asked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import reroute_kernels as rk
from reroute_kernels.budget import OverBudget, solve_like
from reroute_kernels.cost import Decoder

from .passages import TOKENS

PAPER = "reroute"
LATE = (14, 17, 19, 21)
"""Decision layers of the schedule `late`: the first plan's calibration found that layers before the 14th rank by
chance. Removing decides at the first of them, as FastV does, and rerouting at all."""
QUESTION_TOKENS = 16
"""Text tokens of a prompt that is costed."""


class Run(NamedTuple):
    """A way to run the model."""

    method: str
    """`"fastv"`, `"pdrop"`, `"late"`, or `"unrouted"`."""
    way: str
    """`"remove"`, `PAPER` or one of `ADDITIONS`; `"-"` without routing."""
    budget: float

    @property
    def name(self) -> str:
        return f"{self.method} {self.way} {self.budget:.4f}"


UNROUTED = Run("unrouted", "-", 1.0)


def solved(decoder: Decoder, policy: rk.Policy, budget: float) -> rk.Policy:
    """A policy of the same shape at a budget, which is a share of the visual tokens."""
    return solve_like(decoder, policy, avg_tokens=budget * TOKENS, visual_tokens=TOKENS)


def scheduled(config: object, method: str, way: str, budget: float) -> rk.Policy:
    """A schedule as the paper removes and reroutes, solved for a budget.

    Those of FastV and PyramidDrop are at the published relative depths.
    """
    if method == "late":
        layers, action = (LATE[:1], "remove") if way == "remove" else (LATE, "reroute")
        return rk.solve(Decoder.of(config), layers, avg_tokens=budget * TOKENS, visual_tokens=TOKENS, action=action)
    name = method if way == "remove" else f"reroute-{method}"
    return solved(Decoder.of(config), rk.preset(config, name, 576 * budget), budget)


def _frozen(decoder: Decoder, policy: rk.Policy) -> rk.Policy | None:
    """The policy that freezes, with fewer tokens at each decision, at the FLOPs of this one; None if none fits."""
    prompt = {"visual_tokens": TOKENS, "text_tokens": QUESTION_TOKENS}
    flops = rk.cost(decoder, policy, **prompt).prefill_flops
    try:
        return solve_like(decoder, replace(policy, action="freeze"), flops=flops, **prompt)
    except OverBudget:
        return None


ADDITIONS: Mapping[str, Callable[[Decoder, rk.Policy, tuple[int, ...]], rk.Policy | None]] = {
    "memory 0.3": lambda decoder, policy, layers: replace(policy, ranking=rk.rankings.Remembered(policy.ranking, 0.3)),
    "no position": lambda decoder, policy, layers: replace(policy, ranking=rk.rankings.LastQuery(rotary=False)),
    "mixed 0.2": lambda decoder, policy, layers: replace(policy, ranking=rk.rankings.Mixed(policy.ranking, 0.2)),
    'align="stage"': lambda decoder, policy, layers: replace(policy, align="stage"),
    'align="proxy"': lambda decoder, policy, layers: replace(policy, align="proxy"),
    "freeze, same FLOPs": lambda decoder, policy, layers: _frozen(decoder, policy),
    "calibrated layers": lambda decoder, policy, layers: rk.solve(
        decoder, layers, avg_tokens=policy.budget.reached, visual_tokens=TOKENS
    ),
}
"""Additions to the paper's rerouting: from the decoder, the paper's policy, and the calibrated layers."""


@dataclass(frozen=True)
class Plan:
    """A comparison, fixed before any of its items is asked."""

    name: str
    seed: int
    """Of its items."""
    methods: tuple[str, ...]
    budgets: tuple[float, ...]
    """Shares of the visual tokens that run in a layer, mean over the layers."""
    additions: tuple[str, ...]
    """Those of `ADDITIONS` that are compared, on the schedule of FastV."""
    some_budgets: tuple[float, ...]
    """Budgets of the additions."""


FIRST = Plan(
    name="first",
    seed=0,
    methods=("fastv", "pdrop"),
    budgets=(1 / 2, 1 / 3, 2 / 9, 1 / 6, 1 / 9),
    additions=tuple(ADDITIONS),
    some_budgets=(1 / 3, 2 / 9, 1 / 9),
)
"""At budgets as in docs/grounding.md; a third, two ninths and a ninth are the published 192, 128 and 64 of 576."""
SECOND = Plan(
    name="second",
    seed=2,
    methods=("fastv", "late"),
    budgets=(0.9, 0.75, 0.6),
    additions=("memory 0.3", "no position", 'align="stage"', 'align="proxy"', "freeze, same FLOPs"),
    some_budgets=(0.75, 0.6),
)
"""At larger budgets, on new items."""
PLANS = (FIRST, SECOND)


def policies(config: object, calibrated: tuple[int, ...], plan: Plan) -> dict[Run, rk.Policy | None]:
    """Every run of a plan with its policy, None for the unrouted model.

    Args:
        config: of the model.
        calibrated: decision layers found by calibration on other items.
        plan: the comparison.
    """
    decoder = Decoder.of(config)
    found: dict[Run, rk.Policy | None] = {UNROUTED: None}
    for budget in plan.budgets:
        for method in plan.methods:
            for way in ("remove", PAPER):
                found[Run(method, way, budget)] = scheduled(config, method, way, budget)
    for budget in plan.some_budgets:
        paper = found[Run("fastv", PAPER, budget)]
        assert paper is not None
        for name in plan.additions:
            policy = ADDITIONS[name](decoder, paper, calibrated)
            if policy is not None:
                found[Run("fastv", name, budget)] = policy
    return found
