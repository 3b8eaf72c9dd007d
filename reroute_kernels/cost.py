"""What a policy costs, counted from its schedule."""

from __future__ import annotations

from .policy import Policy


def visual_tokens_per_layer(policy: Policy, num_layers: int, visual_tokens: int) -> list[int]:
    """Visual tokens that run in each decoder layer, which is also how many of them each layer caches.

    Args:
        policy: the policy.
        num_layers: decoder layers of the model.
        visual_tokens: visual tokens in the prompt of one sample.

    Returns:
        A list of `num_layers` counts.

    Raises:
        ValueError: a number is out of range, or the schedule has a layer that the model has not.
    """
    if num_layers < 1:
        raise ValueError(f"num_layers must be 1 or more, got {num_layers}")
    if visual_tokens < 0:
        raise ValueError(f"visual_tokens must be 0 or more, got {visual_tokens}")
    last = policy.schedule[-1].layer
    if last >= num_layers:
        raise ValueError(f"schedule must stay below layer {num_layers} of this model, got layer {last}")
    counts = [visual_tokens] * num_layers
    for stage, selected in zip(policy.schedule, policy.selected_counts(visual_tokens), strict=True):
        counts[stage.layer :] = [selected] * (num_layers - stage.layer)
    return counts


def average_visual_tokens(policy: Policy, num_layers: int, visual_tokens: int) -> float:
    """Mean over the decoder layers of the visual tokens that run; arguments as in `visual_tokens_per_layer`."""
    return sum(visual_tokens_per_layer(policy, num_layers, visual_tokens)) / num_layers
