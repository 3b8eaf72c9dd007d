"""Sum what tokens receive of an attention over its queries, in two launches and without its matrix.

The first launch goes over the keys of every query, and leaves the maximum and the sum of its softmax; the second goes
over the queries of every key, computes their logits once more, and adds up the weights. Tokens of several blocks may
share a program: each sees its own block only.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..checks import check_saliency
from .launch import MAX_PROGRAMS, _wait_for_launches_before, as_stored, cdiv, parts_of_batch
from .plan import Plan, Slot, find_plan, keep_plan, layout
from .rank import _tensor_products

TILE = 32
"""Queries, and keys, that a program multiplies at a time."""
CHANNELS = 32
"""Channels that it multiplies at a time."""


@triton.jit
def _blocks_of(cu_seqlens, tokens, length, blocks, LEVELS: tl.constexpr):
    """Where the blocks of tokens begin and end; the end is 0, and the beginning the length, outside of all blocks."""
    # The last bound at or before the token begins its block.
    low = tl.zeros_like(tokens).to(tl.int64)
    high = low + blocks
    for _ in tl.static_range(LEVELS):
        middle = (low + high) // 2
        is_before = tl.load(cu_seqlens + middle) <= tokens
        low = tl.where(is_before, middle, low)
        high = tl.where(is_before, high, middle)
    start = tl.minimum(tl.maximum(tl.load(cu_seqlens + low).to(tl.int64), 0), length).to(tl.int32)
    end = tl.minimum(tl.maximum(tl.load(cu_seqlens + low + 1).to(tl.int64), 0), length).to(tl.int32)
    inside = (tokens < length) & (start <= tokens) & (tokens < end)
    return tl.where(inside, start, length), tl.where(inside, end, 0)


@triton.jit
def _logits(
    keys,  # pointers to the first channels of the keys, (TILE, 1)
    queries,  # and of the queries
    is_key,  # (TILE,)
    is_query,
    scale,
    HEAD_DIM: tl.constexpr,
    CHANNELS: tl.constexpr,
    TILE: tl.constexpr,
    EXACT: tl.constexpr,
    TENSOR_CORES: tl.constexpr,
):
    """Logits of every key and every query, (TILE, TILE).

    Numbers of 16 bits are multiplied exactly by tensor cores, and those of 32 bits in three parts (`EXACT`).
    """
    logits = tl.zeros((TILE, TILE), tl.float32)
    for first in range(0, HEAD_DIM, CHANNELS):
        channels = (first + tl.arange(0, CHANNELS))[None, :]
        has = channels < HEAD_DIM
        key = tl.load(keys + channels, mask=is_key[:, None] & has, other=0).to(tl.float32)
        query = tl.load(queries + channels, mask=is_query[:, None] & has, other=0).to(tl.float32)
        if not TENSOR_CORES:
            logits += tl.dot(key, tl.trans(query), input_precision="ieee")
        elif EXACT:
            logits += _tensor_products(key, query)
        else:
            logits += tl.dot(key, tl.trans(query), input_precision="tf32")
    return logits * scale


@triton.jit(do_not_specialize=["queries", "length", "blocks"])
def softmax_statistics(
    query,  # [B, Q, Hq, D]
    key,  # [B, L, Hkv, D]
    cu_seqlens,  # [blocks + 1] contiguous
    maxima,  # [B, Hq, Q] contiguous
    sums,  # [B, Hq, Q] contiguous
    queries,
    length,
    blocks,
    scale,
    stride_query_b,
    stride_query_q,
    stride_query_h,
    stride_key_b,
    stride_key_l,
    stride_key_h,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CHANNELS: tl.constexpr,
    TILE: tl.constexpr,
    EXACT: tl.constexpr,
    TENSOR_CORES: tl.constexpr,
    HAS_BLOCKS: tl.constexpr,
    LEVELS: tl.constexpr,
    FOLLOWS: tl.constexpr,
):
    _wait_for_launches_before(FOLLOWS)
    head = (tl.program_id(0) % HEADS).to(tl.int64)
    sample = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) // HEADS * TILE + tl.arange(0, TILE)
    is_query = rows < queries
    if HAS_BLOCKS:
        start, end = _blocks_of(cu_seqlens, rows, length, blocks, LEVELS)
    else:
        start, end = tl.zeros_like(rows), tl.where(is_query, length, 0)
    query_rows = query + sample * stride_query_b + head * stride_query_h + rows.to(tl.int64)[:, None] * stride_query_q
    keys = key + sample * stride_key_b + head // GROUP * stride_key_h
    row_max = tl.full([TILE], float("-inf"), tl.float32)
    row_sum = tl.zeros([TILE], tl.float32)
    for first in range(tl.min(start, axis=0), tl.max(end, axis=0), TILE):
        tokens = first + tl.arange(0, TILE)
        logits = _logits(
            keys + tokens.to(tl.int64)[:, None] * stride_key_l,
            query_rows,
            tokens < length,
            is_query,
            scale,
            HEAD_DIM,
            CHANNELS,
            TILE,
            EXACT,
            TENSOR_CORES,
        )
        seen = (tokens[:, None] >= start[None, :]) & (tokens[:, None] < end[None, :])
        logits = tl.where(seen, logits, float("-inf"))
        after = tl.maximum(row_max, tl.max(logits, axis=0))
        finite = tl.where(after == float("-inf"), 0.0, after)
        row_sum = row_sum * tl.exp(row_max - finite) + tl.sum(tl.exp(logits - finite[None, :]), axis=0)
        row_max = after
    place = (sample * HEADS + head) * queries + rows
    tl.store(maxima + place, row_max, mask=is_query)
    tl.store(sums + place, row_sum, mask=is_query)


@triton.jit(do_not_specialize=["queries", "length", "blocks"])
def sum_columns(
    query,  # [B, Q, Hq, D]
    key,  # [B, L, Hkv, D]
    cu_seqlens,  # [blocks + 1] contiguous
    maxima,  # [B, Hq, Q] contiguous
    sums,  # [B, Hq, Q] contiguous
    saliency,  # [B, L] contiguous
    queries,
    length,
    blocks,
    scale,
    stride_query_b,
    stride_query_q,
    stride_query_h,
    stride_key_b,
    stride_key_l,
    stride_key_h,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CHANNELS: tl.constexpr,
    TILE: tl.constexpr,
    EXACT: tl.constexpr,
    TENSOR_CORES: tl.constexpr,
    HAS_BLOCKS: tl.constexpr,
    LEVELS: tl.constexpr,
    MEAN: tl.constexpr,
    FOLLOWS: tl.constexpr,
):
    _wait_for_launches_before(FOLLOWS)
    sample = tl.program_id(1).to(tl.int64)
    tokens = tl.program_id(0) * TILE + tl.arange(0, TILE)
    is_token = tokens < length
    if HAS_BLOCKS:
        start, end = _blocks_of(cu_seqlens, tokens, length, blocks, LEVELS)
    else:
        start, end = tl.zeros_like(tokens), tl.where(is_token, queries, 0)
    first_query, last_query = tl.min(start, axis=0), tl.max(end, axis=0)
    total = tl.zeros([TILE], tl.float32)
    for head_number in range(HEADS):
        head = sample * 0 + head_number
        keys = key + sample * stride_key_b + head // GROUP * stride_key_h + tokens.to(tl.int64)[:, None] * stride_key_l
        query_rows = query + sample * stride_query_b + head * stride_query_h
        for first in range(first_query, last_query, TILE):
            rows = first + tl.arange(0, TILE)
            is_query = rows < queries
            logits = _logits(
                keys,
                query_rows + rows.to(tl.int64)[:, None] * stride_query_q,
                is_token,
                is_query,
                scale,
                HEAD_DIM,
                CHANNELS,
                TILE,
                EXACT,
                TENSOR_CORES,
            )
            place = (sample * HEADS + head) * queries + rows
            row_max = tl.load(maxima + place, mask=is_query, other=float("-inf"))
            row_sum = tl.load(sums + place, mask=is_query, other=1.0)
            seen = (rows[None, :] >= start[:, None]) & (rows[None, :] < end[:, None]) & (logits != float("-inf"))
            finite = tl.where(row_max == float("-inf"), 0.0, row_max)
            weights = tl.exp(logits - finite[None, :]) / row_sum[None, :]
            total += tl.sum(tl.where(seen, weights, 0.0), axis=1)
    total = total / HEADS
    if MEAN:
        total = total / tl.maximum(end - start, 1).to(tl.float32)
    tl.store(saliency + sample * length + tokens, total, mask=is_token)


def column_saliency(
    query: Tensor,
    key: Tensor,
    cu_seqlens: Tensor | None = None,
    *,
    scale: float | None = None,
    query_reduction: str = "mean",
) -> Tensor:
    """See `reroute_kernels.ops.column_saliency`."""
    inputs = query, key, cu_seqlens
    name = "saliency", scale, query_reduction, layout(inputs)
    plan = find_plan(name)
    if plan is None:
        check_saliency(query, key, cu_seqlens, query_reduction)
        batch, length = key.shape[:2]
        if batch * length == 0:
            return torch.empty(batch, length, dtype=torch.float32, device=key.device)
        if batch > MAX_PROGRAMS:
            part_of = partial(column_saliency, cu_seqlens=cu_seqlens, scale=scale, query_reduction=query_reduction)
            return torch.cat([part_of(query[part], key[part]) for part in parts_of_batch(batch)])
        plan = keep_plan(name, _plan(query, key, cu_seqlens, scale, query_reduction))
    return plan.run(inputs)[0]


def _plan(query: Tensor, key: Tensor, cu_seqlens: Tensor | None, scale: float | None, query_reduction: str) -> Plan:
    plan = Plan((query, key, cu_seqlens))
    for number, tensor in enumerate((query, key)):
        if tensor.is_neg() or tensor.stride(-1) != 1:
            plan.prepare(number, _reading(number))
    if cu_seqlens is not None and not cu_seqlens.is_contiguous():
        plan.prepare(2, lambda tensors: tensors[2].contiguous())
    query, key = plan.tensors[0], plan.tensors[1]  # type: ignore[assignment]
    batch, queries, heads, head_dim = query.shape
    length, kv_heads = key.shape[1:3]
    is_exact = query.dtype == torch.float32
    blocks = 0 if cu_seqlens is None else len(cu_seqlens) - 1
    given = {
        "query": Slot(0),
        "key": Slot(1),
        "cu_seqlens": None if cu_seqlens is None else Slot(2),
        "maxima": plan.scratch(batch, heads, queries, dtype=torch.float32),
        "sums": plan.scratch(batch, heads, queries, dtype=torch.float32),
        "queries": queries,
        "length": length,
        "blocks": blocks,
        "scale": head_dim**-0.5 if scale is None else float(scale),
        **{f"stride_query_{axis}": stride for axis, stride in zip("bqh", query.stride(), strict=False)},
        **{f"stride_key_{axis}": stride for axis, stride in zip("blh", key.stride(), strict=False)},
        "HEADS": heads,
        "GROUP": heads // kv_heads,
        "HEAD_DIM": head_dim,
        "CHANNELS": CHANNELS,
        "TILE": TILE,
        "EXACT": is_exact,
        "TENSOR_CORES": plan.is_cuda,
        "HAS_BLOCKS": cu_seqlens is not None,
        "LEVELS": blocks.bit_length(),
        "num_warps": 4,
        "num_stages": 2,
    }
    saliency = plan.result(batch, length, dtype=torch.float32)
    plan.launch(softmax_statistics, (cdiv(queries, TILE) * heads, batch), **given)
    plan.launch(sum_columns, (cdiv(length, TILE), batch), **given, saliency=saliency, MEAN=query_reduction == "mean")
    return plan


def _reading(number: int):
    return lambda tensors: _as_read(tensors[number])


def _as_read(tensor: Tensor) -> Tensor:
    """With unit stride along channels, as the kernels walk them, and without a lazy negation, which they do not see."""
    tensor = as_stored(tensor)
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
