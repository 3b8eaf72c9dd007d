"""PEFT's activated LoRA, whose layers count the tokens that they act on from the end of every row."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn


def activated_counts(model: nn.Module, decoder: nn.Module) -> list[int] | None:
    """How many tokens at the end of each row PEFT's layers act on in this call; None if PEFT does not count tokens.

    Args:
        model: the transformers model, which PEFT has told of its adapters.
        decoder: the decoder in that model.
    """
    configs = getattr(model, "peft_config", None) or {}
    if not any(getattr(config, "alora_invocation_tokens", None) for config in configs.values()):
        return None
    # PEFT hands the counts to its layers by hooks, which are there while it calls the model. The last hook holds the
    # counts of this call: a call that failed leaves its hook behind.
    for module in decoder.modules():
        for hook in reversed(module._forward_pre_hooks.values()):
            if isinstance(hook, partial) and hook.keywords.get("alora_offsets") is not None:
                return [count or 0 for count in hook.keywords["alora_offsets"]]
    return None


def activated_visual(visual: Tensor, counts: list[int]) -> Tensor:
    """How many visual tokens are among the last `counts` tokens of their rows; visual: (B, L) bool."""
    batch, length = visual.shape
    if len(counts) != batch:
        raise ValueError(f"alora_offsets must hold a number for each of {batch} samples, got {len(counts)}")
    first = length - torch.tensor(counts, device=visual.device)
    return (visual & (torch.arange(length, device=visual.device) >= first[:, None])).sum()
