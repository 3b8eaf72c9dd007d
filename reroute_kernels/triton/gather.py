"""Compact per-token tensors to the rows of a kept index, all of them in one launch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..checks import check_gather
from .launch import _wait_for_launches_before, as_rows, copy_grid, row_block
from .plan import Plan, Slot, find_plan, keep_plan, layout


@triton.jit(do_not_specialize=["length", "index_length"])
def copy_rows_to_compact(
    index,  # [B, M] contiguous
    sources,  # each [B, L, W_t]
    outputs,  # each [B, M, W_t] contiguous
    source_strides_b,
    source_strides_l,
    length,
    index_length,
    WIDTHS: tl.constexpr,
    BLOCK: tl.constexpr,
    FOLLOWS: tl.constexpr,
):
    _wait_for_launches_before(FOLLOWS)
    place = tl.program_id(0).to(tl.int64)
    sample = place // index_length
    row = tl.load(index + place)
    is_token = (row >= 0) & (row < length)
    row = tl.where(is_token, row, 0)
    for t in tl.static_range(len(sources)):
        # One block of each tensor, another for every tensor: narrow ones do not all fall to the same program.
        columns = (tl.program_id(1) + t) % tl.num_programs(1) * BLOCK + tl.arange(0, BLOCK)
        mask = columns < WIDTHS[t]
        source = sources[t] + sample * source_strides_b[t] + row * source_strides_l[t]
        # A block of flags and a single flag would make integers in Triton's interpreter, which are no mask.
        values = tl.load(source + columns, mask=columns < tl.where(is_token, WIDTHS[t], 0), other=0)
        tl.store(outputs[t] + place * WIDTHS[t] + columns, values, mask=mask)


def gather_tokens(index: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """See `reroute_kernels.ops.gather_tokens`."""
    inputs = index, *tensors
    key = "gather", layout(inputs)
    plan = find_plan(key)
    if plan is None:
        check_gather(index, tensors)
        if tensors[0].shape[1] == 0:  # no row to read, and no pointer to pass
            return tuple(x.new_zeros(*index.shape, *x.shape[2:]) for x in tensors)
        plan = Plan(inputs)
        if not index.is_contiguous():
            plan.prepare(0, lambda tensors: tensors[0].contiguous())
        add_gather(plan, Slot(0), index.shape, 1)
        keep_plan(key, plan)
    return tuple(plan.run(inputs))


def add_gather(plan: Plan, index: Slot, shape: tuple[int, ...], first: int) -> None:
    """Plan the copies of all inputs from a number on; each adds a result.

    Args:
        plan: whose inputs they are; they have a row at least.
        index: (B, M) contiguous.
        shape: its shape.
        first: number of the first of them.
    """
    batch, places = shape
    pairs = []
    for number, tensor in enumerate(plan.tensors[first:], first):
        assert tensor is not None
        output = plan.result(batch, places, *tensor.shape[2:], dtype=tensor.dtype)
        if batch * places * math.prod(tensor.shape[2:]):  # else there is nothing to copy
            rows = as_rows(tensor)
            if rows.data_ptr() != tensor.data_ptr():
                rows = plan.prepare(number, _rows_of(number))
            pairs.append((Slot(number), output, rows))
    if not pairs:
        return
    sources, outputs, read = zip(*pairs, strict=True)
    widths = tuple(x.shape[2] for x in read)
    block = row_block(max(widths))
    plan.launch(
        copy_rows_to_compact,
        copy_grid(batch * places, max(widths), block),
        index=index,
        sources=sources,
        outputs=outputs,
        # Of one sample whatever it is: kernels are compiled anew for one that is no multiple of 16.
        source_strides_b=tuple(x.stride(0) if batch > 1 else 0 for x in read),
        source_strides_l=tuple(x.stride(1) for x in read),
        length=read[0].shape[1],
        index_length=places,
        WIDTHS=widths,
        BLOCK=block,
        num_warps=4,
    )


def _rows_of(number: int) -> Callable[[Sequence[Any]], Tensor]:
    return lambda tensors: as_rows(tensors[number])
