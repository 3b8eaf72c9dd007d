"""Compact per-token tensors to the rows of a kept index, all of them in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..checks import check_gather
from .launch import as_rows, copy_grid, on_device_of, row_block


@triton.jit
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
):
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
    check_gather(index, tensors)
    outputs = tuple(
        torch.empty(*index.shape, *tensor.shape[2:], dtype=tensor.dtype, device=tensor.device) for tensor in tensors
    )
    # Sources and outputs without a single element have nothing to copy and no pointer to pass.
    pairs = [(as_rows(source), output) for source, output in zip(tensors, outputs, strict=True) if output.numel()]
    if not pairs:
        return outputs
    length = tensors[0].shape[1]
    if length == 0:
        for output in outputs:
            output.zero_()
        return outputs
    sources = tuple(source for source, _ in pairs)
    widths = tuple(source.shape[2] for source in sources)
    block = row_block(max(widths))
    with on_device_of(index):
        copy_rows_to_compact[copy_grid(index.numel(), max(widths), block)](
            index.contiguous(),
            sources,
            tuple(output for _, output in pairs),
            tuple(source.stride(0) for source in sources),
            tuple(source.stride(1) for source in sources),
            length,
            index.shape[1],
            WIDTHS=widths,
            BLOCK=block,
            num_warps=4,
        )
    return outputs
