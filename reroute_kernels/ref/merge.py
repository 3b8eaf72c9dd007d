"""Average the tokens of each group."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_merge


def merge_tokens(features: Tensor, assignment: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """See `reroute_kernels.ops.merge_tokens`."""
    check_merge(features, assignment, groups)
    is_member = (assignment >= 0) & (assignment < groups)
    place = torch.where(is_member, assignment, groups)  # an extra group holds the others, and is cut off
    counts = place.new_zeros(len(place), groups + 1).scatter_add(1, place, torch.ones_like(place))[:, :groups]
    columns = place[:, :, None].expand(-1, -1, features.shape[2])
    total = features.new_zeros(len(place), groups + 1, features.shape[2], dtype=torch.float32)
    total = total.scatter_add(1, columns, features.float())[:, :groups]
    return (total / counts.clamp(min=1)[:, :, None]).to(features.dtype), counts.contiguous()
