"""Write compact rows back to their places in the full sequence, in one launch."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..checks import check_scatter, check_written
from .launch import _wait_for_launches_before, as_rows, copy_grid, row_block
from .plan import Plan, Slot, find_plan, keep_plan, layout


@triton.jit(do_not_specialize=["length", "index_length"])
def copy_rows_to_full(
    index,  # [B, M] contiguous
    compact,  # [B, M, W]
    full,  # [B, L, W]
    stride_compact_b,
    stride_compact_m,
    stride_full_b,
    stride_full_l,
    length,
    index_length,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    FOLLOWS: tl.constexpr,
):
    _wait_for_launches_before(FOLLOWS)
    place = tl.program_id(0).to(tl.int64)
    sample = place // index_length
    row = tl.load(index + place)
    is_token = (row >= 0) & (row < length)
    row = tl.where(is_token, row, 0)
    source = compact + sample * stride_compact_b + (place % index_length) * stride_compact_m
    target = full + sample * stride_full_b + row * stride_full_l
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    # Whatever the index says: neither load waits for the other.
    values = tl.load(source + columns, mask=columns < WIDTH)
    # A block of flags and a single flag would make integers in Triton's interpreter, which are no mask.
    tl.store(target + columns, values, mask=columns < tl.where(is_token, WIDTH, 0))


def scatter_tokens_(full: Tensor, index: Tensor, compact: Tensor) -> Tensor:
    """See `reroute_kernels.ops.scatter_tokens_`."""
    inputs = full, index, compact
    key = "scatter", layout(inputs)
    plan = find_plan(key)
    if plan is None:
        check_scatter(full, index, compact)
        check_written(full)
        if compact.numel() == 0 or full.numel() == 0:
            return full
        target = as_rows(full)
        if target.data_ptr() != full.data_ptr():  # the inner layout forced a copy: write there, then back
            return full.copy_(scatter_tokens_(target, index, as_rows(compact)).view(full.shape))
        plan = keep_plan(key, _plan(full, index, compact))
    # A source in the memory of the full sequence could be read after it was written.
    if _may_overlap(full, compact):
        return scatter_tokens_(full, index, compact.clone())
    if _may_overlap(full, index):
        return scatter_tokens_(full, index.clone(), compact)
    plan.run(inputs)
    return full


def _plan(full: Tensor, index: Tensor, compact: Tensor) -> Plan:
    plan = Plan((full, index, compact))
    target, source = as_rows(full), as_rows(compact)
    if not index.is_contiguous():
        plan.prepare(1, lambda tensors: tensors[1].contiguous())
    if source.data_ptr() != compact.data_ptr():
        source = plan.prepare(2, lambda tensors: as_rows(tensors[2]))
    width = source.shape[2]
    block = row_block(width)
    plan.launch(
        copy_rows_to_full,
        copy_grid(index.numel(), width, block),
        index=Slot(1),
        compact=Slot(2),
        full=Slot(0),
        stride_compact_b=source.stride(0),
        stride_compact_m=source.stride(1),
        stride_full_b=target.stride(0),
        stride_full_l=target.stride(1),
        length=full.shape[1],
        index_length=index.shape[1],
        WIDTH=width,
        BLOCK=block,
        num_warps=4,
    )
    return plan


def _may_overlap(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of at least one element lie in the same stretch of memory."""
    start, other_start = one.data_ptr(), other.data_ptr()
    return start < other_start + _extent(other) and other_start < start + _extent(one)


def _extent(tensor: Tensor) -> int:
    """Bytes from the first element to the end of the last."""
    if tensor.is_contiguous():
        return tensor.nbytes
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return (1 + sum((size - 1) * stride for size, stride in steps)) * tensor.element_size()
