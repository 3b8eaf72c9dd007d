"""Write compact rows back to their places in the full sequence, and add their mean change to waiting candidates."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_align, check_written


def align_tokens_(full: Tensor, index: Tensor, compact: Tensor, pool: Tensor) -> Tensor:
    """See `reroute_kernels.ops.align_tokens_`."""
    check_align(full, index, compact, pool)
    check_written(full)
    return full.copy_(aligned_tokens(full, index, compact, pool))


def aligned_tokens(full: Tensor, index: Tensor, compact: Tensor, pool: Tensor) -> Tensor:
    """The full sequence as it is written, in memory of its own."""
    length, width = full.shape[1:]
    is_token = (index >= 0) & (index < length)
    place = torch.where(is_token, index, length)  # an extra column holds what is no token, and is cut off
    extra = torch.nn.functional.pad(pool, (0, 1)), torch.nn.functional.pad(full, (0, 0, 0, 1))
    columns = place[:, :, None].expand(-1, -1, width)
    counts = extra[0].gather(1, place)  # [B, M]
    change = compact.float() - extra[1].gather(1, columns).float()
    total = torch.where(counts[:, :, None], change, 0.0).sum(dim=1)  # [B, d]
    mean = total / counts.sum(dim=1).clamp(min=1)[:, None]
    waits = extra[0].scatter(1, place, torch.zeros_like(is_token))
    followed = (extra[1].float() + mean[:, None]).to(full.dtype)
    return torch.where(waits[:, :, None], followed, extra[1]).scatter(1, columns, compact)[:, :length]
