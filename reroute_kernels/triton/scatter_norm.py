"""Write compact rows back to their places in the full sequence, and normalize all of its rows, in one launch."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..checks import check_norm, check_scatter, check_written
from ..ref.scatter_norm import norm_tokens
from .launch import MAX_FIRST_PROGRAMS, _entry_of, _wait_for_launches_before, as_rows, as_stored, next_power_of_2
from .plan import Plan, Slot, find_plan, keep_plan, layout
from .scatter import _may_overlap, scatter_tokens_

FAN = 512
"""Entries of an index that are compared at a time."""
MAX_WIDTH = 16_384
"""Channels of a row that fit into the registers of a program."""


@triton.jit(do_not_specialize=["length", "index_length"])
def normalize_rows(
    full,  # [B, L, W]
    index,  # [B, M] contiguous, or None
    compact,  # [B, M, W], or None
    weight,  # [W] contiguous
    normed,  # [B, L, W] contiguous
    stride_full_b,
    stride_full_l,
    stride_compact_b,
    stride_compact_m,
    length,
    index_length,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    FAN: tl.constexpr,
    LEVELS: tl.constexpr,
    ZERO_CENTERED: tl.constexpr,
    FOLLOWS: tl.constexpr,
):
    _wait_for_launches_before(FOLLOWS)
    place = tl.program_id(0)
    sample = (place // length).to(tl.int64)  # divided in 32 bits, which takes a fraction of the instructions
    position = (place % length).to(tl.int64)
    columns = tl.arange(0, BLOCK).to(tl.int64)
    mask = columns < WIDTH
    target = full + sample * stride_full_b + position * stride_full_l
    if LEVELS > 0:
        found = _entry_of(index + sample * index_length, position, index_length, FAN, LEVELS)
        if found > 0:
            source = compact + sample * stride_compact_b + (found - 1) * stride_compact_m
            values = tl.load(source + columns, mask=mask, other=0)
            tl.store(target + columns, values, mask=mask)
        else:
            values = tl.load(target + columns, mask=mask, other=0)
    else:
        values = tl.load(target + columns, mask=mask, other=0)
    factor = tl.load(weight + columns, mask=mask, other=0).to(tl.float32)
    wide = values.to(tl.float32)
    scaled = wide * tl.math.rsqrt(tl.sum(wide * wide) / WIDTH + eps)
    # Rounded once, or before the product and after it, as two tensors of the dtype are multiplied.
    rounded = scaled.to(values.dtype).to(tl.float32)
    result = scaled * (1.0 + factor) if ZERO_CENTERED else rounded * factor
    tl.store(normed + place.to(tl.int64) * WIDTH + columns, result.to(values.dtype), mask=mask)


def scatter_norm_tokens_(
    full: Tensor, index: Tensor | None, compact: Tensor | None, weight: Tensor, eps: float, *, one_plus: bool = False
) -> Tensor:
    """See `reroute_kernels.ops.scatter_norm_tokens_`."""
    inputs = full, index, compact, weight
    key = "scatter_norm", float(eps), one_plus, layout(inputs)
    plan = find_plan(key)
    if plan is None:
        check_norm(full, index, compact, weight)
        if index is not None and compact is not None:
            check_scatter(full, index, compact)
            check_written(full)
            if compact.numel() == 0 or full.numel() == 0:
                return scatter_norm_tokens_(full, None, None, weight, eps, one_plus=one_plus)
        if full.shape[2] > MAX_WIDTH:
            return _in_steps(full, index, compact, weight, eps, one_plus)
        plan = keep_plan(key, _plan(full, index, compact, weight, float(eps), one_plus))
    if index is not None and compact is not None:
        # Inputs in the memory of the full sequence could be read after it was written.
        if any(_may_overlap(full, each) for each in (index, compact, weight)):
            apart = index.clone(), compact.clone(), weight.clone()
            return scatter_norm_tokens_(full, *apart, eps, one_plus=one_plus)
        target = as_rows(full)
        if target.data_ptr() != full.data_ptr():  # the inner layout forces a copy: write there, then back
            normed = scatter_norm_tokens_(target, index, compact, weight, eps, one_plus=one_plus)
            full.copy_(target)
            return normed
    return plan.run(inputs)[0]


def _in_steps(
    full: Tensor, index: Tensor | None, compact: Tensor | None, weight: Tensor, eps: float, one_plus: bool
) -> Tensor:
    """The same for rows that no program holds."""
    if index is not None and compact is not None:
        weight = weight.clone()  # which may lie in the memory that is written to
        full = scatter_tokens_(full, index, compact)
    return norm_tokens(full, weight, eps, one_plus)


def _plan(
    full: Tensor, index: Tensor | None, compact: Tensor | None, weight: Tensor, eps: float, one_plus: bool
) -> Plan:
    batch, length, width = full.shape
    if batch * length > MAX_FIRST_PROGRAMS:
        raise ValueError(
            f"full must have at most {MAX_FIRST_PROGRAMS} rows for this backend, got {batch * length} rows"
        )
    plan = Plan((full, index, compact, weight))
    normed = plan.result(*full.shape, dtype=full.dtype)
    if full.numel() == 0:
        return plan
    target = as_rows(full)
    if target.data_ptr() != full.data_ptr():
        target = plan.prepare(0, lambda tensors: as_rows(tensors[0]))
    source = target
    if compact is not None:
        source = as_rows(compact)
        if source.data_ptr() != compact.data_ptr():
            source = plan.prepare(2, lambda tensors: as_rows(tensors[2]))
    if index is not None and not index.is_contiguous():
        plan.prepare(1, lambda tensors: tensors[1].contiguous())
    if weight.is_neg() or not weight.is_contiguous():
        plan.prepare(3, lambda tensors: as_stored(tensors[3]).contiguous())
    block = next_power_of_2(width)
    plan.launch(
        normalize_rows,
        (batch * length,),
        full=Slot(0),
        index=None if index is None else Slot(1),
        compact=None if compact is None else Slot(2),
        weight=Slot(3),
        normed=normed,
        stride_full_b=target.stride(0),
        stride_full_l=target.stride(1),
        stride_compact_b=source.stride(0),
        stride_compact_m=source.stride(1),
        length=length,
        index_length=0 if index is None else index.shape[1],
        eps=eps,
        WIDTH=width,
        BLOCK=block,
        FAN=FAN,
        LEVELS=0 if index is None else _levels(index.shape[1]),
        ZERO_CENTERED=one_plus,
        num_warps=min(max(block // 1024, 1), 16),
    )
    return plan


def _levels(entries: int) -> int:
    """How often a row of so many entries is divided into parts until one of them can be compared at once."""
    levels = 1
    while FAN**levels < entries:
        levels += 1
    return levels
