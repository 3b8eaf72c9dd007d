"""Score tokens by the attention that a few queries pay to them, in two launches.

The first launch reads the key once, rotates it on the way, and writes the logits with the softmax statistics of every
split of the sequence; the second combines the splits and reduces over queries and heads. Keys of earlier turns are
further splits, of which only the statistics are kept.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ref.rank import last_queries
from .launch import cdiv, next_power_of_2, on_device_of

# Tokens per split: fixed by the shape alone, so that results do not depend on the size of the device.
MIN_SPLIT = 128
MAX_SPLITS = 64
# Bytes of keys that a program holds at a time: 16 a thread for either half of the channels.
TILE_BYTES = 4096
# Tokens instead, where a head has more channels than this: what the compilers fit into registers without spilling.
WIDE_HEAD, WIDE_HEAD_TILE = 128, 32
# Up to this many logits of a sample, one program reads them as fast as further programs would start.
ONE_PROGRAM_LOGITS = 2**16


@triton.jit
def _channel_pairs(
    rows, mask, ROWS: tl.constexpr, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, INTERLEAVED: tl.constexpr
):
    """First and second channel of every rotated pair, as (ROWS, BLOCK_HALF); `rows`, `mask` are (ROWS, 1)."""
    if INTERLEAVED:
        columns = tl.arange(0, 2 * BLOCK_HALF)[None, :]
        both = tl.load(rows + columns, mask=mask & (columns < 2 * HALF), other=0.0)
        first, second = tl.split(tl.reshape(both, (ROWS, BLOCK_HALF, 2)))
    else:
        columns = tl.arange(0, BLOCK_HALF)[None, :]
        admitted = mask & (columns < HALF)
        first = tl.load(rows + columns, mask=admitted, other=0.0)
        second = tl.load(rows + columns + HALF, mask=admitted, other=0.0)
    return first.to(tl.float32), second.to(tl.float32)


@triton.jit
def _nan_maximum(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _split_of_logits(
    query,  # at the sample
    keys,  # [L, D] of one sample and key head
    cos,  # at the sample
    sin,  # at the sample
    key_mask,  # at the sample
    query_index,  # at the sample
    logits,  # at the sample
    kv_head,
    heads,
    first,
    end,
    length,
    scale,
    stride_query_q,
    stride_query_h,
    stride_key_l,
    stride_cos_l,
    stride_sin_l,
    stride_mask_l,
    IS_PAST: tl.constexpr,
    QUERIES: tl.constexpr,
    GROUP: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    """Write the logits of the keys `first` to `end`; returns the softmax statistics of every row over them.

    Keys of the past come rotated, are seen by every query that has a place, and have no logits written.
    """
    row_ids = tl.arange(0, BLOCK_ROWS)
    row_max = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_ROWS], tl.float32)
    rest_columns = 2 * HALF + tl.arange(0, BLOCK_REST)[None, :]
    rest_mask = rest_columns < 2 * HALF + REST
    one_row = tl.arange(0, 1)[:, None]

    for start in range(first, end, TILE):
        tokens = start + tl.arange(0, TILE)
        in_sequence = tokens < end
        offsets = tokens.to(tl.int64)
        visible = in_sequence
        if HAS_MASK:
            visible = visible & (tl.load(key_mask + offsets * stride_mask_l, mask=in_sequence, other=0) != 0)
        key_rows = keys + offsets[:, None] * stride_key_l
        if HALF > 0:
            mask = in_sequence[:, None]
            key_first, key_second = _channel_pairs(key_rows, mask, TILE, HALF, BLOCK_HALF, INTERLEAVED)
            if not IS_PAST:
                cos_rows, sin_rows = cos + offsets[:, None] * stride_cos_l, sin + offsets[:, None] * stride_sin_l
                cos_first, cos_second = _channel_pairs(cos_rows, mask, TILE, HALF, BLOCK_HALF, INTERLEAVED)
                sin_first, sin_second = _channel_pairs(sin_rows, mask, TILE, HALF, BLOCK_HALF, INTERLEAVED)
                rotated = key_first * cos_first - key_second * sin_first
                key_second = key_second * cos_second + key_first * sin_second
                key_first = rotated
        if REST > 0:
            key_rest = tl.load(key_rows + rest_columns, mask=in_sequence[:, None] & rest_mask, other=0.0)
            key_rest = key_rest.to(tl.float32)

        for row in range(GROUP * QUERIES):
            query_number = tl.cast(row % QUERIES, tl.int64)
            head = kv_head * GROUP + row // QUERIES
            position = tl.load(query_index + query_number) if HAS_INDEX else length - QUERIES + query_number
            query_row = query + query_number * stride_query_q + head * stride_query_h
            score = tl.zeros([TILE], tl.float32)
            if HALF > 0:
                angle = tl.minimum(tl.maximum(position, 0), length - 1).to(tl.int64)
                cos_row, sin_row = cos + angle * stride_cos_l + one_row, sin + angle * stride_sin_l + one_row
                x, y = _channel_pairs(query_row + one_row, one_row == 0, 1, HALF, BLOCK_HALF, INTERLEAVED)
                cos_x, cos_y = _channel_pairs(cos_row, one_row == 0, 1, HALF, BLOCK_HALF, INTERLEAVED)
                sin_x, sin_y = _channel_pairs(sin_row, one_row == 0, 1, HALF, BLOCK_HALF, INTERLEAVED)
                products = key_first * (x * cos_x - y * sin_x) + key_second * (y * cos_y + x * sin_y)
                score += tl.sum(products, axis=1)
            if REST > 0:
                query_rest = tl.load(query_row + rest_columns, mask=rest_mask, other=0.0).to(tl.float32)
                score += tl.sum(key_rest * query_rest, axis=1)
            if IS_PAST:
                score = tl.where(visible & (position >= 0), score * scale, float("-inf"))
            else:
                score = tl.where(visible & (tokens <= position), score * scale, float("-inf"))
                tl.store(logits + (query_number * heads + head) * length + tokens, score, mask=in_sequence)

            this_row = row_ids == row
            before = tl.max(tl.where(this_row, row_max, float("-inf")), axis=0)
            after = tl.maximum(before, tl.max(score, axis=0))
            finite = tl.where(after == float("-inf"), 0.0, after)
            tile_sum = tl.sum(tl.exp(score - finite), axis=0)
            row_sum = tl.where(this_row, row_sum * tl.exp(row_max - finite) + tile_sum, row_sum)
            row_max = tl.where(this_row, after, row_max)
    return row_max, row_sum


@triton.jit
def attention_logits(
    query,  # [B, Q, Hq, D]
    key,  # [B, L, Hkv, D]
    cos,  # [B, L, 2 * HALF]
    sin,  # [B, L, 2 * HALF]
    key_mask,  # [B, L]
    query_index,  # [B, Q] contiguous
    past_key,  # [B, P, Hkv, D]
    past_mask,  # [B, P]
    logits,  # [B, Q, Hq, L] contiguous
    split_max,  # [B, Q, Hq, splits] contiguous
    split_sum,  # [B, Q, Hq, splits] contiguous
    length,
    past_length,
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
    stride_past_b,
    stride_past_l,
    stride_past_h,
    stride_past_mask_b,
    stride_past_mask_l,
    QUERIES: tl.constexpr,
    GROUP: tl.constexpr,  # query heads per key head
    HALF: tl.constexpr,  # rotated channels / 2, 0 for no rotation
    REST: tl.constexpr,  # channels after the rotated ones
    INTERLEAVED: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_INDEX: tl.constexpr,  # else the queries are the last tokens
    HAS_PAST: tl.constexpr,
    HAS_PAST_MASK: tl.constexpr,
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
    query += sample * stride_query_b
    if HALF > 0:
        cos += sample * stride_cos_b
        sin += sample * stride_sin_b
    if HAS_INDEX:
        query_index += sample * QUERIES

    # The splits of the past follow those of the new tokens.
    if HAS_PAST:
        past_split = split - tl.cdiv(length, SPLIT)
        is_past = past_split >= 0
    else:
        is_past: tl.constexpr = False
    if is_past:
        if HAS_PAST_MASK:
            past_mask += sample * stride_past_mask_b
        row_max, row_sum = _split_of_logits(
            query,
            past_key + sample * stride_past_b + kv_head * stride_past_h,
            cos,
            sin,
            past_mask,
            query_index,
            logits,
            kv_head,
            heads,
            past_split * SPLIT,
            min(past_split * SPLIT + SPLIT, past_length),
            length,
            scale,
            stride_query_q,
            stride_query_h,
            stride_past_l,
            stride_cos_l,
            stride_sin_l,
            stride_past_mask_l,
            True,
            QUERIES,
            GROUP,
            HALF,
            REST,
            INTERLEAVED,
            HAS_PAST_MASK,
            HAS_INDEX,
            TILE,
            BLOCK_ROWS,
            BLOCK_HALF,
            BLOCK_REST,
        )
    else:
        if HAS_MASK:
            key_mask += sample * stride_mask_b
        row_max, row_sum = _split_of_logits(
            query,
            key + sample * stride_key_b + kv_head * stride_key_h,
            cos,
            sin,
            key_mask,
            query_index,
            logits + sample * QUERIES * heads * length,
            kv_head,
            heads,
            split * SPLIT,
            min(split * SPLIT + SPLIT, length),
            length,
            scale,
            stride_query_q,
            stride_query_h,
            stride_key_l,
            stride_cos_l,
            stride_sin_l,
            stride_mask_l,
            False,
            QUERIES,
            GROUP,
            HALF,
            REST,
            INTERLEAVED,
            HAS_MASK,
            HAS_INDEX,
            TILE,
            BLOCK_ROWS,
            BLOCK_HALF,
            BLOCK_REST,
        )

    row_ids = tl.arange(0, BLOCK_ROWS)
    rows = (sample * QUERIES + row_ids % QUERIES) * heads + kv_head * GROUP + row_ids // QUERIES
    statistics = rows * tl.num_programs(0) + split
    tl.store(split_max + statistics, row_max, mask=row_ids < GROUP * QUERIES)
    tl.store(split_sum + statistics, row_sum, mask=row_ids < GROUP * QUERIES)


@triton.jit
def reduced_attention(
    logits,  # [B, Q, Hq, L]
    split_max,  # [B, Q, Hq, splits]
    split_sum,  # [B, Q, Hq, splits]
    sample,
    tokens,
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
    """Scores of TILE tokens of one sample."""
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
    return over_heads


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
    tl.store(scores + sample * length + tokens, reduced, mask=tokens < length)


def split_length(length: int) -> int:
    """Tokens per split of a sequence."""
    return max(MIN_SPLIT, next_power_of_2(cdiv(length, MAX_SPLITS)))


class Attention:
    """Logits of a few queries and the statistics of their softmax, by one launch; the rest is how to reduce them.

    Takes the arguments of `reroute_kernels.ops.rank_tokens` up to `rotary_style`, of at least one sample and token.
    """

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        key_mask: Tensor | None,
        query_index: Tensor | None,
        past_key: Tensor | None,
        past_mask: Tensor | None,
        *,
        scale: float | None,
        query_reduction: str,
        head_reduction: str,
        rotary_style: str,
    ):
        batch, queries, heads, head_dim = query.shape
        self.length, kv_heads = key.shape[1:3]
        self.is_small = queries * heads * self.length <= ONE_PROGRAM_LOGITS
        if query_index is None and key_mask is not None:
            query_index = last_queries(key, key_mask, queries)
        if past_key is not None and past_key.shape[1] == 0:
            past_key = past_mask = None
        past_length = 0 if past_key is None else past_key.shape[1]

        # The kernels walk unit strides along channels.
        query, key, past_key, cos, sin = (
            x if x is None or x.stride(-1) == 1 else x.contiguous() for x in (query, key, past_key, cos, sin)
        )
        half = 0 if cos is None else cos.shape[-1] // 2
        rest = head_dim - 2 * half
        channels = next_power_of_2(head_dim)
        tile = WIDE_HEAD_TILE if channels > WIDE_HEAD else max(8, TILE_BYTES // (channels * key.element_size()))
        split = split_length(self.length + past_length)
        self.splits = cdiv(self.length, split) + cdiv(past_length, split)

        def scratch(*last_dim: int) -> Tensor:
            return torch.empty(batch, queries, heads, *last_dim, dtype=torch.float32, device=key.device)

        self.logits, self.split_max, self.split_sum = scratch(self.length), scratch(self.splits), scratch(self.splits)
        with on_device_of(key):
            attention_logits[(self.splits, kv_heads, batch)](
                query,
                key,
                cos,
                sin,
                key_mask,
                query_index if query_index is None else query_index.contiguous(),
                past_key,
                past_mask,
                self.logits,
                self.split_max,
                self.split_sum,
                self.length,
                past_length,
                head_dim**-0.5 if scale is None else scale,
                *query.stride()[:3],
                *key.stride()[:3],
                *_row_strides(cos),
                *_row_strides(sin),
                *((0, 0) if key_mask is None else key_mask.stride()),
                *((0, 0, 0) if past_key is None else past_key.stride()[:3]),
                *((0, 0) if past_mask is None else past_mask.stride()),
                QUERIES=queries,
                GROUP=heads // kv_heads,
                HALF=half,
                REST=rest,
                INTERLEAVED=rotary_style == "interleaved",
                HAS_MASK=key_mask is not None,
                HAS_INDEX=query_index is not None,
                HAS_PAST=past_key is not None,
                HAS_PAST_MASK=past_mask is not None,
                SPLIT=split,
                TILE=min(split, tile),
                BLOCK_ROWS=next_power_of_2(heads // kv_heads * queries),
                BLOCK_HALF=next_power_of_2(max(half, 1)),
                BLOCK_REST=next_power_of_2(max(rest, 1)),
                num_warps=8 if channels > WIDE_HEAD else 4,
            )
        # How scores are summed depends on the shape alone, so that a fused decision equals the single operations.
        self.reduction = {
            "QUERIES": queries,
            "HEADS": heads,
            "MAX_OVER_QUERIES": query_reduction == "max",
            "MAX_OVER_HEADS": head_reduction == "max",
            "BLOCK_HEADS": min(8 if self.is_small else 32, next_power_of_2(heads)),
            "BLOCK_SPLITS": max(16, next_power_of_2(self.splits)),  # fewer would be loaded by every thread
            "TILE": min(512, max(64, next_power_of_2(self.length))) if self.is_small else 64,
            "num_warps": 8 if self.is_small else 4,
        }

    def scores(self) -> Tensor:
        """(B, L) float32, by a second launch."""
        logits = self.logits
        scores = torch.empty(logits.shape[0], self.length, dtype=torch.float32, device=logits.device)
        with on_device_of(logits):
            reduce_attention[(cdiv(self.length, self.reduction["TILE"]), logits.shape[0])](
                logits, self.split_max, self.split_sum, scores, self.length, self.splits, **self.reduction
            )
        return scores


def _row_strides(table: Tensor | None) -> tuple[int, int]:
    """Strides of samples and tokens; one table serves all samples where there is only one."""
    if table is None:
        return 0, 0
    return table.stride(0) if table.shape[0] > 1 else 0, table.stride(1)


def rank_tokens(
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
) -> Tensor:
    """See `reroute_kernels.ops.rank_tokens`."""
    if key.shape[0] == 0 or key.shape[1] == 0:
        return torch.empty(key.shape[:2], dtype=torch.float32, device=key.device)
    return Attention(
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
    ).scores()
