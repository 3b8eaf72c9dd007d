"""Write compact rows back, and add their mean change to the candidates that wait, in two launches."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..checks import check_align, check_written
from .launch import _entry_of, _wait_for_launches_before, as_rows, cdiv, copy_grid, next_power_of_2, row_block
from .plan import Plan, Slot, find_plan, keep_plan, layout
from .scatter import _may_overlap
from .scatter_norm import FAN, _levels

PARTS = 4
"""Parts of a sample's compact rows, which are summed beside each other."""
ROWS = 16
"""Compact rows that a program reads at a time."""


@triton.jit(do_not_specialize=["length", "index_length", "part_length"])
def sum_changes(
    full,  # [B, L, W]
    index,  # [B, M] contiguous
    compact,  # [B, M, W]
    pool,  # [B, L] contiguous
    sums,  # [B, PARTS, W] contiguous, float32
    counts,  # [B, PARTS] contiguous, float32
    stride_full_b,
    stride_full_l,
    stride_compact_b,
    stride_compact_m,
    length,
    index_length,
    part_length,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    FOLLOWS: tl.constexpr,
):
    _wait_for_launches_before(FOLLOWS)
    place = tl.program_id(0).to(tl.int64)
    sample = place // PARTS
    begin = place % PARTS * part_length
    columns = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    total = tl.zeros((1, BLOCK), tl.float32)
    count = tl.zeros((), tl.float32)
    for first in range(0, part_length, ROWS):
        entries = begin + first + tl.arange(0, ROWS)
        inside = (entries < begin + part_length) & (entries < index_length)
        position = tl.load(index + sample * index_length + entries, mask=inside, other=-1)
        inside = inside & (position >= 0) & (position < length)
        changes = inside & (tl.load(pool + sample * length + position, mask=inside, other=0) != 0)
        mask = changes[:, None] & (columns < WIDTH)
        before = full + sample * stride_full_b + position[:, None] * stride_full_l + columns
        after = compact + sample * stride_compact_b + entries[:, None] * stride_compact_m + columns
        # Both are 0 where the mask is: no difference.
        change = tl.load(after, mask=mask, other=0).to(tl.float32) - tl.load(before, mask=mask, other=0).to(tl.float32)
        total += tl.sum(change, axis=0)[None, :]
        count += tl.sum(changes.to(tl.float32), axis=0)
    tl.store(sums + place * WIDTH + columns, total, mask=columns < WIDTH)
    if tl.program_id(1) == 0:
        tl.store(counts + place, count)


@triton.jit(do_not_specialize=["length", "index_length"])
def follow_changes(
    full,  # [B, L, W]
    index,  # [B, M] contiguous
    compact,  # [B, M, W]
    pool,  # [B, L] contiguous
    sums,  # [B, PARTS, W] contiguous, float32
    counts,  # [B, PARTS] contiguous, float32
    stride_full_b,
    stride_full_l,
    stride_compact_b,
    stride_compact_m,
    length,
    index_length,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    FAN: tl.constexpr,
    LEVELS: tl.constexpr,
    PARTS: tl.constexpr,
    FOLLOWS: tl.constexpr,
):
    _wait_for_launches_before(FOLLOWS)
    place = tl.program_id(0)
    sample = (place // length).to(tl.int64)
    position = (place % length).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < WIDTH
    target = full + sample * stride_full_b + position * stride_full_l + columns
    found = _entry_of(index + sample * index_length, position, index_length, FAN, LEVELS)
    if found > 0:
        source = compact + sample * stride_compact_b + (found - 1) * stride_compact_m + columns
        tl.store(target, tl.load(source, mask=mask, other=0), mask=mask)
    else:
        if tl.load(pool + place.to(tl.int64)) != 0:
            change = tl.zeros((BLOCK,), tl.float32)
            count = tl.zeros((), tl.float32)
            for part in tl.static_range(PARTS):
                row = sample * PARTS + part
                change += tl.load(sums + row * WIDTH + columns, mask=mask, other=0)
                count += tl.load(counts + row)
            values = tl.load(target, mask=mask, other=0)
            moved = values.to(tl.float32) + change / tl.maximum(count, 1.0)
            tl.store(target, moved.to(values.dtype), mask=mask)


def align_tokens_(full: Tensor, index: Tensor, compact: Tensor, pool: Tensor) -> Tensor:
    """See `reroute_kernels.ops.align_tokens_`."""
    inputs = full, index, compact, pool
    key = "align", layout(inputs)
    plan = find_plan(key)
    if plan is None:
        check_align(full, index, compact, pool)
        check_written(full)
        if compact.numel() == 0 or full.numel() == 0:
            return full
        target = as_rows(full)
        if target.data_ptr() != full.data_ptr():  # the inner layout forced a copy: write there, then back
            return full.copy_(align_tokens_(target, index, compact, pool))
        plan = keep_plan(key, _plan(full, index, compact, pool))
    # Inputs in the memory of the full sequence could be read after it was written.
    if any(_may_overlap(full, each) for each in (index, compact, pool)):
        return align_tokens_(full, index.clone(), compact.clone(), pool.clone())
    plan.run(inputs)
    return full


def _plan(full: Tensor, index: Tensor, compact: Tensor, pool: Tensor) -> Plan:
    plan = Plan((full, index, compact, pool))
    source = as_rows(compact)
    if not index.is_contiguous():
        plan.prepare(1, lambda tensors: tensors[1].contiguous())
    if not pool.is_contiguous():
        plan.prepare(3, lambda tensors: tensors[3].contiguous())
    if source.data_ptr() != compact.data_ptr():
        source = plan.prepare(2, lambda tensors: as_rows(tensors[2]))
    batch, length, width = full.shape
    entries = index.shape[1]
    given = {
        "full": Slot(0),
        "index": Slot(1),
        "compact": Slot(2),
        "pool": Slot(3),
        "sums": plan.scratch(batch, PARTS, width, dtype=torch.float32),
        "counts": plan.scratch(batch, PARTS, dtype=torch.float32),
        "stride_full_b": full.stride(0),
        "stride_full_l": full.stride(1),
        "stride_compact_b": source.stride(0),
        "stride_compact_m": source.stride(1),
        "length": length,
        "index_length": entries,
        "WIDTH": width,
        "PARTS": PARTS,
        "num_warps": 4,
    }
    narrow, wide = min(128, next_power_of_2(width)), row_block(width)
    plan.launch(
        sum_changes,
        copy_grid(batch * PARTS, width, narrow),
        **given,
        part_length=cdiv(entries, PARTS),
        BLOCK=narrow,
        ROWS=ROWS,
    )
    plan.launch(
        follow_changes,
        copy_grid(batch * length, width, wide),
        **given,
        BLOCK=wide,
        FAN=FAN,
        LEVELS=_levels(entries),
    )
    return plan
