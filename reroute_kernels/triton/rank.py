"""Score tokens by the attention that a few queries pay to them, in two launches.

The first launch reads the key once for up to 64 rows (a row is one query of one head), rotates it on the way, and
writes the logits with the softmax statistics of every split of the sequence; the second combines the splits and reduces
over queries and heads. Keys of earlier turns are further splits, of which only the statistics are kept.

Four rows of a key head or more are multiplied on tensor cores, if there are any that serve, to the precision of
float32. Their operands are float32 always: Triton's interpreter would take bfloat16 operands for integers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..attention import NUM_TENSORS, TENSORS, Attention, takes_attention
from ..checks import check_ranking
from ..ref.rank import last_queries
from .launch import (
    MAX_FIRST_PROGRAMS,
    MAX_PROGRAMS,
    _wait_for_launches_before,
    as_stored,
    cdiv,
    next_power_of_2,
    parts_of_batch,
)
from .plan import Plan, Slot, find_plan, keep_plan, layout

# Splits of a sequence at most; how many there are, the shape alone decides, never the size of the device.
MAX_SPLITS = 128
# Channels that a program without tensor cores holds at a time, of eight tokens at least, and rows: many small programs,
# most of one warp, wait for memory by turns.
TILE_CHANNELS, MAX_ROWS = 1024, 8
# Tensor cores multiply from this many rows of a key head on, up to so many in a program, with a tile of these tokens:
# a warp has 16 tokens and 8 or 16 rows. Wider heads than these channels would not fit into registers.
MIN_TENSOR_ROWS, MAX_TENSOR_ROWS = 4, 64
MIN_TENSOR_CHANNELS, MAX_TENSOR_CHANNELS = 16, 128
TENSOR_TILE = 16
# Tokens whose logits a program reduces.
REDUCED_TILE = 64


@triton.jit
def _channels(rows, first, CHANNELS: tl.constexpr, BLOCK: tl.constexpr):
    """`CHANNELS` of the rows from `first` on, and 0 up to `BLOCK` of them; `rows` is (ROWS, 1)."""
    columns = tl.arange(0, BLOCK)[None, :]
    if CHANNELS == BLOCK:
        channels = tl.load(rows + first + columns)
    else:
        channels = tl.load(rows + first + columns, mask=columns < CHANNELS, other=0.0)
    return channels


@triton.jit
def _channel_pairs(rows, ROWS: tl.constexpr, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """First and second channel of every rotated pair, as (ROWS, BLOCK_HALF); `rows` is (ROWS, 1)."""
    if INTERLEAVED:
        both = _channels(rows, 0, 2 * HALF, 2 * BLOCK_HALF)
        first, second = tl.split(tl.reshape(both, (ROWS, BLOCK_HALF, 2)))
    else:
        first, second = _channels(rows, 0, HALF, BLOCK_HALF), _channels(rows, HALF, HALF, BLOCK_HALF)
    return first.to(tl.float32), second.to(tl.float32)


@triton.jit
def _nan_maximum(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _rotated_pairs(
    rows,
    tables,  # cos and sin, and their strides of tokens
    places,
    ROWS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """Channel pairs of `rows`, rotated by what the tables have at `places`; both are (ROWS, 1)."""
    cos, sin, stride_cos_l, stride_sin_l = tables
    x, y = _channel_pairs(rows, ROWS, HALF, BLOCK_HALF, INTERLEAVED)
    cos_x, cos_y = _channel_pairs(cos + places * stride_cos_l, ROWS, HALF, BLOCK_HALF, INTERLEAVED)
    sin_x, sin_y = _channel_pairs(sin + places * stride_sin_l, ROWS, HALF, BLOCK_HALF, INTERLEAVED)
    return x * cos_x - y * sin_x, y * cos_y + x * sin_y


@triton.jit
def _products(keys, queries, BLOCK_ROWS: tl.constexpr):
    """Products of every key's channels and every query's, channels last; a single query needs no axis of its own."""
    return keys * queries if BLOCK_ROWS == 1 else keys[:, None, :] * queries[None, :, :]


@triton.jit
def _sum_of_channels(products, TILE: tl.constexpr, BLOCK_ROWS: tl.constexpr):
    """As (TILE, BLOCK_ROWS)."""
    return tl.reshape(tl.sum(products, axis=len(products.shape) - 1), (TILE, BLOCK_ROWS))


@triton.jit
def _head_and_tail(numbers):
    """The leading bits of float32 numbers, as many as tensor cores read, and what is left of each."""
    head = (numbers.to(tl.uint32, bitcast=True) & 0xFFFFE000).to(tl.float32, bitcast=True)
    return head, numbers - head


@triton.jit
def _tensor_products(keys, queries):
    """Products of every key and every query on tensor cores, summed over channels, as (TILE, BLOCK_ROWS).

    Three products of TF32 numbers stand for one of float32, as in Triton's "tf32x3". That rounds each operand to
    nearest, in five instructions; cutting it takes two, and the error is that of float32 all the same. In another order
    of the products Triton 3.8 would rotate each key twice.
    """
    key_head, key_tail = _head_and_tail(keys)
    query_head, query_tail = _head_and_tail(tl.trans(queries))
    small = tl.dot(key_head, query_tail, input_precision="tf32")
    small = tl.dot(key_tail, query_head, small, input_precision="tf32")
    small = tl.where(small == small, small, 0.0)  # the tail of an infinity is NaN, and the product of heads has it all
    return tl.dot(key_head, query_head, small, input_precision="tf32")


@triton.jit
def _load_queries(
    query_rows,  # pointers, (BLOCK_ROWS, 1)
    tables,  # cos and sin, at the sample, and their strides of tokens
    positions,  # (BLOCK_ROWS,)
    length,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    """Rotated pairs of every query, and its channels after those; 0 in place of a kind that there is none of."""
    first, second, rest = 0.0, 0.0, 0.0
    if HALF > 0:
        places = tl.minimum(tl.maximum(positions, 0), length - 1).to(tl.int64)[:, None]
        first, second = _rotated_pairs(query_rows, tables, places, BLOCK_ROWS, HALF, BLOCK_HALF, INTERLEAVED)
    if REST > 0:
        rest = _channels(query_rows, 2 * HALF, REST, BLOCK_REST).to(tl.float32)
    return first, second, rest


@triton.jit
def _split_of_logits(
    queries,  # see `_load_queries`; their positions; pointers to the first logit of each; which of them are any
    keys,  # [L, D] of one sample and key head
    key_mask,  # at the sample
    strides,  # of the tokens of keys and key_mask
    tables,  # cos and sin, at the sample, and their strides of tokens
    start,
    end,
    scale,
    IS_PAST: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BLOCKS: tl.constexpr,  # HALF to BLOCK_REST, as below
):
    """Write the logits of the keys `start` to `end`; returns the softmax statistics of every row over them.

    A row is one query of one head. Keys of the past come rotated, are seen by every query that has a place, and have
    no logits written.
    """
    HALF: tl.constexpr = BLOCKS[0]
    REST: tl.constexpr = BLOCKS[1]
    INTERLEAVED: tl.constexpr = BLOCKS[2]
    TILE: tl.constexpr = BLOCKS[3]
    BLOCK_ROWS: tl.constexpr = BLOCKS[4]
    BLOCK_HALF: tl.constexpr = BLOCKS[5]
    BLOCK_REST: tl.constexpr = BLOCKS[6]
    TENSOR_CORES: tl.constexpr = BLOCKS[7]
    query_first, query_second, query_rest, positions, logit_rows, is_row = queries
    row_max = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_ROWS], tl.float32)
    for first in range(start, end, TILE):
        tokens = first + tl.arange(0, TILE)
        in_sequence = tokens < end
        # The last token stands for those after it: no load waits for a mask.
        places = tl.minimum(tokens, end - 1).to(tl.int64)
        visible = in_sequence
        if HAS_MASK:
            visible &= tl.load(key_mask + places * strides[1]) != 0
        key_rows = keys + places[:, None] * strides[0]
        score = tl.zeros([TILE, BLOCK_ROWS], tl.float32)
        if HALF > 0:
            if IS_PAST:
                key_first, key_second = _channel_pairs(key_rows, TILE, HALF, BLOCK_HALF, INTERLEAVED)
            else:
                key_first, key_second = _rotated_pairs(
                    key_rows, tables, places[:, None], TILE, HALF, BLOCK_HALF, INTERLEAVED
                )
            if TENSOR_CORES:
                score += _tensor_products(key_first, query_first) + _tensor_products(key_second, query_second)
            else:
                products = _products(key_first, query_first, BLOCK_ROWS)
                products += _products(key_second, query_second, BLOCK_ROWS)
                score += _sum_of_channels(products, TILE, BLOCK_ROWS)
        if REST > 0:
            key_rest = _channels(key_rows, 2 * HALF, REST, BLOCK_REST).to(tl.float32)
            if TENSOR_CORES:
                score += _tensor_products(key_rest, query_rest)
            else:
                score += _sum_of_channels(_products(key_rest, query_rest, BLOCK_ROWS), TILE, BLOCK_ROWS)
        if IS_PAST:
            seen = visible[:, None] & (positions >= 0)[None, :]
        else:
            seen = visible[:, None] & (tokens[:, None] <= positions[None, :])
        score = tl.where(seen, score * scale, float("-inf"))
        if not IS_PAST:
            tl.store(logit_rows[None, :] + tokens[:, None], score, mask=in_sequence[:, None] & is_row[None, :])

        after = tl.maximum(row_max, tl.max(score, axis=0))
        finite = tl.where(after == float("-inf"), 0.0, after)
        row_sum = row_sum * tl.exp(row_max - finite) + tl.sum(tl.exp(score - finite[None, :]), axis=0)
        row_max = after
    return row_max, row_sum


@triton.jit(do_not_specialize=["length", "past_length", "stride_mask_b", "stride_past_mask_b"])
def attention_logits(
    query,  # [B, Q, Hq, D]
    key,  # [B, L, Hkv, D]
    cos,  # [B, L, 2 * HALF]
    sin,  # [B, L, 2 * HALF]
    key_mask,  # [B, L]
    query_index,  # [B, Q] contiguous
    past_key,  # [B, P, Hkv, D]
    past_mask,  # [B, P]
    logits,  # [B, Q, Hq, L]
    split_max,  # [B, Q, Hq, splits]
    split_sum,  # [B, Q, Hq, splits]
    length,
    past_length,
    scale,
    stride_logits,
    stride_splits,
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
    TENSOR_CORES: tl.constexpr,
    FOLLOWS: tl.constexpr,
):
    _wait_for_launches_before(FOLLOWS)
    # Heads before splits: programs beside each other read whole rows of keys together, and the same tables.
    row_blocks: tl.constexpr = (GROUP * QUERIES + BLOCK_ROWS - 1) // BLOCK_ROWS
    kv_head = (tl.program_id(0) // row_blocks).to(tl.int64)
    first_row = tl.program_id(0) % row_blocks * BLOCK_ROWS
    heads = tl.num_programs(0) // row_blocks * GROUP
    split = tl.program_id(1)
    sample = tl.program_id(2).to(tl.int64)
    if HALF > 0:
        cos += sample * stride_cos_b
        sin += sample * stride_sin_b
    tables = (cos, sin, stride_cos_l, stride_sin_l)

    rows = first_row + tl.arange(0, BLOCK_ROWS)
    is_row = rows < GROUP * QUERIES
    rows = tl.minimum(rows, GROUP * QUERIES - 1)  # the last row stands for those after it
    query_numbers = (rows % QUERIES).to(tl.int64)
    row_heads = kv_head * GROUP + rows // QUERIES
    if HAS_INDEX:
        positions = tl.load(query_index + sample * QUERIES + query_numbers)
    else:
        positions = length - QUERIES + query_numbers
    query_rows = query + sample * stride_query_b + query_numbers * stride_query_q + row_heads * stride_query_h
    first, second, rest = _load_queries(
        query_rows[:, None],
        tables,
        positions,
        length,
        HALF,
        REST,
        INTERLEAVED,
        BLOCK_ROWS,
        BLOCK_HALF,
        BLOCK_REST,
    )
    row_numbers = (sample * QUERIES + query_numbers) * heads + row_heads

    # The splits of the past follow those of the new tokens.
    if HAS_PAST:
        past_split = split - tl.cdiv(length, SPLIT)
        is_past = past_split >= 0
    else:
        is_past: tl.constexpr = False  # type: ignore[no-redef]
    blocks: tl.constexpr = (HALF, REST, INTERLEAVED, TILE, BLOCK_ROWS, BLOCK_HALF, BLOCK_REST, TENSOR_CORES)
    queries = (first, second, rest, positions, logits + row_numbers * stride_logits, is_row)
    if is_past:
        if HAS_PAST_MASK:
            past_mask += sample * stride_past_mask_b
        past_keys = past_key + sample * stride_past_b + kv_head * stride_past_h
        past_strides = (stride_past_l, stride_past_mask_l)
        start = past_split * SPLIT
        end = min(start + SPLIT, past_length)
        row_max, row_sum = _split_of_logits(
            queries, past_keys, past_mask, past_strides, tables, start, end, scale, True, HAS_PAST_MASK, blocks
        )
    else:
        if HAS_MASK:
            key_mask += sample * stride_mask_b
        keys = key + sample * stride_key_b + kv_head * stride_key_h
        key_strides = (stride_key_l, stride_mask_l)
        start = split * SPLIT
        end = min(start + SPLIT, length)
        row_max, row_sum = _split_of_logits(
            queries, keys, key_mask, key_strides, tables, start, end, scale, False, HAS_MASK, blocks
        )

    statistics = row_numbers * stride_splits + split
    tl.store(split_max + statistics, row_max, mask=is_row)
    tl.store(split_sum + statistics, row_sum, mask=is_row)


@triton.jit(do_not_specialize=["length", "splits"])
def reduce_attention(
    logits,  # [B, Q, Hq, L]
    split_max,  # [B, Q, Hq, splits], of rows of BLOCK_SPLITS
    split_sum,  # [B, Q, Hq, splits], of rows of BLOCK_SPLITS
    scores,  # [B, L]
    length,
    splits,
    stride_logits,
    QUERIES: tl.constexpr,
    HEADS: tl.constexpr,
    MAX_OVER_QUERIES: tl.constexpr,
    MAX_OVER_HEADS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    TILE: tl.constexpr,
    FOLLOWS: tl.constexpr,
):
    _wait_for_launches_before(FOLLOWS)
    tokens = tl.program_id(0) * TILE + tl.arange(0, TILE)
    sample = tl.program_id(1).to(tl.int64)
    split_ids = tl.arange(0, BLOCK_SPLITS)[None, :]
    over_heads = tl.zeros([TILE], tl.float32)
    for first_head in range(0, HEADS, BLOCK_HEADS):
        heads = first_head + tl.arange(0, BLOCK_HEADS)
        over_queries = tl.zeros([BLOCK_HEADS, TILE], tl.float32)
        for query_number in range(QUERIES):
            rows = ((sample * QUERIES + query_number) * HEADS + heads)[:, None]
            # Rows are whole blocks: a mask of splits would break their loads into pieces.
            statistics = tl.minimum(rows, (sample * QUERIES + query_number + 1) * HEADS - 1) * BLOCK_SPLITS + split_ids
            maxima = tl.where(split_ids < splits, tl.load(split_max + statistics), float("-inf"))
            sums = tl.where(split_ids < splits, tl.load(split_sum + statistics), 0.0)
            row_max = tl.max(maxima, axis=1)
            finite = tl.where(row_max == float("-inf"), 0.0, row_max)
            row_sum = tl.sum(sums * tl.exp(maxima - finite[:, None]), axis=1)
            token_mask = (heads < HEADS)[:, None] & (tokens < length)[None, :]
            logit = tl.load(logits + rows * stride_logits + tokens[None, :], mask=token_mask, other=float("-inf"))
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


def logits_blocks(
    length: int, past_length: int, rows: int, half: int, rest: int, *, interleaved: bool, tensor_cores: bool
) -> dict[str, int | bool]:
    """Tokens per split of a sequence, and per tile of a split; rows and channels of a program; what multiplies.

    Args:
        length: new tokens.
        past_length: tokens of the past.
        rows: queries times query heads of a key head.
        half: rotated channels of a head, divided by 2.
        rest: channels that are not rotated.
        interleaved: whether the rotated pairs lie beside each other.
        tensor_cores: whether to use them; for AMD's devices the compiler spills registers with them.
    """
    head_dim = 2 * half + rest
    fewest = MIN_TENSOR_CHANNELS if tensor_cores else 1
    block_half, block_rest = next_power_of_2(max(half, fewest)), next_power_of_2(max(rest, fewest))
    channels = (2 * block_half if half else 0) + (block_rest if rest else 0)
    tensor_cores = tensor_cores and rows >= MIN_TENSOR_ROWS and channels <= MAX_TENSOR_CHANNELS
    # Warps as the compilers fit what they hold into registers.
    if tensor_cores:
        tile, block_rows = TENSOR_TILE, min(MAX_TENSOR_ROWS, max(8, next_power_of_2(rows)))
        num_warps = max(1, block_rows // (8 if interleaved or rest else 16))
    else:
        block_half, block_rest = next_power_of_2(max(half, 1)), next_power_of_2(max(rest, 1))
        tile, block_rows = max(8, TILE_CHANNELS // next_power_of_2(head_dim)), min(MAX_ROWS, next_power_of_2(rows))
        num_warps = 4 if head_dim > 128 else 2 if past_length else 1
    full_splits = MAX_SPLITS - 1 if past_length else MAX_SPLITS  # both may leave a rest
    return {
        "SPLIT": max(2 * tile, next_power_of_2(cdiv(length + past_length, full_splits))),
        "TILE": tile,
        "BLOCK_ROWS": block_rows,
        "BLOCK_HALF": block_half,
        "BLOCK_REST": block_rest,
        "TENSOR_CORES": tensor_cores,
        "num_warps": num_warps,
        "num_stages": 1,  # else keys would take the way through shared memory to the tensor cores
    }


@takes_attention
def rank_tokens(attention: Attention) -> Tensor:
    """See `reroute_kernels.ops.rank_tokens`."""
    inputs, options = attention.operands(), attention.options()
    key = "rank", options, layout(inputs)
    plan = find_plan(key)
    if plan is None:
        check_ranking(attention)
        batch = attention.key.shape[0]
        if batch > MAX_PROGRAMS:
            return torch.cat([rank_tokens(attention.samples(part)) for part in parts_of_batch(batch)])
        plan = Plan(inputs)
        add_ranking(plan, attention)
        keep_plan(key, plan)
    return plan.run(inputs)[0]


def add_ranking(plan: Plan, attention: Attention, is_result: bool = True) -> Slot:
    """Plan a ranking.

    Args:
        plan: whose first inputs are the tensors of the attention, in order.
        attention: with these tensors.
        is_result: whether the scores are a result.

    Returns:
        (B, L) contiguous, the scores.
    """
    batch, queries, heads, head_dim = attention.query.shape
    length, kv_heads = attention.key.shape[1:3]
    scores = (plan.result if is_result else plan.scratch)(batch, length, dtype=torch.float32)
    if batch * length == 0:
        return scores
    query, key, cos, sin, key_mask, query_index, past_key, past_mask = _prepared(plan, queries)
    past_length = 0 if past_key is None else past_key.shape[1]
    half = 0 if cos is None else cos.shape[-1] // 2
    rest = head_dim - 2 * half
    rows = heads // kv_heads * queries
    interleaved = attention.rotary_style == "interleaved"
    blocks = logits_blocks(length, past_length, rows, half, rest, interleaved=interleaved, tensor_cores=plan.is_cuda)
    row_blocks = kv_heads * cdiv(rows, blocks["BLOCK_ROWS"])
    if row_blocks > MAX_FIRST_PROGRAMS:
        most = MAX_FIRST_PROGRAMS // kv_heads * blocks["BLOCK_ROWS"] // (heads // kv_heads)
        raise ValueError(f"query must have at most {most} queries of {heads} heads for this backend, got {queries}")
    splits = cdiv(length, blocks["SPLIT"]) + cdiv(past_length, blocks["SPLIT"])
    block_splits = max(16, next_power_of_2(splits))  # fewer would be loaded by every thread
    padded_length = cdiv(length, 16) * 16  # rows of logits begin at aligned places, whatever the length
    work = {
        "logits": plan.scratch(batch, queries, heads, padded_length, dtype=torch.float32),
        "split_max": plan.scratch(batch, queries, heads, block_splits, dtype=torch.float32),
        "split_sum": plan.scratch(batch, queries, heads, block_splits, dtype=torch.float32),
        "length": length,
        "stride_logits": padded_length,
        "QUERIES": queries,
    }
    plan.launch(
        attention_logits,
        (row_blocks, splits, batch),
        **work,
        **_pointers(query=query, key=key, cos=cos, sin=sin),
        **_pointers(key_mask=key_mask, query_index=query_index, past_key=past_key, past_mask=past_mask),
        past_length=past_length,
        stride_splits=block_splits,
        scale=head_dim**-0.5 if attention.scale is None else float(attention.scale),
        **_strides("query", query, "bqh"),
        **_strides("key", key, "blh"),
        **_strides("cos", cos, "bl"),
        **_strides("sin", sin, "bl"),
        **_strides("mask", key_mask, "bl"),
        **_strides("past", past_key, "blh"),
        **_strides("past_mask", past_mask, "bl"),
        GROUP=heads // kv_heads,
        HALF=half,
        REST=rest,
        INTERLEAVED=interleaved,
        HAS_MASK=key_mask is not None,
        HAS_INDEX=query_index is not None,
        HAS_PAST=past_key is not None,
        HAS_PAST_MASK=past_mask is not None,
        **blocks,
    )
    plan.launch(
        reduce_attention,
        (cdiv(length, REDUCED_TILE), batch),
        **work,
        scores=scores,
        splits=splits,
        HEADS=heads,
        MAX_OVER_QUERIES=attention.query_reduction == "max",
        MAX_OVER_HEADS=attention.head_reduction == "max",
        BLOCK_SPLITS=block_splits,
        BLOCK_HEADS=min(32, next_power_of_2(heads)),
        TILE=REDUCED_TILE,
        num_warps=4,
    )
    return scores


def _prepared(plan: Plan, queries: int) -> list[Tensor | None]:
    """The tensors of the attention as the kernels read them, with the place of each query if padding hides it."""
    for number, name in enumerate(TENSORS):
        tensor = plan.tensors[number]
        if name in _READ_BY_CHANNEL and tensor is not None and (tensor.is_neg() or tensor.stride(-1) != 1):
            plan.prepare(number, _reading(number))
    mask, index = map(TENSORS.index, ("key_mask", "query_index"))
    if plan.tensors[index] is None and plan.tensors[mask] is not None:
        plan.prepare(index, lambda tensors: last_queries(tensors[1], tensors[mask], queries))
    elif plan.tensors[index] is not None:
        plan.prepare(index, lambda tensors: tensors[index].contiguous())
    tensors = plan.tensors[:NUM_TENSORS]
    past_key = tensors[TENSORS.index("past_key")]
    return tensors if past_key is None or past_key.shape[1] else [*tensors[:-2], None, None]


def _reading(number: int) -> Callable[[Sequence[Any]], Tensor]:
    return lambda tensors: _as_read(tensors[number])


_READ_BY_CHANNEL = ("query", "key", "cos", "sin", "past_key")


def _pointers(**tensors: Tensor | None) -> dict[str, Slot | None]:
    """Arguments of a kernel for inputs of a plan that has the tensors of an attention first."""
    return {name: None if tensor is None else Slot(TENSORS.index(name)) for name, tensor in tensors.items()}


def _strides(name: str, tensor: Tensor | None, axes: str) -> dict[str, int]:
    """Arguments of a kernel: strides of the first axes, 0 without a tensor; one table serves all samples."""
    strides = [0] * len(axes) if tensor is None else list(tensor.stride()[: len(axes)])
    if name in ("cos", "sin") and tensor is not None and tensor.shape[0] == 1:
        strides[0] = 0
    return {f"stride_{name}_{axis}": stride for axis, stride in zip(axes, strides, strict=True)}


def _as_read(tensor: Tensor) -> Tensor:
    """With unit stride along channels, as the kernels walk them, and without a lazy negation, which they do not see."""
    tensor = as_stored(tensor)
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
