"""Pick the highest scored candidates and list every token that runs, in order."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_selection


def select_tokens(scores: Tensor, pool: Tensor, pinned: Tensor, keep: Tensor, length: int) -> Tensor:
    """See `reroute_kernels.ops.select_tokens`."""
    check_selection(scores, pool, pinned, keep, length)
    batch, total = scores.shape
    candidates = pool & ~pinned
    positions = torch.arange(total, device=scores.device).expand(batch, total)

    # Stable sorts, least significant first: the position breaks ties of the score, a NaN ranks below every number, and
    # tokens that are no candidates come last. Adding 0.0 turns -0.0 into 0.0, which some sorts tell apart.
    is_number = ~scores.isnan()
    order = (scores + 0.0).masked_fill(~is_number, -torch.inf).sort(dim=1, descending=True, stable=True).indices
    standing = candidates.to(torch.int8) * 2 + is_number.to(torch.int8)
    order = order.gather(1, standing.gather(1, order).sort(dim=1, descending=True, stable=True).indices)
    place = torch.empty_like(order).scatter_(1, order, positions)

    kept = pinned | (candidates & (place < keep[:, None]))
    index = positions.masked_fill(~kept, total).sort(dim=1).values[:, :length]
    index = index.masked_fill(index == total, -1)
    return torch.nn.functional.pad(index, (0, length - index.shape[1]), value=-1)
