"""Policies as text, one grammar for Python, the command line, lmms-eval and vLLM.

A policy is the name of a preset, `model/method/avg_tokens` or `method/avg_tokens` if the model is known, with a
percentage in place of a number for methods that reduce videos, `flashvid/10%`; or a schedule: decision layers with
their keep ratios, `3:0.25,7:0.25`; or the path of a policy file. Before a schedule may stand `remove:`, if tokens that
are not selected are removed, `freeze:`, if they are frozen, `align-stage:` or `align-proxy:`, if deferred ones are
aligned when the next decision begins. Stages are joined by `,`, or by `+` if commas separate arguments.
"""

from __future__ import annotations

from .checks import expect_one_of
from .policy import ACTIONS, Policy, Stage
from .policy_file import load_policy, names_file
from .presets import MODELS, Preset, PublishedModel, layers_of, model_of, preset

_ALIGN = "align-"


def parse_schedule(text: str) -> tuple[Stage, ...]:
    """Stages of a schedule such as `3:0.25,7:0.25` or `3:0.25+7:0.25`: decision layers and keep ratios.

    Raises:
        ValueError: the text is no schedule, or a number is out of range.
    """
    return tuple(map(_parse_stage, text.replace("+", ",").split(",")))


def _parse_stage(text: str) -> Stage:
    try:
        layer, keep = text.split(":")
        parsed = int(layer), float(keep)
    except ValueError:
        raise ValueError(f"a stage is a layer and a keep ratio, such as 3:0.25, got {text!r}") from None
    return Stage(*parsed)


def parse_preset(text: str, model: str | None = None) -> Preset:
    """Name of a preset from `model/method/avg_tokens`, or from `method/avg_tokens` if its model is known.

    Raises:
        ValueError: the text has other parts.
    """
    parts = text.split("/")
    if len(parts) == 2 and model is not None:
        parts = [model, *parts]
    if len(parts) != 3:
        accepted = "model/method/avg_tokens" if model is None else "method/avg_tokens or model/method/avg_tokens"
        raise ValueError(f"a preset is {accepted}")
    model, method, tier = parts
    if tier.endswith("%"):
        return Preset(model, method, tier)
    if not tier.isdecimal():
        raise ValueError(f"avg_tokens must be an integer, or a percentage such as 10%, got {tier!r}")
    return Preset(model, method, int(tier))


def parse_policy(text: str, model: object = None) -> Policy:
    """Policy of a preset, a schedule or a file.

    Args:
        text: a preset (`llava-1.5-7b/reroute-fastv/192`, `qwen2.5-vl-7b/flashvid/10%`), a schedule (`3:0.25,7:0.25`,
            `remove:3:0.25`), or the path of a file, which ends with `.json` or exists.
        model: the model of the policy: the name of a published model, a transformers model or a configuration. Presets
            need no model's name then (`reroute-fastv/64`), and those named after a model with another number of layers
            are refused.

    Raises:
        TypeError: the text is no string.
        ValueError: the text is none of them, the preset is of another model, or the file holds no policy.
        OSError: the file cannot be read.
    """
    if not isinstance(text, str):
        raise TypeError(f"policy must be a string, got {text!r}")
    if names_file(text):
        return load_policy(text)
    try:
        return read_policy(text, model)
    except ValueError as error:
        raise ValueError(f"policy must be {_accepted(model)}, got {text!r}: {error}") from None


def _accepted(model: object) -> str:
    schedule = (
        "a schedule like 3:0.25,7:0.25 (remove:3:0.25 removes, freeze:3:0.25 freezes, align-stage:3:0.25 aligns) or a "
        "file like policy.json"
    )
    if model is None or (isinstance(model, str) and published_model(model) is None):
        return f"a preset like llava-1.5-7b/reroute-fastv/192, {schedule}"
    return f"a preset like reroute-fastv/192, {schedule}"


def read_policy(text: str, model: object = None) -> Policy:
    """As `parse_policy`, with errors that tell the reason alone, for callers that take other texts, too."""
    if names_file(text):
        return load_policy(text)
    if ":" in text:
        prefix, _, schedule = text.partition(":")
        if prefix.startswith(_ALIGN):
            return Policy(parse_schedule(schedule), align=prefix.removeprefix(_ALIGN))
        if prefix.isalpha():
            expect_one_of(action=(prefix, ACTIONS))
            return Policy(parse_schedule(schedule), prefix)
        return Policy(parse_schedule(text))
    if not isinstance(model, str | None) and text.count("/") == 1:
        _, method, tier = parse_preset(text, "")
        return preset(model, method, tier)
    known = published_model(model)
    name = parse_preset(text, None if known is None else known.name)
    policy = preset(*name)
    _check_layers(name, model)
    return policy


def published_model(model: object) -> PublishedModel | None:
    """The published model of this name, type and number of layers, if it is one."""
    if model is None or isinstance(model, str):
        return MODELS.get(model or "")
    return model_of(model)


def _check_layers(name: Preset, model: object) -> None:
    if model is None or (isinstance(model, str) and model not in MODELS):
        return
    layers, found = layers_of(name.model), layers_of(model)
    if found != layers:
        raise ValueError(f"presets of {name.model} are for {layers} decoder layers, and this model has {found}")


def is_plain(policy: Policy) -> bool:
    """Whether a policy has default rankings and positions and no reducer, so that `policy_text` says all of it."""
    stages = [Stage(stage.layer, stage.keep) for stage in policy.schedule]
    return bool(stages) and policy == Policy(stages, policy.action, align=policy.align)


def policy_text(policy: Policy) -> str:
    """Schedule of a policy as text; inverse of `parse_policy` if `is_plain(policy)`."""
    schedule = ",".join(f"{stage.layer}:{stage.keep!r}" for stage in policy.schedule)
    if policy.align is not None:
        return f"{_ALIGN}{policy.align}:{schedule}"
    return schedule if policy.action == "reroute" else f"{policy.action}:{schedule}"
