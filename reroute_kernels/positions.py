"""Positions of tokens as lists and as flags, by the operations, without a transfer to the host."""

from __future__ import annotations

import torch
from torch import Tensor

from . import ops


def flags_of(index: Tensor, length: int) -> Tensor:
    """(B, length) bool, true at the positions (B, S) that hold a token."""
    flags = torch.zeros(len(index), length, dtype=torch.bool, device=index.device)
    return ops.scatter_tokens_(flags, index, torch.ones_like(index, dtype=torch.bool))


def positions_of(flags: Tensor, most: int) -> Tensor:
    """(B, most) int64, the positions of flags (B, L) that are true, ascending, then -1; there must be no more."""
    keep = torch.zeros(len(flags), dtype=torch.int64, device=flags.device)
    scores = torch.zeros(flags.shape, dtype=torch.float32, device=flags.device)
    return ops.select_tokens(scores, torch.zeros_like(flags), flags, keep, most)
