"""A whole decision: the launches of the single operations, one after the other."""

from __future__ import annotations

from torch import Tensor

from .gather import gather_tokens
from .rank import rank_tokens
from .select import select_tokens


def route_tokens(
    *ranking: Tensor | None,
    pool: Tensor,
    pinned: Tensor,
    keep: Tensor,
    length: int,
    tensors: tuple[Tensor, ...],
    return_scores: bool = False,
    **ranking_options,
) -> tuple:
    """See `reroute_kernels.ops.route_tokens`."""
    scores = rank_tokens(*ranking, **ranking_options)
    index = select_tokens(scores, pool, pinned, keep, length)
    result = index, gather_tokens(index, *tensors)
    return (*result, scores) if return_scores else result
