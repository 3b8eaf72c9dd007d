"""Pick tokens that lie far from each other: a launch that compares all tokens, then one for all picks.

One program per row keeps, for each token, the smallest weighted distance from those picked so far. The states that it
begins with are the scores of the first pick.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..checks import check_diverse
from .greedy import (
    _cosines,
    _count,
    _entries,
    _load_values,
    _rank,
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
from .plan import Plan, find_plan, keep_plan, layout


@triton.jit(do_not_specialize=["total", "keep"])
def pick_diverse(
    features,  # [T, N, d] with unit stride along d
    weights,  # [T, N] contiguous, or None
    lengths,  # [T] contiguous, or None
    cosines,  # [T, N, N] contiguous, or None; then `inverses` are given
    inverses,  # [T, N] contiguous, or None
    state,  # [T, N] contiguous
    index,  # [T, keep] contiguous
    total,
    keep,
    width,
    stride_features_t,
    stride_features_n,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    FOLLOWS: tl.constexpr,
):
    _wait_for_launches_before(FOLLOWS)
    row = tl.program_id(0).to(tl.int64)
    count = _count(lengths, row, total)
    features += row * stride_features_t
    if weights is not None:
        weights += row * total
    if cosines is not None:
        cosines += row * total * total
    else:
        inverses += row * total
    state += row * total
    index += row * keep
    steps = tl.minimum(keep.to(tl.int64), count.to(tl.int64)).to(tl.int32)
    best = tl.zeros([TILE], tl.int64)
    for first in range(0, count, TILE):
        tokens = first + tl.arange(0, TILE)
        scores = tl.load(state + tokens, mask=tokens < count, other=float("nan"))
        best = tl.maximum(best, _rank(scores, tokens))
    for step in range(1, steps):
        picked = _token_of(best)
        best = tl.zeros([TILE], tl.int64)
        for first in range(0, count, TILE):
            tokens = first + tl.arange(0, TILE)
            mask = tokens < count
            similar = _cosines(
                features, cosines, inverses, picked, tokens, count, total, width, stride_features_n, TILE, BLOCK
            )
            entries = _entries(similar, _load_values(weights, tokens, mask))
            least = tl.load(state + tokens, mask=mask, other=float("nan"))
            if step == 1:  # until now the scores of the first pick
                least = tl.where(least > float("-inf"), float("inf"), least)
            least = tl.where(entries < least, entries, least)
            least = tl.where(tokens == picked, float("nan"), least)
            tl.store(state + tokens, least, mask=mask)
            best = tl.maximum(best, _rank(least, tokens))
        tl.debug_barrier()  # the next step need not read in the threads that wrote
    last = tl.where(steps > 0, _token_of(best), -1)
    _write_picked(index, state, last, count, keep, TILE)


def select_diverse(
    features: Tensor, weights: Tensor | None = None, *, keep: int, lengths: Tensor | None = None
) -> Tensor:
    """See `reroute_kernels.ops.select_diverse`."""
    inputs = features, weights, lengths
    key = "diverse", keep, layout(inputs)
    plan = find_plan(key)
    if plan is None:
        check_diverse(features, weights, keep, lengths)
        if features.shape[0] > MAX_PROGRAMS:
            return in_parts(select_diverse, inputs, keep)
        plan = keep_plan(key, _plan(inputs, keep))
    return plan.run(inputs)[0]


def _plan(inputs: tuple[Tensor, Tensor | None, Tensor | None], keep: int) -> Plan:
    plan = Plan(inputs)
    features = inputs[0]
    rows, total, _ = features.shape
    index = plan.result(rows, keep, dtype=torch.int64)
    if rows * keep == 0:
        return plan
    given = plan_inputs(plan, (1, 2)) | {"lengths": slot_of(plan, 2)}
    keeps = is_kept(features)
    given |= {
        "weights": slot_of(plan, 1),
        "cosines": plan.scratch(rows, total, total, dtype=torch.float32) if keeps else None,
        "inverses": None if keeps else plan.scratch(rows, total, dtype=torch.float32),
        "state": plan.scratch(rows, total, dtype=torch.float32),
    }
    if total:
        add_comparison(plan, given)
    plan.launch(pick_diverse, (rows,), **given, index=index, keep=keep, **loop_sizes(features))
    return plan
