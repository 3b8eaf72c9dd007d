"""Write compact rows back to their places in the full sequence, in one launch."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..checks import check_scatter, check_written
from .launch import as_rows, copy_grid, on_device_of, row_block


@triton.jit
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
):
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
    check_scatter(full, index, compact)
    check_written(full)
    if compact.numel() == 0 or full.numel() == 0:
        return full
    target = as_rows(full)
    if target.data_ptr() != full.data_ptr():  # the inner layout forced a copy: write there, then back
        return full.copy_(scatter_tokens_(target, index, as_rows(compact)).view(full.shape))
    # A source in the memory of the full sequence could be read after it was written.
    if _may_overlap(full, compact):
        compact = compact.clone()
    if _may_overlap(full, index):
        index = index.clone()
    source = as_rows(compact)
    width = source.shape[2]
    block = row_block(width)
    with on_device_of(full):
        copy_rows_to_full[copy_grid(index.numel(), width, block)](
            index.contiguous(),
            source,
            target,
            *source.stride()[:2],
            *target.stride()[:2],
            full.shape[1],
            index.shape[1],
            WIDTH=width,
            BLOCK=block,
            num_warps=4,
        )
    return full


def _may_overlap(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of at least one element lie in the same stretch of memory."""
    (start, end), (other_start, other_end) = _extent(one), _extent(other)
    return start < other_end and other_start < end


def _extent(tensor: Tensor) -> tuple[int, int]:
    elements = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + elements * tensor.element_size()
