"""A whole decision of any backend: its signature, and its operations one after the other."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .attention import Attention, takes_attention
from .checks import check_rows
from .memory import Memory

Decide = Callable[..., tuple[Tensor, tuple[Tensor, ...], Tensor]]
"""From an `Attention`, pool, pinned, keep, length, tensors, memory: the kept index, the compacted tensors, scores."""


def route_tokens_by(decide: Decide) -> Callable:
    """The function `route_tokens` of a backend that decides so."""

    @takes_attention
    def route_tokens(
        attention: Attention,
        pool: Tensor,
        pinned: Tensor,
        keep: Tensor,
        length: int,
        tensors: tuple[Tensor, ...],
        return_scores: bool = False,
        memory: Memory | None = None,
    ) -> tuple:
        """See `reroute_kernels.ops.route_tokens`."""
        result = decide(attention, pool, pinned, keep, length, tensors, memory)
        return result if return_scores else result[:2]

    return route_tokens


def in_steps(rank_tokens: Callable, select_tokens: Callable, gather_tokens: Callable) -> Decide:
    """A decision by these operations, one after the other."""

    def decide(attention, pool, pinned, keep, length, tensors, memory):
        scores = rank_tokens(attention)
        index = select_tokens(scores, pool, pinned, keep, length, memory)
        if memory is not None:
            index, scores = index
        batch, total = scores.shape
        check_rows(tensors[:1], batch, total, scores.device)  # the others beside it
        return index, gather_tokens(index, *tensors) if tensors else (), scores

    return decide
