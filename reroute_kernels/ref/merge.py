"""Average the tokens of each group."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_merge


def merge_tokens(features: Tensor, assignment: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """See `reroute_kernels.ops.merge_tokens`."""
    check_merge(features, assignment, groups)
    is_member = (assignment >= 0) & (assignment < groups)
    samples, _, width = features.shape
    # An extra group of each sample holds the others, and is cut off.
    first = torch.arange(samples, device=features.device)[:, None] * (groups + 1)
    place = (first + torch.where(is_member, assignment, groups)).flatten()
    counts = place.new_zeros(samples * (groups + 1)).index_add_(0, place, torch.ones_like(place))
    total = features.new_zeros(samples * (groups + 1), width, dtype=torch.float32)
    total = total.index_add_(0, place, features.float().flatten(0, 1))
    counts, total = counts.view(samples, groups + 1)[:, :groups], total.view(samples, groups + 1, width)[:, :groups]
    return (total / counts.clamp(min=1)[:, :, None]).to(features.dtype), counts.contiguous()
