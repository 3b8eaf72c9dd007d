"""The policies that the command `loyalty` compares, by name."""

from __future__ import annotations

from collections.abc import Sequence

from ..budget import OverBudget, solve_like
from ..notation import parse_policy
from ..policy import Policy
from ..presets import TIERS, VISUAL_TOKENS, layers_of, model_of, preset
from ..reduced import of_layers
from .arguments import check_layers

METHODS = ("fastv", "reroute-fastv", "pdrop", "reroute-pdrop")


def policies_of(config: object, texts: Sequence[str], keeps: Sequence[float]) -> dict[str, Policy]:
    """Policies by name: as given, or each solved for every budget.

    Args:
        config: of the model.
        texts: policies as `notation.parse_policy` takes them; none: `METHODS`, at every published tier, which is of
            the visual tokens of an image of the model, or at the one nearest to each budget.
        keeps: budgets: shares of the visual tokens that run in a layer, mean over the layers; none: as the policies
            are. They are solved at 576 visual tokens, whatever an image of the model has.

    Raises:
        TypeError, ValueError, OSError: a text is no policy of this model, or a budget cannot be kept.
    """
    for keep in keeps:
        if not 0 < keep <= 1:
            raise ValueError(f"keep must be in (0, 1], got {keep}")
    if not keeps:
        names = texts or [f"{method}/{tier}" for tier in TIERS for method in METHODS]
        return {name: _parsed(name, config) for name in names}
    found = {}
    for keep in keeps:
        tier = min(TIERS, key=lambda tier: abs(tier - keep * VISUAL_TOKENS))
        given = {text: _parsed(text, config) for text in texts} or {
            each: _at_tier(each, tier, config) for each in METHODS
        }
        for name, policy in given.items():
            text = name if texts else f"{name}/{tier}"
            found[f"{name} at {keep:g}"] = _solved(policy, text, keep, layers_of(config))
    return found


def _at_tier(method: str, tier: int, config: object) -> Policy:
    """A method at a tier of 576 tokens; published ones as they are."""
    return preset(config, method, tier, visual_tokens=None if model_of(config) else VISUAL_TOKENS)


def _parsed(text: str, config: object) -> Policy:
    policy = parse_policy(text, config)
    check_layers(policy, config)
    return policy


def _solved(policy: Policy, text: str, keep: float, layers: int) -> Policy:
    """A policy like this one that runs this share of the visual tokens."""
    decoder = of_layers(layers)
    try:
        return solve_like(decoder, policy, avg_tokens=keep * VISUAL_TOKENS, visual_tokens=VISUAL_TOKENS)
    except OverBudget as error:
        least = error.least / VISUAL_TOKENS
        raise ValueError(f"keep must be {least:.4g} or more for {text}, which one token costs, got {keep:g}") from None
