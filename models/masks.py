"""Attention masks of a compact sequence, in the form that each attention implementation takes."""

from __future__ import annotations

import torch
from torch import Tensor

IMPLEMENTATIONS = ("eager", "sdpa")


def causal_mask(implementation: str, queries: int, keys: int, valid: Tensor | None, like: Tensor) -> Tensor | None:
    """Mask for queries that are the last of the keys.

    Args:
        implementation: `"eager"` or `"sdpa"`.
        queries, keys: their numbers.
        valid: (B, keys) bool, False at keys that hold no token; None where all do.
        like: a tensor with the dtype and the device of the hidden states.

    Returns:
        (B or 1, 1, queries, keys), boolean for sdpa and additive for eager; None where the implementation needs none.
    """
    if valid is None and (queries == 1 or (implementation == "sdpa" and queries == keys)):
        return None
    places = torch.arange(keys, device=like.device)
    allowed = (places <= places[keys - queries :, None])[None, None]
    if valid is not None:
        allowed = allowed & valid.to(like.device)[:, None, None, :]
    if implementation == "sdpa":
        return allowed
    return torch.zeros(allowed.shape, dtype=like.dtype, device=like.device).masked_fill_(
        ~allowed, torch.finfo(like.dtype).min
    )
