"""Policies and their costs as the command line takes and prints them."""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path

from .budget import SHAPES
from .cost import DECODERS, Cost, Decoder
from .policy import ACTIONS, Budget, Policy, Stage
from .presets import MODELS, Preset, preset

ARCHITECTURES = {
    "llava-1.5-7b": "LlavaForConditionalGeneration",
    "qwen2.5-vl-7b": "Qwen2_5_VLForConditionalGeneration",
}
"""The class in transformers and vLLM of each of `MODELS`."""


def parse_schedule(text: str) -> tuple[Stage, ...]:
    """Stages of a schedule such as `3:0.25,7:0.25`: decision layers and keep ratios.

    Raises:
        ValueError: the text is no schedule, or a number is out of range.
    """
    stages = [stage.split(":") for stage in text.split(",")]
    return tuple(Stage(int(layer), float(keep)) for layer, keep in stages)


def parse_preset(text: str, model: str | None = None) -> Preset:
    """The name `model/method/avg_tokens` of a preset, or `method/avg_tokens` where its model is known.

    Raises:
        ValueError: the text has other parts.
    """
    parts = text.split("/")
    if len(parts) == 2 and model is not None:
        parts = [model, *parts]
    if len(parts) != 3:
        raise ValueError("a preset has three parts, model/method/avg_tokens")
    model, method, tier = parts
    return Preset(model, method, int(tier))


def parse_policy(text: str, model: str | None = None) -> Policy:
    """A preset, or a schedule; under `remove` where the schedule has `remove:` before it.

    Args:
        text: as `parse_preset` or `parse_schedule` takes it.
        model: whose presets may be named without it, if it is one of `presets.MODELS`.

    Raises:
        ValueError: the text is neither.
    """
    try:
        if ":" not in text:
            return preset(*parse_preset(text, model if model in MODELS else None))
        prefix, _, schedule = text.partition(":")
        action, schedule = (prefix, schedule) if prefix in ACTIONS else ("reroute", text)
        return Policy(parse_schedule(schedule), action)
    except ValueError as error:
        example = "reroute-fastv/192" if model in MODELS else "llava-1.5-7b/reroute-fastv/192"
        raise ValueError(
            f"policy must be a preset like {example} or a schedule like 3:0.25,7:0.25 (remove:3:0.25 removes), "
            f"got {text!r}: {error}"
        ) from None


def parse_decoder(text: str) -> Decoder:
    """A decoder by its name, or by the configuration of a checkpoint folder or hub id.

    Raises:
        ModuleNotFoundError: the text is no known name, and transformers is missing.
        ValueError: there is no such configuration, or its decoder cannot be costed.
    """
    if text in DECODERS:
        return DECODERS[text]
    config = _checkpoint_config(text, ", ".join(DECODERS))
    try:
        return Decoder.of(config)
    except Exception as error:
        raise _no_model(text, ", ".join(DECODERS), error) from None


def _checkpoint_config(text: str, names: str):
    """The configuration of a checkpoint folder or hub id, where the text is none of the names."""
    if "/" not in text and not Path(text).is_dir():  # mistyped: nothing to ask the hub for
        raise _no_model(text, names)
    from transformers import AutoConfig

    try:
        # Without the second argument, transformers asks whether to run code that comes with a checkpoint.
        return AutoConfig.from_pretrained(text, trust_remote_code=False)
    except Exception as error:
        raise _no_model(text, names, error) from None


def _no_model(text: str, names: str, error: Exception | None = None) -> ValueError:
    reason = "" if error is None else f": {first_line(error)}"
    accepted = f"{names}, or the folder or hub id (owner/name) of a checkpoint"
    return ValueError(f"model must be {accepted}, got {text!r}{reason}")


def parse_architecture(text: str) -> str:
    """The class in transformers and vLLM of a model with presets, or of a checkpoint folder or hub id.

    Raises:
        ModuleNotFoundError: the text is no known name, and transformers is missing.
        ValueError: there is no such configuration, or it names no class.
    """
    if text in ARCHITECTURES:
        return ARCHITECTURES[text]
    architectures = _checkpoint_config(text, ", ".join(ARCHITECTURES)).architectures
    if not architectures:
        raise ValueError(f"model must have a configuration that names its architecture, got {text!r}")
    return architectures[0]


def parse_layers(text: str) -> list[int]:
    """Decision layers such as `3,7,15`.

    Raises:
        ValueError: the text is no list of integers.
    """
    try:
        return [int(layer) for layer in text.split(",")]
    except ValueError:
        raise ValueError(f"layers must be integers such as 3,7,15, got {text!r}") from None


def parse_shape(text: str) -> str | list[float]:
    """A shape as `solve` takes it: its name, or numbers such as `1,.5,.25`.

    Raises:
        ValueError: the text is neither.
    """
    try:
        return text if text in SHAPES else [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"shape must be {', '.join(SHAPES)} or numbers such as 1,.5,.25, got {text!r}") from None


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def policy_text(policy: Policy) -> str:
    """Inverse of `parse_policy`, for policies with the default ranking and positions and no reducer."""
    schedule = ",".join(f"{stage.layer}:{stage.keep!r}" for stage in policy.schedule)
    return schedule if policy.action == "reroute" else f"{policy.action}:{schedule}"


def policy_python(policy: Policy) -> str:
    """A line of Python that builds such a policy."""
    schedule = ", ".join(f"rk.Stage({stage.layer}, {stage.keep!r})" for stage in policy.schedule)
    return f'policy = rk.Policy([{schedule}], "{policy.action}")'


def budget_text(budget: Budget) -> str:
    """Text form of a budget: the limit and the figure reached."""
    reached, under, limit = (f"{value:,.12g}" for value in (budget.reached, budget.under, budget.limit))
    return f"{budget.kind}: reaches {reached}, which is {under} under the budget of {limit}"


def rule_text(rule: object) -> str:
    """A ranking or reducer by its name and what is not a default in it; `-` for none."""
    if rule is None:
        return "-"
    values = {each: getattr(rule, each.name) for each in fields(rule)}
    unusual = [
        f"{each.name}={value:.4g}" if isinstance(value, float) else f"{each.name}={value}"
        for each, value in values.items()
        if value != each.default
    ]
    return f"{type(rule).__name__}({', '.join(unusual)})"


def policy_dict(policy: Policy) -> dict[str, object]:
    """A policy whose ranking and reducer are of this library, as plain values, for JSON."""
    rules = {"ranking": policy.ranking, "reducer": policy.reducer}
    return {
        "schedule": [asdict(stage) for stage in policy.schedule],
        "action": policy.action,
        "positions": policy.positions,
        **{name: rule and {"name": type(rule).__name__, **asdict(rule)} for name, rule in rules.items()},
    }


def preset_dict(name: Preset, policy: Policy, average: float) -> dict[str, object]:
    """A preset and the visual tokens that it averages, for JSON."""
    return name._asdict() | {"average_visual_tokens": average, "policy": policy_dict(policy)}


def cost_dict(name: str, policy: Policy | None, cost: Cost) -> dict[str, object]:
    """Cost of a policy as JSON values."""
    policy = policy and policy_dict(policy)
    return {"name": name, "policy": policy, "cost": cost.as_dict(), "next_token_flops": next_token_flops(cost)}


def solution_dict(policy: Policy) -> dict[str, object]:
    """A solved policy, for JSON."""
    return {
        "policy": policy_dict(policy),
        "budget": policy.budget._asdict() | {"under": policy.budget.under},
        "text": policy_text(policy),
        "python": policy_python(policy),
    }


def next_token_flops(cost: Cost) -> int:
    """FLOPs of the first decode step after the prompt."""
    return cost.decode_flops(cost.text_tokens + cost.visual_tokens)
