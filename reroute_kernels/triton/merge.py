"""Average the tokens of each group, in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import ref
from ..checks import check_merge
from .launch import _wait_for_launches_before, as_rows, copy_grid, next_power_of_2
from .plan import Plan, Slot, find_plan, keep_plan, layout

ROWS = 16
"""Tokens whose groups a program reads at a time."""


@triton.jit(do_not_specialize=["length", "groups"])
def merge_rows(
    features,  # [T, N, W]
    assignment,  # [T, N] contiguous
    means,  # [T, G, W] contiguous
    counts,  # [T, G] contiguous
    stride_features_t,
    stride_features_n,
    length,
    groups,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    FOLLOWS: tl.constexpr,
):
    _wait_for_launches_before(FOLLOWS)
    place = tl.program_id(0).to(tl.int64)
    sample = place // groups
    group = place % groups
    columns = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    total = tl.zeros((1, BLOCK), tl.float32)
    count = tl.zeros((), tl.int64)
    for first in range(0, length, ROWS):
        tokens = (first + tl.arange(0, ROWS)).to(tl.int64)
        inside = tokens < length
        member = inside & (tl.load(assignment + sample * length + tokens, mask=inside, other=-1) == group)
        here = tl.sum(member.to(tl.int64), axis=0)
        if here > 0:
            rows = features + sample * stride_features_t + tokens[:, None] * stride_features_n + columns
            values = tl.load(rows, mask=member[:, None] & (columns < WIDTH), other=0)
            total += tl.sum(values.to(tl.float32), axis=0)[None, :]
            count += here
    mean = total / tl.maximum(count, 1).to(tl.float32)
    tl.store(means + place * WIDTH + columns, mean.to(means.dtype.element_ty), mask=columns < WIDTH)
    if tl.program_id(1) == 0:
        tl.store(counts + place, count)


def merge_tokens(features: Tensor, assignment: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """See `reroute_kernels.ops.merge_tokens`."""
    inputs = features, assignment
    key = "merge", groups, layout(inputs)
    plan = find_plan(key)
    if plan is None:
        check_merge(features, assignment, groups)
        if features.numel() == 0 or groups == 0:
            return ref.merge_tokens(features, assignment, groups)
        plan = keep_plan(key, _plan(features, assignment, groups))
    means, counts = plan.run(inputs)
    return means, counts


def _plan(features: Tensor, assignment: Tensor, groups: int) -> Plan:
    plan = Plan((features, assignment))
    source = as_rows(features)
    if source.data_ptr() != features.data_ptr():
        source = plan.prepare(0, lambda tensors: as_rows(tensors[0]))
    if not assignment.is_contiguous():
        plan.prepare(1, lambda tensors: tensors[1].contiguous())
    samples, length, width = features.shape
    block = min(256, next_power_of_2(width))
    plan.launch(
        merge_rows,
        copy_grid(samples * groups, width, block),
        features=Slot(0),
        assignment=Slot(1),
        means=plan.result(samples, groups, width, dtype=features.dtype),
        counts=plan.result(samples, groups, dtype=torch.int64),
        stride_features_t=source.stride(0),
        stride_features_n=source.stride(1),
        length=length,
        groups=groups,
        WIDTH=width,
        BLOCK=block,
        ROWS=ROWS,
        num_warps=4,
    )
    return plan
