"""The policies that are compared: every method under `remove` and under `reroute`, at the same budget.

A budget is the average number of visual tokens per layer of FastV at one of the keep ratios in `KEEPS`. The decision
layers are the ones published for 32 layers, at the same depth of this decoder (half a layer is rounded up).
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import reroute_kernels as rk
from reroute_kernels.budget import keep_ratio, solve_like
from reroute_kernels.cost import Decoder, average_visual_tokens
from reroute_kernels.policy import Policy, Stage

from .checkpoint import CONFIG
from .scenes import GRID

ACTIONS = ("reroute", "remove")
VISUAL_TOKENS = GRID**2
KEEPS = (0.5, 0.25, 0.12, 0.06, 0.02)
"""Keep ratios of FastV that set the budgets; 1 is the model without routing."""

_RANKINGS = {
    "fastv": rk.rankings.LastQuery(),
    "all-text": rk.rankings.AllText(),
    "key-norm": rk.rankings.KeyNorm(),
    "random": rk.rankings.Random(),
    "uniform": rk.rankings.Uniform(),
}
METHODS = ("fastv", "pdrop", "nuwa", "all-text", "key-norm", "random", "uniform")
"""The first three as published; the others rank in FastV's place, the last two without looking."""


class Way(NamedTuple):
    """A way to run the model."""

    method: str
    """One of `METHODS`, or "unrouted"."""
    action: str
    keep: float

    @property
    def name(self) -> str:
        return self.method if self.method == "unrouted" else f"{self.action} {self.method} {self.keep:g}"


UNROUTED = Way("unrouted", "-", 1.0)


def ways() -> list[Way]:
    """All ways that are compared, the model without routing first."""
    return [UNROUTED, *(Way(method, action, keep) for method in METHODS for keep in KEEPS for action in ACTIONS)]


@functools.cache
def decoder() -> Decoder:
    """The grounding model's decoder, for costs."""
    from transformers import LlavaConfig

    return Decoder.of(LlavaConfig(**CONFIG))


def scaled(*layers: int) -> list[int]:
    """Decision layers of a decoder of 32 layers, at the same depth of this one."""
    return [math.floor(layer * CONFIG["text_config"]["num_hidden_layers"] / 32 + 0.5) for layer in layers]


def policy_of(way: Way) -> Policy | None:
    """The policy of a way to run the model; None without routing."""
    if way == UNROUTED:
        return None
    fastv = Policy([Stage(scaled(3)[0], way.keep)], "remove")
    budget = average_visual_tokens(fastv, decoder().layers, VISUAL_TOKENS)
    if way.method == "pdrop":
        layers = scaled(2, 7, 15, 23)
        shape = {"remove": (0.5965, 0.3558, 0.2123, 0.1266), "reroute": (0.4502, 0.4502, 0.2251, 0.1126)}[way.action]
        like = Policy([Stage(layer, keep) for layer, keep in zip(layers, shape, strict=True)], way.action)
        return solve_like(decoder(), like, avg_tokens=budget, visual_tokens=VISUAL_TOKENS)
    if way.method == "nuwa":
        return _nuwa(way.action, budget)
    layers = scaled(3) if way.action == "remove" else scaled(3, 7, 15, 23)
    return Policy([Stage(layer, way.keep) for layer in layers], way.action, _RANKINGS[way.method])


def _nuwa(action: str, budget: float) -> Policy:
    """Nüwa with as many anchors as the budget allows; a seventh as many tokens run from its second stage on."""
    layers = scaled(16) if action == "remove" else scaled(16, 23)
    ranking = rk.rankings.LastQuery(layer="previous")
    best = None
    for anchors in range(7, VISUAL_TOKENS + 1):
        reducer = rk.reducers.Nuwa(keep=anchors / VISUAL_TOKENS, per_cell=math.ceil(4 * anchors / VISUAL_TOKENS))
        stages = [Stage(layer, keep_ratio(round(anchors / 7), VISUAL_TOKENS)) for layer in layers]
        policy = Policy(stages, action, ranking, reducer=reducer)
        if average_visual_tokens(policy, decoder().layers, VISUAL_TOKENS) <= budget:
            best = policy
    return best
