"""A whole decision: three launches where one program per sample can finish it, else those of the single operations."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gather import gather_tokens
from .launch import on_device_of
from .rank import Attention, reduced_attention
from .select import ONE_PROGRAM_TOKENS, select_in_one_program, select_tile, select_tokens


@triton.jit
def reduce_and_select(
    logits,  # [B, Q, Hq, L]
    split_max,  # [B, Q, Hq, splits]
    split_sum,  # [B, Q, Hq, splits]
    scores,  # [B, L] contiguous
    pool,  # [B, L]
    pinned,  # [B, L]
    keep,  # [B]
    index,  # [B, M] contiguous
    length,
    splits,
    index_length,
    stride_pool_b,
    stride_pool_l,
    stride_pinned_b,
    stride_pinned_l,
    QUERIES: tl.constexpr,
    HEADS: tl.constexpr,
    MAX_OVER_QUERIES: tl.constexpr,
    MAX_OVER_HEADS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    TILE: tl.constexpr,
    SELECT_TILE: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64)
    scores += sample * length
    for start in range(0, length, TILE):
        tokens = start + tl.arange(0, TILE)
        reduced = reduced_attention(
            logits,
            split_max,
            split_sum,
            sample,
            tokens,
            length,
            splits,
            QUERIES,
            HEADS,
            MAX_OVER_QUERIES,
            MAX_OVER_HEADS,
            BLOCK_HEADS,
            BLOCK_SPLITS,
            TILE,
        )
        tl.store(scores + tokens, reduced, mask=tokens < length)
    tl.debug_barrier()  # other threads of this program read the scores
    select_in_one_program(
        scores,
        pool + sample * stride_pool_b,
        pinned + sample * stride_pinned_b,
        keep + sample,
        index + sample * index_length,
        length,
        index_length,
        1,
        stride_pool_l,
        stride_pinned_l,
        SELECT_TILE,
    )


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
    batch, total = pool.shape
    if pool.numel() == 0 or (length == 0 and not return_scores):
        index = torch.full((batch, length), -1, dtype=torch.int64, device=key.device)
        result = index, gather_tokens(index, *tensors)
        return (*result, torch.empty(batch, total, device=key.device)) if return_scores else result
    attention = Attention(
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
    if attention.is_small and total <= ONE_PROGRAM_TOKENS and length > 0:
        scores = torch.empty(batch, total, dtype=torch.float32, device=key.device)
        index = torch.empty(batch, length, dtype=torch.int64, device=key.device)
        with on_device_of(key):
            reduce_and_select[(batch,)](
                attention.logits,
                attention.split_max,
                attention.split_sum,
                scores,
                pool,
                pinned,
                keep.contiguous(),
                index,
                total,
                attention.splits,
                length,
                *pool.stride(),
                *pinned.stride(),
                SELECT_TILE=select_tile(total),
                **attention.reduction,
            )
    else:
        scores = attention.scores()
        index = select_tokens(scores, pool, pinned, keep, length)
    result = index, gather_tokens(index, *tensors)
    return (*result, scores) if return_scores else result
