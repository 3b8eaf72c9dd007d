"""Pick the highest scored candidates and list every token that runs, in order."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..checks import check_selection
from ..memory import Memory


def select_tokens(
    scores: Tensor, pool: Tensor, pinned: Tensor, keep: Tensor, length: int, memory: Memory | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """See `reroute_kernels.ops.select_tokens`."""
    check_selection(scores, pool, pinned, keep, length, memory)
    if memory is None:
        return _selected(scores, pool, pinned, keep, length)
    scores = _with_memory(scores, pool, memory)
    return _selected(scores, pool, pinned, keep, length), scores


def _with_memory(scores: Tensor, pool: Tensor, memory: Memory) -> Tensor:
    """(B, L) float32, the share of each token in its pool's sum, and `decay` times what is remembered of it.

    In float64 the order of the sum does not show in float32.
    """
    total = scores.masked_fill(~pool, 0.0).sum(dim=1, keepdim=True, dtype=torch.float64).float()
    is_usable = (total > 0) & total.isfinite()
    shares = (scores / total).masked_fill(~is_usable, 0.0)
    if memory.scores is None:
        return shares
    before = memory.scores
    if memory.places is not None:
        length = before.shape[1]
        is_known = (memory.places >= 0) & (memory.places < length)
        # A column of zeros stands for tokens of which nothing is remembered.
        before = pad(before, (0, 1)).gather(1, torch.where(is_known, memory.places, length))
    return shares + memory.decay * before


def _selected(scores: Tensor, pool: Tensor, pinned: Tensor, keep: Tensor, length: int) -> Tensor:
    total = scores.shape[1]
    if total == 0:
        return listed(pinned, length)
    candidates = pool & ~pinned

    # A candidate is selected if its place in the order, which no two share, is that of the K-th or before.
    order = order_of(scores, candidates)
    last = order.sort(dim=1, descending=True).values.gather(1, (keep[:, None].long() - 1).clamp(0, total - 1))
    return listed(pinned | (candidates & (order >= last) & (keep[:, None] > 0)), length)


def listed(kept: Tensor, length: int) -> Tensor:
    """(B, M) int64, the first `length` positions of each row of `kept` (B, L) bool, then -1."""
    batch, total = kept.shape
    # Tokens beyond the last column go to one that is cut off.
    place = (kept.cumsum(dim=1) - 1).masked_fill_(~kept, length).clamp_(max=length)
    index = torch.full((batch, length + 1), -1, device=kept.device)
    positions = torch.arange(total, device=kept.device)
    return index.scatter_(1, place, positions.expand(batch, total))[:, :length].contiguous()


def order_of(scores: Tensor, candidates: Tensor) -> Tensor:
    """(B, L) int64, larger for what is selected first: by score, then by the smaller position; others come last.

    A NaN ranks below every number. The bits of a float32 are in its order, for negative ones but the sign in reverse.
    """
    total = scores.shape[1]
    bits = (scores + 0.0).view(torch.int32).long()  # adding 0.0 turns -0.0 into 0.0
    order = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    order = order.masked_fill_(scores.isnan(), -(2**32)).masked_fill_(~candidates, -(2**33))
    return order * total + torch.arange(total - 1, -1, -1, device=scores.device)
