"""Compact per-token tensors to the rows of a kept index."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_gather


def gather_tokens(index: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """See `reroute_kernels.ops.gather_tokens`."""
    check_gather(index, tensors)
    if not tensors:
        return ()
    length = tensors[0].shape[1]
    if length == 0:
        return tuple(tensor.new_zeros(*index.shape, *tensor.shape[2:]) for tensor in tensors)
    filler = (index < 0) | (index >= length)
    row = index.masked_fill(filler, 0)
    if index.shape[0] > 1:
        row = row + length * torch.arange(index.shape[0], device=index.device)[:, None]
    row = row.flatten()

    def compact(tensor: Tensor) -> Tensor:
        expanded_filler = filler.view(*filler.shape, *(1,) * (tensor.ndim - 2))
        rows = tensor.flatten(0, 1).index_select(0, row).unflatten(0, index.shape)
        return rows.masked_fill_(expanded_filler, 0)

    return tuple(compact(tensor) for tensor in tensors)
