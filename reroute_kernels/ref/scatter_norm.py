"""Write compact rows back to their places in the full sequence, and normalize all of its rows."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_norm
from .scatter import scatter_tokens_


def scatter_norm_tokens_(
    full: Tensor, index: Tensor | None, compact: Tensor | None, weight: Tensor, eps: float, *, one_plus: bool = False
) -> Tensor:
    """See `reroute_kernels.ops.scatter_norm_tokens_`."""
    check_norm(full, index, compact, weight)
    if index is not None and compact is not None:
        weight = weight.clone()  # as it is before the write, which may reach it
        scatter_tokens_(full, index, compact)
    return norm_tokens(full, weight, eps, one_plus)


def norm_tokens(full: Tensor, weight: Tensor, eps: float, one_plus: bool) -> Tensor:
    """RMSNorm of every row, contiguous."""
    values = full.float().contiguous()
    scaled = values * torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + eps)
    if one_plus:
        return (scaled * (1.0 + weight.float())).to(full.dtype)
    return weight * scaled.to(full.dtype)
