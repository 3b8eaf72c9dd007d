"""The visual tokens of a request, from the features that vLLM holds of it."""

from __future__ import annotations

from .plan import Plan


def visual_stretches(features) -> list[tuple[int, int]]:
    """First and last position of every stretch of image or video tokens, from a request's `mm_features`."""
    return [stretch for feature in features for stretch in feature.mm_position.extract_embeds_range()]


def deferred_of(plan: Plan, features, prompt: int) -> tuple[int, ...]:
    """Number of tokens that each stage leaves out of a request, from its features and its prompt's length."""
    stretches = visual_stretches(features)
    visual = sum(last - first + 1 for first, last in stretches)
    return plan.deferred(visual, any(last == prompt - 1 for _, last in stretches))
