"""Order of launches, sizes of grids and blocks, and rows that a kernel can address."""

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
