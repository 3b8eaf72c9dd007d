"""What every launch needs: the right device, and rows laid out so that a kernel can address them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def on_device_of(tensor: Tensor) -> AbstractContextManager:
    """Makes the tensor's device current: Triton launches on the current device, whatever its pointers say."""
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return nullcontext()


def as_rows(tensor: Tensor) -> Tensor:
    """View (B, L, ...) as (B, L, W) with unit stride along W; copies only where the inner layout forces it."""
    rows = tensor.flatten(2) if tensor.ndim > 2 else tensor[:, :, None]
    return rows if rows.stride(2) == 1 or rows.shape[2] == 1 else rows.contiguous()
