"""Order of launches, sizes of grids and blocks, rows that a kernel can address, and entries that it looks for."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _wait_for_launches_before(FOLLOWS: tl.constexpr):
    """Begins every kernel: where a launch may start before the one that precedes it ends, wait for its end here.

    Only then may the next launch start. So whatever a kernel reads or overwrites, all launches before it are done.
    """
    if FOLLOWS:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def _entry_of(entries, position, index_length, FAN: tl.constexpr, LEVELS: tl.constexpr):
    """Place of a position in an ascending row of an index, counted from 1; 0 if the row has no such entry.

    Fillers are passed over: negative entries on the left, and entries outside the sequence on the right.
    """
    # A row that begins with a negative entry is filled up on the left. Otherwise negative ones stand on the right,
    # and count as large, so that the row ascends.
    smallest = tl.where(tl.load(entries) < 0, -(2**63), 0)
    begin = tl.zeros((), tl.int64)
    found = begin
    for level in tl.static_range(LEVELS):
        # The last entry of each part of the row; the parts that end before the position are passed over.
        last = begin + (tl.arange(0, FAN).to(tl.int64) + 1) * FAN ** (LEVELS - 1 - level) - 1
        entry = tl.load(entries + last, mask=last < index_length, other=-1)
        if level < LEVELS - 1:
            passed = (entry < position) & (entry >= smallest) & (last < index_length)
            begin += tl.sum(passed.to(tl.int64)) * FAN ** (LEVELS - 1 - level)
        else:
            found = tl.max(tl.where(entry == position, last + 1, 0))
    return found


def as_stored(tensor: Tensor) -> Tensor:
    """The tensor, copied if it is a lazily negated view: its memory holds the other sign, which a kernel cannot see."""
    return tensor.resolve_neg() if tensor.is_neg() else tensor


def as_rows(tensor: Tensor) -> Tensor:
    """View (B, L, ...) as (B, L, W) with unit stride along W; copies only if the inner layout forces it."""
    tensor = as_stored(tensor)
    rows = tensor.flatten(2) if tensor.ndim > 2 else tensor[:, :, None]
    return rows if rows.stride(2) == 1 or rows.shape[2] == 1 else rows.contiguous()


MAX_PROGRAMS = 65_535
"""Programs along the second and the third axis of a grid."""
MAX_FIRST_PROGRAMS = 2**31 - 1
"""Programs along the first axis of a grid."""


def parts_of_batch(batch: int) -> list[slice]:
    """Slices of a batch, each small enough for an axis of a grid that has a program for every sample."""
    return [slice(start, start + MAX_PROGRAMS) for start in range(0, batch, MAX_PROGRAMS)]


def copy_grid(rows: int, width: int, block: int) -> tuple[int, int]:
    """Grid of a kernel that copies rows of `width` elements, `block` of them in each program.

    Raises:
        ValueError: no device launches a grid of that size.
    """
    blocks = cdiv(width, block)
    if rows > MAX_FIRST_PROGRAMS or blocks > MAX_PROGRAMS:
        raise ValueError(
            f"index and tensors must have at most {MAX_FIRST_PROGRAMS} rows of at most {MAX_PROGRAMS * block} elements "
            f"for this backend, got {rows} rows of {width} elements"
        )
    return rows, blocks


# Triton's own functions of these names are meant for kernels: on the host each call of them takes microseconds.
def cdiv(dividend: int, divisor: int) -> int:
    """Quotient, rounded up."""
    return -(-dividend // divisor)


def next_power_of_2(size: int) -> int:
    """The smallest power of 2 that is at least `size`, which is 1 or more."""
    return 1 << (size - 1).bit_length()


def row_block(width: int) -> int:
    """Elements of a row that one program copies."""
    return min(2048, next_power_of_2(width))
