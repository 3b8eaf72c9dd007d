"""Pick tokens by a determinantal point process: one launch for all picks, after one that compares the tokens.

One program per row keeps, for each token, the squared length of its unit vector outside the picked ones' span, and its
part along each direction that a pick added.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..checks import check_dpp
from ..ref.dpp import SPANNED
from .greedy import (
    _cosines,
    _count,
    _inverse,
    _is_finite,
    _rank,
    _squares,
    _token_of,
    _write_picked,
    add_comparison,
    in_parts,
    is_kept,
    loop_sizes,
    plan_inputs,
    slot_of,
)
from .launch import MAX_PROGRAMS, _wait_for_launches_before
from .plan import Plan, Slot, find_plan, keep_plan, layout

LARGEST = tl.constexpr(3.4028234663852886e38)
"""The largest finite float32."""


@triton.jit
def _scores(relevance, outside, tokens, mask):
    """Gain of the determinant by each free token; of others the state."""
    value = tl.load(relevance + tokens, mask=mask, other=0.0)
    square = tl.minimum(value * value, LARGEST)
    return tl.where(outside >= 0.0, square * outside, outside)


@triton.jit
def _along_picked(along, picked, tokens, count, total, steps, TILE: tl.constexpr, CHUNK: tl.constexpr):
    """Products of the parts of the tokens and of the picked one, along the directions added so far."""
    product = tl.zeros([TILE], tl.float32)
    for first in range(0, steps, CHUNK):
        lines = first + tl.arange(0, CHUNK)
        starts = lines.to(tl.int64) * total
        own = tl.load(along + (starts + picked), mask=lines < steps, other=0.0)
        mask = (lines < steps)[:, None] & (tokens < count)[None, :]
        others = tl.load(along + (starts[:, None] + tokens[None, :]), mask=mask, other=0.0)
        product += tl.sum(others * own[:, None], axis=0)
    return product


@triton.jit(do_not_specialize=["total", "keep", "directions"])
def pick_dpp(
    features,  # [T, N, d] with unit stride along d
    relevance,  # [T, N] contiguous
    lengths,  # [T] contiguous, or None
    cosines,  # [T, N, N] contiguous, or None
    inverses,  # [T, N] contiguous
    state,  # [T, N] contiguous: the squared length outside the span
    along,  # [T, keep, N] contiguous
    index,  # [T, keep] contiguous
    total,
    keep,
    directions,
    width,
    stride_features_t,
    stride_features_n,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    SPANNED: tl.constexpr,
    FOLLOWS: tl.constexpr,
):
    _wait_for_launches_before(FOLLOWS)
    row = tl.program_id(0).to(tl.int64)
    count = _count(lengths, row, total)
    features += row * stride_features_t
    relevance += row * total
    if cosines is not None:
        cosines += row * total * total
    inverses += row * total
    state += row * total
    along += row * directions * total
    index += row * keep
    steps = tl.minimum(keep.to(tl.int64), count.to(tl.int64)).to(tl.int32)
    best = tl.zeros([TILE], tl.int64)
    for first in range(0, count, TILE):
        tokens = first + tl.arange(0, TILE)
        mask = tokens < count
        if cosines is None:
            inverse = _inverse(_squares(features, tokens, count, width, stride_features_n, TILE, BLOCK))
            tl.store(inverses + tokens, inverse, mask=mask)
        else:
            inverse = tl.load(inverses + tokens, mask=mask, other=0.0)
        is_usable = _is_finite(inverse) & _is_finite(tl.load(relevance + tokens, mask=mask, other=0.0))
        outside = tl.where(is_usable, 1.0, float("-inf"))
        outside = tl.where(mask, outside, float("nan"))
        tl.store(state + tokens, outside, mask=mask)
        best = tl.maximum(best, _rank(_scores(relevance, outside, tokens, mask), tokens))
    tl.debug_barrier()  # the steps need not read in the threads that wrote
    line = along
    for step in range(steps - 1):
        picked = _token_of(best)
        added = tl.load(state + picked)
        tl.debug_barrier()  # before it is marked as picked
        scale = _inverse(tl.maximum(added, 0.0))
        best = tl.zeros([TILE], tl.int64)
        for first in range(0, count, TILE):
            tokens = first + tl.arange(0, TILE)
            mask = tokens < count
            part = _cosines(
                features, cosines, inverses, picked, tokens, count, total, width, stride_features_n, TILE, BLOCK
            )
            part -= _along_picked(along, picked, tokens, count, total, step, TILE, CHUNK)
            part = tl.where(added > 0.0, part * scale, 0.0)
            tl.store(line + tokens, part, mask=mask)
            before = tl.load(state + tokens, mask=mask, other=float("nan"))
            outside = before - part * part
            outside = tl.where(outside > SPANNED, outside, 0.0)
            outside = tl.where(before >= 0.0, outside, before)
            outside = tl.where(tokens == picked, float("nan"), outside)
            tl.store(state + tokens, outside, mask=mask)
            best = tl.maximum(best, _rank(_scores(relevance, outside, tokens, mask), tokens))
        line += total
        tl.debug_barrier()
    last = tl.where(steps > 0, _token_of(best), -1)
    _write_picked(index, state, last, count, keep, TILE)


def select_dpp(features: Tensor, relevance: Tensor, *, keep: int, lengths: Tensor | None = None) -> Tensor:
    """See `reroute_kernels.ops.select_dpp`."""
    inputs = features, relevance, lengths
    key = "dpp", keep, layout(inputs)
    plan = find_plan(key)
    if plan is None:
        check_dpp(features, relevance, keep, lengths)
        if features.shape[0] > MAX_PROGRAMS:
            return in_parts(select_dpp, inputs, keep)
        plan = keep_plan(key, _plan(inputs, keep))
    return plan.run(inputs)[0]


def _plan(inputs: tuple[Tensor, Tensor, Tensor | None], keep: int) -> Plan:
    plan = Plan(inputs)
    features = inputs[0]
    rows, total, _ = features.shape
    index = plan.result(rows, keep, dtype=torch.int64)
    if rows * keep == 0:
        return plan
    keeps, directions = is_kept(features), min(keep, total)
    given = plan_inputs(plan, (1, 2)) | {
        "lengths": slot_of(plan, 2),
        "cosines": plan.scratch(rows, total, total, dtype=torch.float32) if keeps else None,
        "inverses": plan.scratch(rows, total, dtype=torch.float32),
    }
    if keeps and total:
        add_comparison(plan, given, weights=None, state=None)
    sizes = loop_sizes(features)
    plan.launch(
        pick_dpp,
        (rows,),
        **given,
        relevance=Slot(1),
        state=plan.scratch(rows, total, dtype=torch.float32),
        along=plan.scratch(rows, directions, total, dtype=torch.float32),
        index=index,
        keep=keep,
        directions=directions,
        CHUNK=4096 // sizes["TILE"],
        SPANNED=SPANNED,
        **sizes,
    )
    return plan
