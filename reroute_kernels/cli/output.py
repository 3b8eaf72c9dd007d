"""Policies and their costs as commands print them, for people and as JSON."""

from __future__ import annotations

from dataclasses import fields

from ..calibration import Calibration
from ..cost import Cost
from ..notation import policy_text
from ..policy import Budget, Policy
from ..presets import Preset
from ..roofline import decode_seconds, prefill_seconds


def policy_python(policy: Policy) -> str:
    """A line of Python that builds such a policy."""
    schedule = ", ".join(f"rk.Stage({stage.layer}, {stage.keep!r})" for stage in policy.schedule)
    align = "" if policy.align is None else f', align="{policy.align}"'
    return f'policy = rk.Policy([{schedule}], "{policy.action}"{align})'


def budget_text(budget: Budget) -> str:
    """Text form of a budget: the limit and the figure reached."""
    reached, under, limit = (f"{value:,.12g}" for value in (budget.reached, budget.under, budget.limit))
    return f"{budget.kind}: reaches {reached}, which is {under} under the budget of {limit}"


def rule_text(rule: object) -> str:
    """A ranking or reducer by its name and its arguments that are not defaults."""
    values = {each: getattr(rule, each.name) for each in fields(rule)}
    unusual = [
        f"{each.name}={value:.4g}" if isinstance(value, float) else f"{each.name}={value}"
        for each, value in values.items()
        if value != each.default
    ]
    return f"{type(rule).__name__}({', '.join(unusual)})"


def preset_dict(name: Preset, policy: Policy, average: float) -> dict[str, object]:
    """A preset and the visual tokens that it averages, for JSON."""
    return name._asdict() | {"average_visual_tokens": average, "policy": policy.to_dict()}


def cost_dict(name: str, policy: Policy | None, cost: Cost, gpu: str | None = None) -> dict[str, object]:
    """Cost of a policy as JSON values, with estimates of seconds if a GPU is given."""
    told = {
        "name": name,
        "policy": policy and policy.to_dict(),
        "cost": cost.as_dict(),
        "next_token_flops": next_token_flops(cost),
    }
    if gpu is not None:
        seconds = {"prefill_seconds": prefill_seconds(cost, gpu), "decode_seconds": decode_seconds(cost, gpu)}
        told["estimate"] = {"gpu": gpu, **seconds}
    return told


def solution_dict(policy: Policy) -> dict[str, object]:
    """A solved policy, for JSON."""
    return {
        "policy": policy.to_dict(),
        "budget": policy.budget._asdict() | {"under": policy.budget.under},
        "text": policy_text(policy),
        "python": policy_python(policy),
    }


def calibration_dict(calibration: Calibration, policy: Policy) -> dict[str, object]:
    """A calibration and the policy that was solved from it, for JSON."""
    layers = [stage.layer for stage in policy.schedule]
    return {
        "calibration": calibration.to_dict(),
        "objective": calibration.objective(layers),
        **solution_dict(policy),
    }


def next_token_flops(cost: Cost) -> int:
    """FLOPs of the first decode step after the prompt."""
    return cost.decode_flops(cost.text_tokens + cost.visual_tokens)
