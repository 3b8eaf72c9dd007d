"""Score tokens by the attention that a few queries pay to them, in two launches.

The first launch reads the key once, rotates it on the way, and writes the logits with the softmax statistics of every
split of the sequence; the second combines the splits and reduces over queries and heads.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ref.rank import last_queries
from .launch import on_device_of

# Tokens per split: fixed by the shape alone, so that results do not depend on the size of the device.
MIN_SPLIT = 128
MAX_SPLITS = 64
# Keys that a program holds at a time: 16 bytes a thread for either half of the channels, so that nothing spills.
TILE_BYTES = 4096


@triton.jit
def _rotated(x_ptr, cos_ptr, sin_ptr, mask, columns, HALF: tl.constexpr):
    """Low and high half of rotated channels; pointers stand at channel 0 of the rows that `mask` admits."""
    low = tl.load(x_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    high = tl.load(x_ptr + columns + HALF, mask=mask, other=0.0).to(tl.float32)
    low_cos = tl.load(cos_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    high_cos = tl.load(cos_ptr + columns + HALF, mask=mask, other=0.0).to(tl.float32)
    low_sin = tl.load(sin_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    high_sin = tl.load(sin_ptr + columns + HALF, mask=mask, other=0.0).to(tl.float32)
    return low * low_cos - high * low_sin, high * high_cos + low * high_sin


@triton.jit
def _nan_maximum(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def attention_logits(
    query,  # [B, Q, Hq, D]
    key,  # [B, L, Hkv, D]
    cos,  # [B, L, 2 * HALF]
    sin,  # [B, L, 2 * HALF]
    key_mask,  # [B, L]
    query_index,  # [B, Q]
    logits,  # [B, Q, Hq, L] contiguous
    split_max,  # [B, Q, Hq, splits] contiguous
    split_sum,  # [B, Q, Hq, splits] contiguous
    length,
    scale,
    stride_query_b,
    stride_query_q,
    stride_query_h,
    stride_key_b,
    stride_key_l,
    stride_key_h,
    stride_cos_b,
    stride_cos_l,
    stride_sin_b,
    stride_sin_l,
    stride_mask_b,
    stride_mask_l,
    QUERIES: tl.constexpr,
    GROUP: tl.constexpr,  # query heads per key head
    HALF: tl.constexpr,  # rotated channels / 2, 0 for no rotation
    REST: tl.constexpr,  # channels after the rotated ones
    HAS_MASK: tl.constexpr,
    SPLIT: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    split = tl.program_id(0)
    kv_head = tl.program_id(1).to(tl.int64)
    sample = tl.program_id(2).to(tl.int64)
    heads = tl.num_programs(1) * GROUP

    row_ids = tl.arange(0, BLOCK_ROWS)
    row_max = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_ROWS], tl.float32)
    half_columns = tl.arange(0, BLOCK_HALF)[None, :]
    rest_columns = 2 * HALF + tl.arange(0, BLOCK_REST)[None, :]
    half_mask = half_columns < HALF
    rest_mask = rest_columns < 2 * HALF + REST

    for start in range(split * SPLIT, min(split * SPLIT + SPLIT, length), TILE):
        tokens = start + tl.arange(0, TILE)
        in_sequence = tokens < length
        visible = in_sequence
        if HAS_MASK:
            mask_ptr = key_mask + sample * stride_mask_b + tokens.to(tl.int64) * stride_mask_l
            visible = visible & (tl.load(mask_ptr, mask=in_sequence, other=0) != 0)
        offsets = tokens.to(tl.int64)[:, None]
        key_rows = key + sample * stride_key_b + offsets * stride_key_l + kv_head * stride_key_h
        if HALF > 0:
            cos_rows = cos + sample * stride_cos_b + offsets * stride_cos_l
            sin_rows = sin + sample * stride_sin_b + offsets * stride_sin_l
            key_low, key_high = _rotated(
                key_rows, cos_rows, sin_rows, in_sequence[:, None] & half_mask, half_columns, HALF
            )
        if REST > 0:
            key_rest = tl.load(key_rows + rest_columns, mask=in_sequence[:, None] & rest_mask, other=0.0)
            key_rest = key_rest.to(tl.float32)

        for row in range(GROUP * QUERIES):
            query_number = tl.cast(row % QUERIES, tl.int64)
            head = kv_head * GROUP + row // QUERIES
            position = tl.load(query_index + sample * QUERIES + query_number)
            query_row = query + sample * stride_query_b + query_number * stride_query_q + head * stride_query_h
            score = tl.zeros([TILE], tl.float32)
            if HALF > 0:
                angle = tl.maximum(position, 0).to(tl.int64)
                query_low, query_high = _rotated(
                    query_row,
                    cos + sample * stride_cos_b + angle * stride_cos_l,
                    sin + sample * stride_sin_b + angle * stride_sin_l,
                    half_mask,
                    half_columns,
                    HALF,
                )
                score += tl.sum(key_low * query_low + key_high * query_high, axis=1)
            if REST > 0:
                query_rest = tl.load(query_row + rest_columns, mask=rest_mask, other=0.0).to(tl.float32)
                score += tl.sum(key_rest * query_rest, axis=1)
            score = tl.where(visible & (tokens <= position), score * scale, float("-inf"))
            output_row = (sample * QUERIES + query_number) * heads + head
            tl.store(logits + output_row * length + tokens, score, mask=in_sequence)

            this_row = row_ids == row
            before = tl.max(tl.where(this_row, row_max, float("-inf")), axis=0)
            after = tl.maximum(before, tl.max(score, axis=0))
            finite = tl.where(after == float("-inf"), 0.0, after)
            tile_sum = tl.sum(tl.exp(score - finite), axis=0)
            row_sum = tl.where(this_row, row_sum * tl.exp(row_max - finite) + tile_sum, row_sum)
            row_max = tl.where(this_row, after, row_max)

    rows = (sample * QUERIES + row_ids % QUERIES) * heads + kv_head * GROUP + row_ids // QUERIES
    statistics = rows * tl.num_programs(0) + split
    tl.store(split_max + statistics, row_max, mask=row_ids < GROUP * QUERIES)
    tl.store(split_sum + statistics, row_sum, mask=row_ids < GROUP * QUERIES)


@triton.jit
def reduce_attention(
    logits,  # [B, Q, Hq, L]
    split_max,  # [B, Q, Hq, splits]
    split_sum,  # [B, Q, Hq, splits]
    scores,  # [B, L]
    length,
    splits,
    QUERIES: tl.constexpr,
    HEADS: tl.constexpr,
    MAX_OVER_QUERIES: tl.constexpr,
    MAX_OVER_HEADS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    TILE: tl.constexpr,
):
    tokens = tl.program_id(0) * TILE + tl.arange(0, TILE)
    sample = tl.program_id(1).to(tl.int64)
    split_ids = tl.arange(0, BLOCK_SPLITS)[None, :]

    over_heads = tl.zeros([TILE], tl.float32)
    for first_head in range(0, HEADS, BLOCK_HEADS):
        heads = first_head + tl.arange(0, BLOCK_HEADS)
        over_queries = tl.zeros([BLOCK_HEADS, TILE], tl.float32)
        for query_number in range(QUERIES):
            rows = ((sample * QUERIES + query_number) * HEADS + heads)[:, None]
            split_mask = (heads < HEADS)[:, None] & (split_ids < splits)
            maxima = tl.load(split_max + rows * splits + split_ids, mask=split_mask, other=float("-inf"))
            sums = tl.load(split_sum + rows * splits + split_ids, mask=split_mask, other=0.0)
            row_max = tl.max(maxima, axis=1)
            finite = tl.where(row_max == float("-inf"), 0.0, row_max)
            row_sum = tl.sum(sums * tl.exp(maxima - finite[:, None]), axis=1)
            token_mask = (heads < HEADS)[:, None] & (tokens < length)[None, :]
            logit = tl.load(logits + rows * length + tokens[None, :], mask=token_mask, other=float("-inf"))
            attention = tl.exp(logit - finite[:, None]) / row_sum[:, None]
            attention = tl.where(logit == float("-inf"), 0.0, attention)
            if MAX_OVER_QUERIES:
                over_queries = _nan_maximum(over_queries, attention)
            else:
                over_queries += attention
        if not MAX_OVER_QUERIES:
            over_queries = over_queries / QUERIES
        if MAX_OVER_HEADS:
            over_heads = _nan_maximum(over_heads, tl.reduce(over_queries, 0, _nan_maximum))
        else:
            over_heads += tl.sum(over_queries, axis=0)
    if not MAX_OVER_HEADS:
        over_heads = over_heads / HEADS
    tl.store(scores + sample * length + tokens, over_heads, mask=tokens < length)


def split_length(length: int) -> int:
    """Tokens per split of a sequence."""
    return max(MIN_SPLIT, triton.next_power_of_2(triton.cdiv(length, MAX_SPLITS)))


def rank_tokens(
    query: Tensor,
    key: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    key_mask: Tensor | None = None,
    query_index: Tensor | None = None,
    *,
    scale: float | None = None,
    query_reduction: str = "mean",
    head_reduction: str = "mean",
) -> Tensor:
    """See `reroute_kernels.ops.rank_tokens`."""
    batch, queries, heads, head_dim = query.shape
    length, kv_heads = key.shape[1:3]
    scores = torch.empty(batch, length, dtype=torch.float32, device=key.device)
    if scores.numel() == 0:
        return scores
    if query_index is None:
        query_index = last_queries(key, key_mask, queries)
    if scale is None:
        scale = head_dim**-0.5

    # The kernels walk unit strides along channels.
    query, key = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key))
    half = 0
    cos_strides = sin_strides = (0, 0)
    if cos is not None:
        half = cos.shape[-1] // 2
        cos, sin = (
            x if x.stride(-1) == 1 else x.contiguous() for x in (cos.expand(batch, -1, -1), sin.expand(batch, -1, -1))
        )
        cos_strides, sin_strides = cos.stride()[:2], sin.stride()[:2]
    rest = head_dim - 2 * half
    rows = heads // kv_heads * queries

    split = split_length(length)
    splits = triton.cdiv(length, split)
    logits = torch.empty(batch, queries, heads, length, dtype=torch.float32, device=key.device)
    split_max = torch.empty(batch, queries, heads, splits, dtype=torch.float32, device=key.device)
    split_sum = torch.empty_like(split_max)
    block_heads = min(32, triton.next_power_of_2(heads))
    tile = 64
    with on_device_of(key):
        attention_logits[(splits, kv_heads, batch)](
            query,
            key,
            cos,
            sin,
            key_mask,
            query_index.contiguous(),
            logits,
            split_max,
            split_sum,
            length,
            scale,
            *query.stride()[:3],
            *key.stride()[:3],
            *cos_strides,
            *sin_strides,
            *(key_mask.stride() if key_mask is not None else (0, 0)),
            QUERIES=queries,
            GROUP=heads // kv_heads,
            HALF=half,
            REST=rest,
            HAS_MASK=key_mask is not None,
            SPLIT=split,
            TILE=min(split, max(8, TILE_BYTES // (triton.next_power_of_2(head_dim) * key.element_size()))),
            BLOCK_ROWS=triton.next_power_of_2(rows),
            BLOCK_HALF=triton.next_power_of_2(max(half, 1)),
            BLOCK_REST=triton.next_power_of_2(max(rest, 1)),
            num_warps=4,
        )
        reduce_attention[(triton.cdiv(length, tile), batch)](
            logits,
            split_max,
            split_sum,
            scores,
            length,
            splits,
            QUERIES=queries,
            HEADS=heads,
            MAX_OVER_QUERIES=query_reduction == "max",
            MAX_OVER_HEADS=head_reduction == "max",
            BLOCK_HEADS=block_heads,
            BLOCK_SPLITS=triton.next_power_of_2(splits),
            TILE=tile,
            num_warps=4,
        )
    return scores
