"""Parts of the greedy selections: cosines of tokens, the next pick, and the list of what was picked.

Every token has a state, a float that tells also whether it can be picked: it is a number while the token is free, minus
infinity if its norm or its value is not finite, so that it comes last, and NaN once it is picked.

Where a row has no more tokens than channels, one launch of many programs compares all tokens, and keeps their cosines:
no more floats than the features have elements. The loop of the picks, one program per row, then reads a line of them
for each pick. In wider rows nothing is kept, and the loop multiplies all tokens with each pick anew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import _wait_for_launches_before, as_rows, as_stored, cdiv, next_power_of_2, parts_of_batch
from .plan import Plan, Slot
from .select import _order_preserving, _write_filler

COMPARED = 64
"""Tokens of each side that a program compares at a time; half as many in float32."""
WORST = tl.constexpr(-3.4028234663852886e38)
"""The smallest finite float32: no entry that can be picked lies below it."""


@triton.jit
def _count(lengths, row, total):
    """Tokens of a row that count."""
    count = total.to(tl.int64)
    if lengths is not None:
        count = tl.minimum(tl.maximum(tl.load(lengths + row).to(tl.int64), 0), count)
    return count.to(tl.int32)


@triton.jit
def _load_values(values, tokens, mask):
    """Float of each token, or 1 where none is given."""
    loaded = tl.full(tokens.shape, 1.0, tl.float32)
    if values is not None:
        loaded = tl.load(values + tokens, mask=mask, other=0.0)
    return loaded


@triton.jit
def _load_block(features, tokens, start, count, width, stride, BLOCK: tl.constexpr):
    """[tokens, BLOCK] channels from `start` on."""
    channels = start + tl.arange(0, BLOCK)
    places = tokens.to(tl.int64)[:, None] * stride + channels[None, :]
    return tl.load(features + places, mask=(tokens < count)[:, None] & (channels < width)[None, :], other=0.0)


@triton.jit
def _inverse(squares):
    """1 over a norm; 0 for the norm 0, and NaN for one that is not finite."""
    is_proper = (squares > 0.0) & (squares < float("inf"))
    inverse = tl.div_rn(1.0, tl.sqrt_rn(tl.where(is_proper, squares, 1.0)))
    return tl.where(is_proper, inverse, tl.where(squares == 0.0, 0.0, float("nan")))


@triton.jit
def _squares(features, tokens, count, width, stride, TILE: tl.constexpr, BLOCK: tl.constexpr):
    """Squared norms of tokens."""
    squares = tl.zeros([TILE, BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        values = _load_block(features, tokens, start, count, width, stride, BLOCK).to(tl.float32)
        squares += values * values
    return tl.sum(squares, axis=1)


@triton.jit
def _is_finite(values):
    return tl.abs(values) < float("inf")


@triton.jit
def _entries(cosine, weights):
    """Weighted distances; rounding makes none negative."""
    return tl.maximum(tl.where(cosine < 1.0, 1.0 - cosine, 0.0) * weights, WORST)


@triton.jit(do_not_specialize=["total"])
def compare_tokens(
    features,  # [T, N, d] with unit stride along d
    weights,  # [T, N] contiguous, or None
    lengths,  # [T] contiguous, or None
    cosines,  # [T, N, N] contiguous, or None
    inverses,  # [T, N] contiguous, or None
    state,  # [T, N] contiguous, or None
    total,
    width,
    stride_features_t,
    stride_features_n,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDENS: tl.constexpr,  # whether products are of float32
    FOLLOWS: tl.constexpr,
):
    """Cosines of a tile of tokens and all tokens, if they are kept, and each one's second smallest weighted distance.

    The latter begins the state of `pick_diverse`. In float32, or, for halves, with exact products that are summed in
    float32.
    """
    _wait_for_launches_before(FOLLOWS)
    row = tl.program_id(1).to(tl.int64)
    count = _count(lengths, row, total)
    features += row * stride_features_t
    first_own = tl.program_id(0) * TILE
    own = first_own + tl.arange(0, TILE)
    own_squares = _squares(features, own, count, width, stride_features_n, TILE, BLOCK)
    own_inverse = _inverse(own_squares)
    place = row * total
    own_weights = tl.full([TILE], 1.0, tl.float32)
    if weights is not None:
        own_weights = tl.load(weights + (place + own), mask=own < count, other=0.0)
    smallest, second = tl.full([TILE], float("inf"), tl.float32), tl.full([TILE], float("inf"), tl.float32)
    stop = tl.where(first_own < count, count, 0)
    for first in range(0, stop, TILE):
        tokens = first + tl.arange(0, TILE)
        product = tl.zeros([TILE, TILE], tl.float32)
        for start in range(0, width, BLOCK):
            left = _load_block(features, tokens, start, count, width, stride_features_n, BLOCK)
            right = _load_block(features, own, start, count, width, stride_features_n, BLOCK)
            if WIDENS:
                left, right = left.to(tl.float32), right.to(tl.float32)
            product = tl.dot(left, tl.trans(right), product, input_precision="ieee")
        squares = _squares(features, tokens, count, width, stride_features_n, TILE, BLOCK)
        cosine = product * _inverse(squares)[:, None] * own_inverse[None, :]
        both = (tokens < count)[:, None] & (own < count)[None, :]
        if cosines is not None:
            lines = row * total * total + tokens.to(tl.int64)[:, None] * total
            tl.store(cosines + (lines + own[None, :]), cosine, mask=both)
        if state is not None:
            counts = tokens < count
            counts = counts & _is_finite(squares)
            if weights is not None:
                counts = counts & _is_finite(tl.load(weights + (place + tokens), mask=tokens < count, other=0.0))
            entries = _entries(cosine, own_weights[None, :])
            entries = tl.where(tokens[:, None] == own[None, :], 0.0, entries)
            entries = tl.where(counts[:, None], entries, float("inf"))
            least = tl.min(entries, axis=0)
            is_least = entries == least[None, :]
            rest = tl.min(tl.where(is_least, float("inf"), entries), axis=0)
            rest = tl.where(tl.sum(is_least.to(tl.int32), axis=0) > 1, least, rest)
            second = tl.minimum(tl.maximum(smallest, least), tl.minimum(second, rest))
            smallest = tl.minimum(smallest, least)
    if inverses is not None:
        tl.store(inverses + (place + own), own_inverse, mask=own < count)
    if state is not None:
        is_usable = _is_finite(own_squares) & _is_finite(own_weights)
        tl.store(state + (place + own), tl.where(is_usable, second, float("-inf")), mask=own < count)


@triton.jit
def _rank(scores, tokens):
    """Integers that are larger for larger scores, then for smaller tokens; the smallest are those of NaN."""
    return (_order_preserving(scores).to(tl.int64) << 31) | (0x7FFFFFFF - tokens).to(tl.int64)


@triton.jit
def _token_of(ranks):
    """The token of the highest rank."""
    return (0x7FFFFFFF - (tl.max(ranks, axis=0) & 0x7FFFFFFF)).to(tl.int32)


@triton.jit
def _cosines(
    features, cosines, inverses, picked, tokens, count, total, width, stride, TILE: tl.constexpr, BLOCK: tl.constexpr
):
    """Cosines of a row's tokens and the picked one; all pointers stand at the row."""
    mask = tokens < count
    if cosines is not None:
        similar = tl.load(cosines + picked.to(tl.int64) * total + tokens, mask=mask, other=0.0)
    else:
        product = tl.zeros([TILE, BLOCK], tl.float32)
        for start in range(0, width, BLOCK):
            values = _load_block(features, tokens, start, count, width, stride, BLOCK).to(tl.float32)
            channels = start + tl.arange(0, BLOCK)
            other = tl.load(features + (picked.to(tl.int64) * stride + channels), mask=channels < width, other=0.0)
            product += values * other.to(tl.float32)[None, :]
        similar = tl.sum(product, axis=1) * tl.load(inverses + tokens, mask=mask, other=0.0)
        similar *= tl.load(inverses + picked)
    return similar


@triton.jit
def _write_picked(index, state, last, count, keep, TILE: tl.constexpr):
    """List the picked tokens of a row, of which the last one is not in the states yet, in order, then -1."""
    written = 0
    for first in range(0, count, TILE):
        tokens = first + tl.arange(0, TILE)
        states = tl.load(state + tokens, mask=tokens < count, other=0.0)
        is_picked = (states != states) | (tokens == last)
        before = tl.cumsum(is_picked.to(tl.int32), axis=0)
        tl.store(index + (written + before - 1), tokens.to(tl.int64), mask=is_picked)
        written += tl.sum(is_picked.to(tl.int32), axis=0)
    _write_filler(index, written, 0, keep, TILE)


def is_kept(features: Tensor) -> bool:
    """Whether the cosines of all pairs of tokens are kept: they take no more floats than there are features."""
    return features.shape[1] <= features.shape[2]


def plan_inputs(plan: Plan, optional: Sequence[int]) -> dict[str, Any]:
    """Arguments of all kernels: the features, first among the inputs, and their layout.

    Args:
        plan: whose inputs hold the features, and others of which a kernel reads contiguous ones.
        optional: numbers of the latter.
    """
    features = plan.tensors[0]
    assert features is not None
    source = as_rows(features)
    if source.data_ptr() != features.data_ptr():
        source = plan.prepare(0, lambda tensors: as_rows(tensors[0]))
    for number in optional:
        tensor = plan.tensors[number]
        if tensor is not None and (tensor.is_neg() or not tensor.is_contiguous()):
            plan.prepare(number, _contiguous(number))
    return {
        "features": Slot(0),
        "total": source.shape[1],
        "width": source.shape[2],
        "stride_features_t": source.stride(0),
        "stride_features_n": source.stride(1),
    }


def _contiguous(number: int) -> Callable[[Sequence[Any]], Tensor]:
    return lambda tensors: as_stored(tensors[number]).contiguous()


def slot_of(plan: Plan, number: int) -> Slot | None:
    """The input, if it is given."""
    return None if plan.tensors[number] is None else Slot(number)


def in_parts(select: Callable[..., Tensor], inputs: Sequence[Tensor | None], keep: int) -> Tensor:
    """The selection of more rows than a grid takes."""
    features, values, lengths = inputs
    assert features is not None
    return torch.cat(
        [
            select(
                features[part],
                None if values is None else values[part],
                keep=keep,
                lengths=None if lengths is None else lengths[part],
            )
            for part in parts_of_batch(features.shape[0])
        ]
    )


def add_comparison(plan: Plan, given: dict[str, Any], **others: Any) -> None:
    """Plan the launch that compares all tokens.

    Args:
        plan: whose first input are the features.
        given, others: its arguments, but for its own sizes.
    """
    features = plan.tensors[0]
    assert features is not None
    rows, total, width = features.shape
    is_half = features.dtype != torch.float32
    tile = COMPARED if is_half else COMPARED // 2
    plan.launch(
        compare_tokens,
        (cdiv(total, tile), rows),
        **given,
        **others,
        TILE=tile,
        BLOCK=max(16, min(64 if is_half else 16, next_power_of_2(width))),  # as registers allow
        WIDENS=not is_half or triton.knobs.runtime.interpret,  # the interpreter multiplies no bfloat16
        num_warps=8,
        num_stages=3,
    )


def loop_sizes(features: Tensor) -> dict[str, int]:
    """Tokens at a time, channels at a time, and warps of a loop over picks."""
    _, total, width = features.shape
    if is_kept(features):
        tile = max(64, min(2048, next_power_of_2(total)))
        return {"TILE": tile, "BLOCK": 1, "num_warps": max(4, min(16, tile // 128))}
    block, num_warps = (64, 8) if features.dtype == torch.float32 else (256, 16)  # as registers allow
    return {"TILE": 64, "BLOCK": min(block, next_power_of_2(width)), "num_warps": num_warps}
