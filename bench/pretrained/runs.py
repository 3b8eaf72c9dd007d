"""The ways to run the pretrained decoder that are compared, fixed before any item of the comparison was asked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import NamedTuple

import reroute_kernels as rk
from reroute_kernels.budget import OverBudget, solve_like
from reroute_kernels.cost import Decoder

from .passages import TOKENS

BUDGETS = (1 / 2, 1 / 3, 2 / 9, 1 / 6, 1 / 9)
"""Shares of the visual tokens that run in a layer, mean over the layers; a third, two ninths and a ninth are the
published 192, 128 and 64 of 576."""
SOME_BUDGETS = (1 / 3, 2 / 9, 1 / 9)
"""Budgets of the additions."""
METHODS = ("fastv", "pdrop")
PAPER = "reroute"
QUESTION_TOKENS = 16
"""Text tokens of a prompt that is costed."""


class Run(NamedTuple):
    """A way to run the model."""

    method: str
    """One of `METHODS`, or `"unrouted"`."""
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


def published(config: object, method: str, way: str, budget: float) -> rk.Policy:
    """FastV or PyramidDrop as the paper removes and reroutes, at the same relative depths, solved for a budget."""
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


def policies(config: object, calibrated: tuple[int, ...]) -> dict[Run, rk.Policy | None]:
    """Every run with its policy, None for the unrouted model.

    Args:
        config: of the model.
        calibrated: decision layers found by calibration on other items.
    """
    decoder = Decoder.of(config)
    found: dict[Run, rk.Policy | None] = {UNROUTED: None}
    for budget in BUDGETS:
        for method in METHODS:
            for way in ("remove", PAPER):
                found[Run(method, way, budget)] = published(config, method, way, budget)
    for budget in SOME_BUDGETS:
        paper = found[Run("fastv", PAPER, budget)]
        assert paper is not None
        for name, of in ADDITIONS.items():
            policy = of(decoder, paper, calibrated)
            if policy is not None:
                found[Run("fastv", name, budget)] = policy
    return found
