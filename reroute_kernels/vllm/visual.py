"""The visual tokens of a request, from the features that vLLM holds of it."""

from __future__ import annotations

from .plan import Plan


def visual_stretches(features) -> list[tuple[int, int]]:
    """First and last position of every stretch of image or video tokens, from a request's `mm_features`."""
    return [stretch for feature in features for stretch in feature.mm_position.extract_embeds_range()]


def opts_out(sampling) -> bool:
    """Whether a request asks not to be routed, by `extra_args` of its sampling parameters (`vllm_xargs` over HTTP)."""
    return option_of(sampling) == "off"


def option_of(sampling) -> object:
    """The option `reroute` of a request: `"on"`, the default, or `"off"`; `metrics.check_request` refuses others."""
    return (getattr(sampling, "extra_args", None) or {}).get("reroute", "on")


def deferred_of(plan: Plan, features, prompt: int, sampling=None) -> tuple[int, ...]:
    """Number of tokens that each stage leaves out of a request.

    Args:
        plan: of the engine.
        features: of the request, as vLLM holds them.
        prompt: its length.
        sampling: its sampling parameters, with which it may opt out.
    """
    stretches = [] if opts_out(sampling) else visual_stretches(features)
    visual = sum(last - first + 1 for first, last in stretches)
    return plan.deferred(visual, any(last == prompt - 1 for _, last in stretches))
