"""A whole decision of any backend: its operations, one after the other."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .attention import Attention, takes_attention
from .checks import check_rows


def route_tokens_by(rank_tokens: Callable, select_tokens: Callable, gather_tokens: Callable) -> Callable:
    """The function `route_tokens` of a backend that has these operations."""

    @takes_attention
    def route_tokens(
        attention: Attention,
        pool: Tensor,
        pinned: Tensor,
        keep: Tensor,
        length: int,
        tensors: tuple[Tensor, ...],
        return_scores: bool = False,
    ) -> tuple:
        """See `reroute_kernels.ops.route_tokens`."""
        scores = rank_tokens(attention)
        index = select_tokens(scores, pool, pinned, keep, length)
        batch, total = scores.shape
        check_rows(tensors[:1], batch, total, scores.device)  # the others beside it
        result = index, gather_tokens(index, *tensors) if tensors else ()
        return (*result, scores) if return_scores else result

    return route_tokens
