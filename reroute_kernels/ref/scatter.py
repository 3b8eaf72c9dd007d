"""Write compact rows back to their places in the full sequence."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_scatter, check_written


def scatter_tokens_(full: Tensor, index: Tensor, compact: Tensor) -> Tensor:
    """See `reroute_kernels.ops.scatter_tokens_`."""
    check_scatter(full, index, compact)
    check_written(full)
    batch, length = full.shape[:2]
    is_token = (index >= 0) & (index < length)
    row = index
    if batch > 1:
        row = index + length * torch.arange(batch, device=index.device)[:, None]
    row, rows = row.flatten(), compact.flatten(0, 1)
    tokens = is_token.flatten().nonzero()[:, 0]
    if tokens.shape[0] < row.shape[0]:
        row, rows = row[tokens], rows.index_select(0, tokens)
    if full.is_contiguous() and not torch._C._are_functorch_transforms_active():  # which have no rule for it
        row, rows = (_apart(x, full) for x in (row, rows))
        full.flatten(0, 1).index_copy_(0, row, rows)
    else:
        full[row // length, row % length] = rows
    return full


def _apart(tensor: Tensor, full: Tensor) -> Tensor:
    """The tensor, copied if it may lie in the memory that is written to."""
    return tensor.clone() if tensor.untyped_storage().data_ptr() == full.untyped_storage().data_ptr() else tensor
