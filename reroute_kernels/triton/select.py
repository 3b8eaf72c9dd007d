"""Exact top-k of each sample and the ordered list of every token that runs, in one launch.

A radix select finds the K-th largest score in four passes over 8-bit digits; one ordered compaction then writes
positions in ascending order, so there is nothing to sort and nothing that depends on the order of execution.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import on_device_of


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
    scores += sample * stride_scores_b
    pool += sample * stride_pool_b
    pinned += sample * stride_pinned_b
    index += sample * index_length
    digits = tl.arange(0, 256)

    # Threshold: the largest value that at least `remaining` candidates reach, digit by digit.
    threshold = tl.full([], 0, tl.uint32)
    remaining = 0
    for digit_pass in tl.static_range(4):
        shift = 24 - 8 * digit_pass
        histogram = tl.zeros([256], tl.int32)
        for start in range(0, length, TILE):
            tokens = start + tl.arange(0, TILE)
            ordered, is_candidate, _ = _load_tile(
                scores, pool, pinned, tokens, length, stride_scores_l, stride_pool_l, stride_pinned_l
            )
            counted = is_candidate
            if digit_pass > 0:
                counted = counted & ((ordered >> (shift + 8)) == (threshold >> (shift + 8)))
            histogram += tl.histogram(((ordered >> shift) & 0xFF).to(tl.int32), 256, mask=counted)
        reached = tl.cumsum(histogram, axis=0, reverse=True)
        if digit_pass == 0:
            candidates = tl.sum(histogram, axis=0)
            remaining = tl.minimum(tl.load(keep + sample).to(tl.int64), candidates.to(tl.int64)).to(tl.int32)
        digit = tl.maximum(tl.sum((reached >= remaining).to(tl.int32), axis=0) - 1, 0)
        remaining -= tl.sum(tl.where(digits > digit, histogram, 0), axis=0)
        threshold |= digit.to(tl.uint32) << shift

    # Ordered compaction: above the threshold, or at it and among the first `remaining` that are.
    written = 0
    at_threshold = 0
    for start in range(0, length, TILE):
        tokens = start + tl.arange(0, TILE)
        ordered, is_candidate, is_pinned = _load_tile(
            scores, pool, pinned, tokens, length, stride_scores_l, stride_pool_l, stride_pinned_l
        )
        equal = (is_candidate & (ordered == threshold)).to(tl.int32)
        place_among_equal = at_threshold + tl.cumsum(equal, axis=0)
        picked = (is_candidate & (ordered > threshold)) | ((equal != 0) & (place_among_equal <= remaining))
        kept = (is_pinned | picked).to(tl.int32)
        place = written + tl.cumsum(kept, axis=0) - 1
        tl.store(index + place, tokens.to(tl.int64), mask=(kept != 0) & (place < index_length))
        at_threshold += tl.sum(equal, axis=0)
        written += tl.sum(kept, axis=0)

    for start in range(0, index_length, TILE):
        places = start + tl.arange(0, TILE)
        filler = tl.full([TILE], -1, tl.int64)
        tl.store(index + places, filler, mask=(places >= written) & (places < index_length))


def select_tokens(scores: Tensor, pool: Tensor, pinned: Tensor, keep: Tensor, length: int) -> Tensor:
    """See `reroute_kernels.ops.select_tokens`."""
    batch, total = scores.shape
    index = torch.empty(batch, length, dtype=torch.int64, device=scores.device)
    if index.numel() == 0:
        return index
    with on_device_of(scores):
        select_and_compact[(batch,)](
            scores,
            pool,
            pinned,
            keep.contiguous(),
            index,
            total,
            length,
            *scores.stride(),
            *pool.stride(),
            *pinned.stride(),
            TILE=max(256, min(2048, triton.next_power_of_2(total))),
            num_warps=8,
        )
    return index
