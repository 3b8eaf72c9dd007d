"""Exact top-k of each sample and the ordered list of every token that runs.

A radix select finds the K-th largest score in four passes over 8-bit digits; one ordered compaction then writes
positions in ascending order, so there is nothing to sort and nothing that depends on the order of execution. Short
sequences take one launch, of one program per sample; long ones five, of a program per tile: one for each digit, which
counts it in every tile, and one that writes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import cdiv, next_power_of_2, on_device_of

# Up to this many tokens one program selects as fast as five launches would start.
ONE_PROGRAM_TOKENS = 4096
# Tokens that a program of a long sequence holds at a time, between these limits by the length alone.
MIN_TILE, MAX_TILE = 2048, 4096


@triton.jit
def _order_preserving(scores):
    """Unsigned integers that compare as the scores do: -0.0 equals 0.0, and a NaN lies below every number."""
    bits = (scores + 0.0).to(tl.uint32, bitcast=True)
    ordered = tl.where((bits >> 31) != 0, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    return tl.where(scores != scores, 0, ordered).to(tl.uint32)


@triton.jit
def _load_tile(scores, pool, pinned, tokens, length, stride_scores, stride_pool, stride_pinned):
    """Sortable scores, candidates and pinned tokens of one tile; pointers stand at the sample's first token."""
    mask = tokens < length
    offsets = tokens.to(tl.int64)
    ordered = _order_preserving(tl.load(scores + offsets * stride_scores, mask=mask, other=0.0).to(tl.float32))
    is_pinned = tl.load(pinned + offsets * stride_pinned, mask=mask, other=0) != 0
    is_candidate = (tl.load(pool + offsets * stride_pool, mask=mask, other=0) != 0) & (is_pinned == 0)
    return ordered, is_candidate, is_pinned


@triton.jit
def _digit_counts(ordered, is_candidate, threshold, DIGIT: tl.constexpr):
    """How many candidates have each value of a digit, among those that share the threshold's higher digits."""
    shift = 24 - 8 * DIGIT
    counted = is_candidate
    if DIGIT > 0:
        counted = counted & ((ordered >> (shift + 8)) == (threshold >> (shift + 8)))
    return tl.histogram(((ordered >> shift) & 0xFF).to(tl.int32), 256, mask=counted)


@triton.jit
def _wanted(keep, histogram):
    """Candidates to select: as many as asked for, or all; a negative count asks for none."""
    asked = tl.maximum(tl.load(keep).to(tl.int64), 0)
    return tl.minimum(asked, tl.sum(histogram, axis=0).to(tl.int64)).to(tl.int32)


@triton.jit
def _threshold_digit(histogram, remaining):
    """The largest digit that at least `remaining` reach."""
    reached = tl.cumsum(histogram, axis=0, reverse=True)
    return tl.maximum(tl.sum((reached >= remaining).to(tl.int32), axis=0) - 1, 0)


@triton.jit
def _write_kept(
    index, tokens, ordered, is_candidate, is_pinned, threshold, remaining, equal_before, kept_before, index_length
):
    """Write a tile's kept positions; returns how many it keeps, and how many candidates are at the threshold."""
    equal = (is_candidate & (ordered == threshold)).to(tl.int32)
    # Above the threshold, or at it and among the first `remaining` that are.
    picked = is_candidate & (ordered > threshold)
    picked = picked | ((equal != 0) & (equal_before + tl.cumsum(equal, axis=0) <= remaining))
    kept = (is_pinned | picked).to(tl.int32)
    place = kept_before + tl.cumsum(kept, axis=0) - 1
    tl.store(index + place, tokens.to(tl.int64), mask=(kept != 0) & (place < index_length))
    return tl.sum(kept, axis=0), tl.sum(equal, axis=0)


@triton.jit
def select_in_one_program(
    scores,
    pool,
    pinned,
    keep,
    index,
    length,
    index_length,
    stride_scores,
    stride_pool,
    stride_pinned,
    TILE: tl.constexpr,
):
    """Select from one sample; pointers stand at its first elements."""
    digits = tl.arange(0, 256)
    threshold = tl.full([], 0, tl.uint32)
    remaining = 0
    for digit_pass in tl.static_range(4):
        histogram = tl.zeros([256], tl.int32)
        for start in range(0, length, TILE):
            tokens = start + tl.arange(0, TILE)
            ordered, is_candidate, _ = _load_tile(
                scores, pool, pinned, tokens, length, stride_scores, stride_pool, stride_pinned
            )
            histogram += _digit_counts(ordered, is_candidate, threshold, digit_pass)
        if digit_pass == 0:
            remaining = _wanted(keep, histogram)
        digit = _threshold_digit(histogram, remaining)
        remaining -= tl.sum(tl.where(digits > digit, histogram, 0), axis=0)
        threshold |= digit.to(tl.uint32) << (24 - 8 * digit_pass)

    written = 0
    at_threshold = 0
    for start in range(0, length, TILE):
        tokens = start + tl.arange(0, TILE)
        ordered, is_candidate, is_pinned = _load_tile(
            scores, pool, pinned, tokens, length, stride_scores, stride_pool, stride_pinned
        )
        kept, equal = _write_kept(
            index,
            tokens,
            ordered,
            is_candidate,
            is_pinned,
            threshold,
            remaining,
            at_threshold,
            written,
            index_length,
        )
        written += kept
        at_threshold += equal
    _write_filler(index, written, 0, index_length, TILE)


@triton.jit
def _write_filler(index, written, first, index_length, TILE: tl.constexpr):
    for start in range(first, index_length, TILE):
        places = start + tl.arange(0, TILE)
        filler = tl.full([TILE], -1, tl.int64)
        tl.store(index + places, filler, mask=(places >= written) & (places < index_length))


@triton.jit
def select_and_compact(
    scores,  # [B, L]
    pool,  # [B, L]
    pinned,  # [B, L]
    keep,  # [B]
    index,  # [B, M] contiguous
    length,
    index_length,
    stride_scores_b,
    stride_scores_l,
    stride_pool_b,
    stride_pool_l,
    stride_pinned_b,
    stride_pinned_l,
    TILE: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64)
    select_in_one_program(
        scores + sample * stride_scores_b,
        pool + sample * stride_pool_b,
        pinned + sample * stride_pinned_b,
        keep + sample,
        index + sample * index_length,
        length,
        index_length,
        stride_scores_l,
        stride_pool_l,
        stride_pinned_l,
        TILE,
    )


@triton.jit
def _threshold_so_far(keep, counts, state, tiles, DIGITS: tl.constexpr, BLOCK_TILES: tl.constexpr):
    """Threshold and remaining candidates after DIGITS digits; `counts`, `state` stand at the sample.

    `state` holds them after one digit less, `counts` every tile's histogram of the latest digit.
    """
    digits = tl.arange(0, 256)
    histogram = tl.zeros([256], tl.int32)
    for first in range(0, tiles, BLOCK_TILES):
        tile = first + tl.arange(0, BLOCK_TILES)[:, None]
        histogram += tl.sum(tl.load(counts + tile * 256 + digits[None, :], mask=tile < tiles, other=0), axis=0)
    if DIGITS == 1:
        threshold = tl.full([], 0, tl.uint32)
        remaining = _wanted(keep, histogram)
    else:
        threshold = tl.load(state + 2 * (DIGITS - 2)).to(tl.uint32, bitcast=True)
        remaining = tl.load(state + 2 * (DIGITS - 2) + 1)
    digit = _threshold_digit(histogram, remaining)
    remaining -= tl.sum(tl.where(digits > digit, histogram, 0), axis=0)
    threshold |= digit.to(tl.uint32) << (32 - 8 * DIGITS)
    return threshold, remaining, digit


@triton.jit
def count_digits(
    scores,  # [B, L]
    pool,  # [B, L]
    pinned,  # [B, L]
    keep,  # [B]
    counts,  # [4, B, tiles, 256] contiguous: candidates by the digit of each pass
    certain,  # [B, tiles] contiguous: tokens of a tile that are known to be kept
    state,  # [B, 3, 2] contiguous: threshold and remaining candidates after each pass
    length,
    stride_scores_b,
    stride_scores_l,
    stride_pool_b,
    stride_pool_l,
    stride_pinned_b,
    stride_pinned_l,
    DIGIT: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
):
    tile, tiles = tl.program_id(0), tl.num_programs(0)
    sample, batch = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    digits = tl.arange(0, 256)
    tokens = tile * TILE + tl.arange(0, TILE)
    ordered, is_candidate, is_pinned = _load_tile(
        scores + sample * stride_scores_b,
        pool + sample * stride_pool_b,
        pinned + sample * stride_pinned_b,
        tokens,
        length,
        stride_scores_l,
        stride_pool_l,
        stride_pinned_l,
    )
    here = sample * tiles + tile
    threshold = tl.full([], 0, tl.uint32)
    if DIGIT == 0:
        tl.store(certain + here, tl.sum(is_pinned.to(tl.int32), axis=0))
    else:
        before = counts + (DIGIT - 1) * (batch * tiles).to(tl.int64) * 256
        threshold, remaining, digit = _threshold_so_far(
            keep + sample, before + sample * tiles * 256, state + sample * 6, tiles, DIGIT, BLOCK_TILES
        )
        own = tl.load(before + here * 256 + digits)
        above = tl.sum(tl.where(digits > digit, own, 0), axis=0)
        tl.store(certain + here, tl.load(certain + here) + above)
        if tile == 0:
            tl.store(state + sample * 6 + 2 * (DIGIT - 1), threshold.to(tl.int32, bitcast=True))
            tl.store(state + sample * 6 + 2 * (DIGIT - 1) + 1, remaining)
    after = counts + DIGIT * (batch * tiles).to(tl.int64) * 256
    tl.store(after + here * 256 + digits, _digit_counts(ordered, is_candidate, threshold, DIGIT))


@triton.jit
def compact_tiles(
    scores,  # [B, L]
    pool,  # [B, L]
    pinned,  # [B, L]
    keep,  # [B]
    counts,  # [4, B, tiles, 256] contiguous
    certain,  # [B, tiles] contiguous
    state,  # [B, 3, 2] contiguous
    index,  # [B, M] contiguous
    length,
    index_length,
    stride_scores_b,
    stride_scores_l,
    stride_pool_b,
    stride_pool_l,
    stride_pinned_b,
    stride_pinned_l,
    TILE: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
):
    tile, tiles = tl.program_id(0), tl.num_programs(0)
    sample, batch = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    digits = tl.arange(0, 256)[None, :]
    tokens = tile * TILE + tl.arange(0, TILE)
    ordered, is_candidate, is_pinned = _load_tile(
        scores + sample * stride_scores_b,
        pool + sample * stride_pool_b,
        pinned + sample * stride_pinned_b,
        tokens,
        length,
        stride_scores_l,
        stride_pool_l,
        stride_pinned_l,
    )
    last_counts = counts + (3 * (batch * tiles).to(tl.int64) + sample * tiles) * 256
    threshold, remaining, digit = _threshold_so_far(
        keep + sample, last_counts, state + sample * 6, tiles, 4, BLOCK_TILES
    )

    # What the tiles before this one, and all tiles, keep for certain and have at the threshold.
    certain_before, certain_in_all, equal_before, equal_in_all = 0, 0, 0, 0
    for first in range(0, tiles, BLOCK_TILES):
        other = first + tl.arange(0, BLOCK_TILES)
        histograms = tl.load(last_counts + other[:, None] * 256 + digits, mask=(other < tiles)[:, None], other=0)
        surely = tl.load(certain + sample * tiles + other, mask=other < tiles, other=0)
        surely += tl.sum(tl.where(digits > digit, histograms, 0), axis=1)
        equal = tl.sum(tl.where(digits == digit, histograms, 0), axis=1)
        certain_before += tl.sum(tl.where(other < tile, surely, 0), axis=0)
        certain_in_all += tl.sum(surely, axis=0)
        equal_before += tl.sum(tl.where(other < tile, equal, 0), axis=0)
        equal_in_all += tl.sum(equal, axis=0)

    index += sample * index_length
    kept_before = certain_before + tl.minimum(equal_before, remaining)
    _write_kept(
        index,
        tokens,
        ordered,
        is_candidate,
        is_pinned,
        threshold,
        remaining,
        equal_before,
        kept_before,
        index_length,
    )
    if tile == 0:
        _write_filler(index, certain_in_all + tl.minimum(equal_in_all, remaining), 0, index_length, TILE)


def select_tile(length: int) -> int:
    """Tokens that the one program of a sample holds at a time."""
    return max(256, min(2048, next_power_of_2(length)))


def select_tokens(scores: Tensor, pool: Tensor, pinned: Tensor, keep: Tensor, length: int) -> Tensor:
    """See `reroute_kernels.ops.select_tokens`."""
    batch, total = scores.shape
    index = torch.empty(batch, length, dtype=torch.int64, device=scores.device)
    if index.numel() == 0:
        return index
    keep = keep.contiguous()
    strides = (*scores.stride(), *pool.stride(), *pinned.stride())
    with on_device_of(scores):
        if total <= ONE_PROGRAM_TOKENS:
            select_and_compact[(batch,)](
                scores, pool, pinned, keep, index, total, length, *strides, TILE=select_tile(total), num_warps=8
            )
            return index
        tile = max(MIN_TILE, min(MAX_TILE, next_power_of_2(total) // 32))
        tiles = cdiv(total, tile)
        counts = torch.empty(4, batch, tiles, 256, dtype=torch.int32, device=scores.device)
        certain = torch.empty(batch, tiles, dtype=torch.int32, device=scores.device)
        state = torch.empty(batch, 3, 2, dtype=torch.int32, device=scores.device)
        blocks = {"TILE": tile, "BLOCK_TILES": 4, "num_warps": 8}
        for digit in range(4):
            count_digits[(tiles, batch)](
                scores, pool, pinned, keep, counts, certain, state, total, *strides, DIGIT=digit, **blocks
            )
        compact_tiles[(tiles, batch)](
            scores, pool, pinned, keep, counts, certain, state, index, total, length, *strides, **blocks
        )
    return index
