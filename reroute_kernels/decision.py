"""A whole decision of any backend: its operations, one after the other."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .checks import check_rows


def route_tokens_by(rank_tokens: Callable, select_tokens: Callable, gather_tokens: Callable) -> Callable:
    """The function `route_tokens` of a backend that has these operations."""

    def route_tokens(
        query: Tensor,
        key: Tensor,
        cos: Tensor | None = None,
        sin: Tensor | None = None,
        key_mask: Tensor | None = None,
        query_index: Tensor | None = None,
        past_key: Tensor | None = None,
        past_mask: Tensor | None = None,
        *,
        scale: float | None = None,
        query_reduction: str = "mean",
        head_reduction: str = "mean",
        rotary_style: str = "rotate_half",
        pool: Tensor,
        pinned: Tensor,
        keep: Tensor,
        length: int,
        tensors: tuple[Tensor, ...],
        return_scores: bool = False,
    ) -> tuple:
        """See `reroute_kernels.ops.route_tokens`."""
        scores = rank_tokens(
            query,
            key,
            cos,
            sin,
            key_mask,
            query_index,
            past_key,
            past_mask,
            scale=scale,
            query_reduction=query_reduction,
            head_reduction=head_reduction,
            rotary_style=rotary_style,
        )
        index = select_tokens(scores, pool, pinned, keep, length)
        check_rows(tensors[:1], *scores.shape, scores.device)  # the others beside it
        result = index, gather_tokens(index, *tensors) if tensors else ()
        return (*result, scores) if return_scores else result

    return route_tokens
