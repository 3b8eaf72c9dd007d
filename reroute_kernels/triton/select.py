"""Exact top-k of each sample and the ordered list of every token that runs.

The K-th largest score is found by counting; one ordered compaction then writes positions in ascending order, so there
is nothing to sort and nothing that depends on the order of execution. Up to 65,536 tokens it takes one launch, of one
program per sample, which narrows down the range where that score lies: it holds the scores of a short sequence, and
reads those of a longer one anew each time. Still longer ones take five launches, of a program per tile: a radix select
counts each of four 8-bit digits in one, and the last one writes.

With a memory of the decision before, the first launch also makes the scores that rank, and writes them. It needs the
sum of a sample's scores before; in the radix select every program makes it anew, so that no launch is added.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..checks import check_selection
from ..memory import Memory
from .launch import MAX_PROGRAMS, _wait_for_launches_before, as_stored, cdiv, next_power_of_2, parts_of_batch
from .plan import Plan, Slot, find_plan, keep_plan, layout

# Up to this many tokens one program holds a whole sample; up to so many it goes over it tile by tile.
HELD_TOKENS, ONE_PROGRAM_TOKENS = 4096, 65_536
# Tokens at a time of a program that reads a sample several times, and of a program of the radix select.
LONG_TILE = 4096


@triton.jit
def _order_preserving(scores):
    """Unsigned integers that compare as the scores do: -0.0 equals 0.0, and a NaN lies below every number."""
    bits = (scores.to(tl.float32) + 0.0).to(tl.uint32, bitcast=True)
    ordered = tl.where((bits >> 31) != 0, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    return tl.where(scores != scores, 0, ordered).to(tl.uint32)


@triton.jit
def _load_scores(sources, strides, sample, tokens, length):
    """Scores of a sample's `tokens`, which of them are in the pool, and which are pinned."""
    mask, offsets = tokens < length, tokens.to(tl.int64)
    scores = sources[0] + sample * (strides[0] // 16) + offsets * strides[3]
    pool = sources[1] + sample * (strides[1] // 16) + offsets * strides[4]
    pinned = sources[2] + sample * (strides[2] // 16) + offsets * strides[5]
    loaded = tl.load(scores, mask=mask, other=0.0)
    in_pool = tl.load(pool, mask=mask, other=0) != 0
    is_pinned = tl.load(pinned, mask=mask, other=0) != 0
    return loaded, in_pool, is_pinned


@triton.jit
def _of_pool(scores, in_pool):
    """Scores to be summed: in float64 the order of a sum does not show in float32."""
    return tl.where(in_pool, scores, 0.0).to(tl.float64)


@triton.jit
def _sum_of_pool(sources, strides, sample, length, TILE: tl.constexpr):
    """Sum of a sample's scores in the pool."""
    total = tl.zeros([TILE], tl.float64)
    for first in range(0, length, TILE):
        scores, in_pool, _ = _load_scores(sources, strides, sample, first + tl.arange(0, TILE), length)
        total += _of_pool(scores, in_pool)
    return tl.sum(total, axis=0)


@triton.jit
def _remembering(scores, total, memory, sample, tokens, length, MEMORY: tl.constexpr):
    """Scores as shares of their pool's `total`, with what is remembered of each token; they are written, too."""
    remembered, places, ranked, decay, remembered_length = memory
    mask, offsets = tokens < length, sample * length + tokens
    total = total.to(tl.float32)
    is_usable = (total > 0.0) & (total < float("inf"))
    scores = tl.where(is_usable, tl.div_rn(scores, tl.where(is_usable, total, 1.0)), 0.0)
    if MEMORY > 1:
        known, earlier = mask, tokens.to(tl.int64)
        if MEMORY > 2:
            earlier = tl.load(places + offsets, mask=mask, other=-1)
            known = (earlier >= 0) & (earlier < remembered_length)
        scores += decay * tl.load(remembered + sample * remembered_length + earlier, mask=known, other=0.0)
    tl.store(ranked + offsets, scores, mask=mask)
    return scores


@triton.jit
def _load_tile(sources, strides, sample, tokens, length, total, memory, MEMORY: tl.constexpr):
    """Sortable scores of a sample's `tokens`, which of them are candidates, and which are pinned."""
    scores, in_pool, is_pinned = _load_scores(sources, strides, sample, tokens, length)
    if MEMORY > 0:
        scores = _remembering(scores, total, memory, sample, tokens, length, MEMORY)
    return _order_preserving(scores), in_pool & (is_pinned == 0), is_pinned


@triton.jit
def _digit_counts(ordered, is_candidate, threshold, DIGIT: tl.constexpr):
    """How many candidates have each value of a digit, among those that share the threshold's higher digits."""
    shift = 24 - 8 * DIGIT
    counted = is_candidate
    if DIGIT > 0:
        counted = counted & ((ordered >> (shift + 8)) == (threshold >> (shift + 8)))
    return tl.histogram(((ordered >> shift) & 0xFF).to(tl.int32), 256, mask=counted)


@triton.jit
def _wanted(keep, candidates):
    """Candidates to select: as many as asked for, or all; a negative count asks for none."""
    return tl.minimum(tl.maximum(tl.load(keep).to(tl.int64), 0), candidates.to(tl.int64)).to(tl.int32)


@triton.jit
def _threshold_digit(histogram, remaining):
    """The largest digit that at least `remaining` reach."""
    reached = tl.cumsum(histogram, axis=0, reverse=True)
    return tl.maximum(tl.sum((reached >= remaining).to(tl.int32), axis=0) - 1, 0)


@triton.jit
def _write_kept(index, tokens, certain, equal, remaining, certain_before, equal_before, index_length):
    """Write the positions of a tile's kept tokens.

    `certain` tokens are kept; of those `equal` to the threshold, in all tiles together, the first `remaining` are.
    """
    both = certain.to(tl.int32) + (equal.to(tl.int32) << 16)  # a tile has fewer than 2**16 tokens: one scan counts both
    counts = tl.cumsum(both, axis=0)
    certain_so_far = certain_before + (counts & 0xFFFF)
    equal_so_far = equal_before + (counts >> 16)
    place = certain_so_far + tl.minimum(equal_so_far, remaining) - 1
    kept = certain | (equal & (equal_so_far <= remaining))
    tl.store(index + place, tokens.to(tl.int64), mask=kept & (place < index_length))


@triton.jit
def _write_filler(index, written, first, index_length, TILE: tl.constexpr):
    for start in range(first, index_length, TILE):
        places = start + tl.arange(0, TILE)
        filler = tl.full([TILE], -1, tl.int64)
        tl.store(index + places, filler, mask=(places >= written) & (places < index_length))


@triton.jit(do_not_specialize=["length", "index_length", "remembered_length"])
def select_and_compact(
    sources,  # scores, pool and pinned, each [B, L]
    keep,  # [B]
    index,  # [B, M] contiguous
    remembered,  # [B, P] contiguous, or None, as the next three
    places,  # [B, L] contiguous, of the tokens in `remembered`
    ranked,  # [B, L] contiguous
    decay,
    length,
    index_length,
    remembered_length,
    strides,  # of the sources, see `_source_strides`
    TILE: tl.constexpr,
    PARTS: tl.constexpr,  # that the range of the last selected score is cut into at a time
    MEMORY: tl.constexpr,  # 0: none; 1: nothing remembered yet; 2: at the same places; 3: at `places`
    FOLLOWS: tl.constexpr,
):
    """Narrows down where the last selected score lies, until exactly the wanted reach it or a single score is left.

    `reached` candidates are at `low` or above, as many as are wanted or more; `above` of them at `high` or above, fewer
    than are wanted. (Where `low` is 0, the place of a NaN, other tokens count as well; then one score is left at last.)
    """
    _wait_for_launches_before(FOLLOWS)
    sample = tl.program_id(0).to(tl.int64)
    index += sample * index_length
    tokens = tl.arange(0, TILE)
    scores, in_pool, is_pinned = _load_scores(sources, strides, sample, tokens, length)
    if MEMORY > 0:
        total = tl.sum(_of_pool(scores, in_pool), axis=0)
        memory = (remembered, places, ranked, decay, remembered_length)
        scores = _remembering(scores, total, memory, sample, tokens, length, MEMORY)
    is_candidate = in_pool & (is_pinned == 0)
    ordered = tl.where(is_candidate, _order_preserving(scores), 0).to(tl.uint32)
    both = tl.sum(is_candidate.to(tl.int32) + (is_pinned.to(tl.int32) << 16), axis=0)
    low = tl.min(tl.where(is_candidate, ordered, 0xFFFFFFFF).to(tl.uint32), axis=0)
    high = tl.max(ordered, axis=0) + 1
    reached, above = both & 0xFFFF, 0
    wanted = _wanted(keep + sample, reached)
    parts = tl.arange(0, PARTS)
    while (wanted > 0) & (reached != wanted) & (high - low > 1):
        part = (high - low + (PARTS - 1)) // PARTS
        bounds = low + parts.to(tl.uint32) * part
        reach = tl.sum((ordered[:, None] >= bounds[None, :]).to(tl.int32), axis=0)
        is_low = reach >= wanted  # at the first bound always, which is `low`
        reached = tl.min(tl.where(is_low, reach, TILE), axis=0)
        above = tl.maximum(above, tl.max(tl.where(is_low, 0, reach), axis=0))
        low += (tl.sum(is_low.to(tl.int32), axis=0) - 1).to(tl.uint32) * part
        high = tl.minimum(high, low + part)
    certain = is_pinned | (ordered >= high)
    equal = is_candidate & (ordered >= low) & (ordered < high)
    _write_kept(index, tokens, certain, equal, wanted - above, 0, 0, index_length)
    _write_filler(index, (both >> 16) + wanted, 0, index_length, TILE)


@triton.jit(do_not_specialize=["length", "index_length", "remembered_length"])
def select_in_passes(
    sources,  # scores, pool and pinned, each [B, L]
    keep,  # [B]
    codes,  # [B, whole tiles] contiguous: what the passes after the first one read
    index,  # [B, M] contiguous
    remembered,  # as in `select_and_compact`, and the next three
    places,
    ranked,
    decay,
    length,
    index_length,
    remembered_length,
    strides,  # of the sources, see `_source_strides`
    stride_codes,
    TILE: tl.constexpr,
    MEMORY: tl.constexpr,  # as in `select_and_compact`
    FOLLOWS: tl.constexpr,
):
    """As `select_and_compact`, for more tokens than a program holds, at most 255 tiles.

    The code of a candidate is its sortable score, at least 1; that of a pinned token is above them all, of any other
    token 0. So pinned tokens are selected first, and no pass reads flags again. Each pass cuts the range of the last
    selected code into eight parts, and counts each of them in 8 bits of an integer for every place of a tile.
    """
    _wait_for_launches_before(FOLLOWS)
    sample = tl.program_id(0).to(tl.int64)
    index += sample * index_length
    codes += sample * stride_codes
    lowest = tl.full([TILE], 0xFFFFFFFF, tl.uint32)
    highest = tl.zeros([TILE], tl.uint32)
    candidates, always = tl.zeros([TILE], tl.int32), tl.zeros([TILE], tl.int32)
    total = 0.0
    if MEMORY > 0:
        total = _sum_of_pool(sources, strides, sample, length, TILE)
    memory = (remembered, places, ranked, decay, remembered_length)
    for first in range(0, length, TILE):
        tokens = first + tl.arange(0, TILE)
        ordered, is_candidate, is_pinned = _load_tile(sources, strides, sample, tokens, length, total, memory, MEMORY)
        ordered = tl.maximum(ordered, 1).to(tl.uint32)
        code = tl.where(is_candidate, ordered, tl.where(is_pinned, 0xFFFFFFFF, 0)).to(tl.uint32)
        tl.store(codes + tokens, code.to(tl.int32, bitcast=True))
        candidates += is_candidate.to(tl.int32)
        always += is_pinned.to(tl.int32)
        lowest = tl.minimum(lowest, tl.where(is_candidate, ordered, 0xFFFFFFFF).to(tl.uint32))
        highest = tl.maximum(highest, tl.where(is_candidate, ordered, 0).to(tl.uint32))
    tl.debug_barrier()  # the passes that follow need not read in the threads that wrote
    reached, above = tl.sum(candidates, axis=0), tl.sum(always, axis=0)
    wanted = above + _wanted(keep + sample, reached)
    reached += above
    low, high = tl.min(lowest, axis=0).to(tl.int64), tl.max(highest, axis=0).to(tl.int64) + 1
    narrows = wanted > above
    # `above` codes are at `high` or more, fewer than are wanted; `reached` at `low` or more, as many or more.
    parts = tl.arange(0, 8)
    shift = tl.maximum(tl.sum(((high - low - 1) >> tl.arange(0, 32) > 0).to(tl.int32), axis=0) - 3, 0)
    while narrows & (reached != wanted) & (high - low > 1):
        start = low.to(tl.uint32)
        counted = tl.zeros([TILE], tl.int64)
        for first in range(0, length, TILE):
            tokens = first + tl.arange(0, TILE)
            code = tl.load(codes + tokens).to(tl.uint32, bitcast=True)
            part = tl.minimum((tl.maximum(code, start) - start) >> shift.to(tl.uint32), 7)
            counted += tl.full([TILE], 1, tl.int64) << (part * 8).to(tl.int64)
        count = tl.sum(((counted[:, None] >> (parts * 8)[None, :]) & 0xFF).to(tl.int32), axis=0)
        reach = tl.cumsum(count, axis=0, reverse=True)
        reach = tl.where(parts == 0, reached, reach)  # nor are there any below `low` among those
        is_low = reach >= wanted
        reached = tl.min(tl.where(is_low, reach, 0x7FFFFFFF), axis=0)
        above = tl.maximum(above, tl.max(tl.where(is_low, 0, reach), axis=0))
        low += (tl.sum(is_low.to(tl.int64), axis=0) - 1) << shift
        high = tl.minimum(high, low + (tl.full([], 1, tl.int64) << shift))
        shift = tl.maximum(shift - 3, 0)
    certain_before, equal_before = 0, 0
    low, high = low.to(tl.uint32), high.to(tl.uint32)
    for first in range(0, length, TILE):
        tokens = first + tl.arange(0, TILE)
        code = tl.load(codes + tokens).to(tl.uint32, bitcast=True)
        certain = code >= high
        equal = (code >= low) & (code < high)
        _write_kept(index, tokens, certain, equal, wanted - above, certain_before, equal_before, index_length)
        certain_before += tl.sum(certain.to(tl.int32), axis=0)
        equal_before += tl.sum(equal.to(tl.int32), axis=0)
    _write_filler(index, wanted, 0, index_length, TILE)


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
        remaining = _wanted(keep, tl.sum(histogram, axis=0))
    else:
        threshold = tl.load(state + 2 * (DIGITS - 2)).to(tl.uint32, bitcast=True)
        remaining = tl.load(state + 2 * (DIGITS - 2) + 1)
    digit = _threshold_digit(histogram, remaining)
    remaining -= tl.sum(tl.where(digits > digit, histogram, 0), axis=0)
    threshold |= digit.to(tl.uint32) << (32 - 8 * DIGITS)
    return threshold, remaining, digit


@triton.jit(do_not_specialize=["length", "remembered_length"])
def count_digits(
    sources,  # scores, pool and pinned, each [B, L]
    keep,  # [B]
    counts,  # [4, B, tiles, 256] contiguous: candidates by the digit of each pass
    certain,  # [B, tiles] contiguous: tokens of a tile that are known to be kept
    state,  # [B, 3, 2] contiguous: threshold and remaining candidates after each pass
    remembered,  # as in `select_and_compact`, and the next three
    places,
    ranked,
    decay,
    length,
    remembered_length,
    strides,  # of the sources, see `_source_strides`
    TILE: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    MEMORY: tl.constexpr,  # as in `select_and_compact`; the passes after the first one read `ranked` for scores
    FOLLOWS: tl.constexpr,
    DIGIT: tl.constexpr,
):
    _wait_for_launches_before(FOLLOWS)
    tile, tiles = tl.program_id(0), tl.num_programs(0)
    sample, batch = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    digits = tl.arange(0, 256)
    tokens = tile * TILE + tl.arange(0, TILE)
    total = 0.0
    if MEMORY > 0:
        total = _sum_of_pool(sources, strides, sample, length, TILE)
    memory = (remembered, places, ranked, decay, remembered_length)
    ordered, is_candidate, is_pinned = _load_tile(sources, strides, sample, tokens, length, total, memory, MEMORY)
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


@triton.jit(do_not_specialize=["length", "index_length"])
def compact_tiles(
    sources,  # scores, pool and pinned, each [B, L]
    keep,  # [B]
    counts,  # [4, B, tiles, 256] contiguous
    certain,  # [B, tiles] contiguous
    state,  # [B, 3, 2] contiguous
    index,  # [B, M] contiguous
    length,
    index_length,
    strides,  # of the sources, see `_source_strides`
    TILE: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    FOLLOWS: tl.constexpr,
):
    _wait_for_launches_before(FOLLOWS)
    tile, tiles = tl.program_id(0), tl.num_programs(0)
    sample, batch = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    digits = tl.arange(0, 256)[None, :]
    tokens = tile * TILE + tl.arange(0, TILE)
    ordered, is_candidate, is_pinned = _load_tile(sources, strides, sample, tokens, length, 0.0, None, 0)
    last_counts = counts + (3 * (batch * tiles).to(tl.int64) + sample * tiles) * 256
    threshold, remaining, digit = _threshold_so_far(
        keep + sample, last_counts, state + sample * 6, tiles, 4, BLOCK_TILES
    )

    # Tokens above the threshold, and at it, in the tiles before this one and in all tiles.
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
    certain = is_pinned | (is_candidate & (ordered > threshold))
    equal = is_candidate & (ordered == threshold)
    _write_kept(index, tokens, certain, equal, remaining, certain_before, equal_before, index_length)
    if tile == 0:
        _write_filler(index, certain_in_all + tl.minimum(equal_in_all, remaining), 0, index_length, TILE)


def select_tokens(
    scores: Tensor, pool: Tensor, pinned: Tensor, keep: Tensor, length: int, memory: Memory | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """See `reroute_kernels.ops.select_tokens`."""
    remembered, decay = ((), None) if memory is None else (memory.operands(), memory.decay)
    inputs = scores, pool, pinned, keep, *remembered
    key = "select", length, decay, layout(inputs)
    plan = find_plan(key)
    if plan is None:
        check_selection(scores, pool, pinned, keep, length, memory)
        batch = scores.shape[0]
        if batch > MAX_PROGRAMS:
            return _in_parts(scores, pool, pinned, keep, length, memory)
        plan = Plan(inputs)
        if scores.is_neg():
            scores = plan.prepare(0, lambda tensors: as_stored(tensors[0]))
        add_selection(plan, Slot(0), scores.stride(), 1, length, decay)
        keep_plan(key, plan)
    results = plan.run(inputs)
    return results[0] if memory is None else (results[0], results[1])


def _in_parts(scores, pool, pinned, keep, length, memory):
    """The selection of a batch that is too large for a grid."""
    parts = [
        select_tokens(scores[s], pool[s], pinned[s], keep[s], length, memory and memory.samples(s))
        for s in parts_of_batch(scores.shape[0])
    ]
    return torch.cat(parts) if memory is None else tuple(map(torch.cat, zip(*parts, strict=True)))


def add_selection(
    plan: Plan,
    scores: Slot,
    score_strides: tuple[int, ...],
    first: int,
    length: int,
    decay: float | None = None,
) -> Slot:
    """Plan a selection, which is a result; with a memory the scores that rank are the next one.

    Args:
        plan: whose inputs hold `pool`, `pinned` and `keep`.
        scores: (B, L).
        score_strides: their strides.
        first: number of `pool` among the inputs; `pinned` and `keep` follow, and with a memory its tensors.
        length: M.
        decay: of the memory; None without one.

    Returns:
        (B, M), the kept index.
    """
    pool, pinned, keep = plan.tensors[first : first + 3]
    assert pool is not None
    assert pinned is not None
    assert keep is not None
    batch, total = pool.shape
    index = plan.result(batch, length, dtype=torch.int64)
    memory = _planned_memory(plan, first + 3, (batch, total), decay)
    if batch * (length if decay is None else length + total) == 0:
        return index
    if not keep.is_contiguous():
        plan.prepare(first + 2, lambda tensors: tensors[first + 2].contiguous())
    given: dict[str, Any] = {
        "sources": (scores, Slot(first), Slot(first + 1)),
        "strides": _source_strides(score_strides, pool.stride(), pinned.stride()),
        "keep": Slot(first + 2),
        "length": total,
        "num_warps": 8,
    }
    written = {"index": index, "index_length": length}
    if total <= HELD_TOKENS:
        tile = max(256, next_power_of_2(total))
        given["num_warps"] = 16 if tile > 2048 else 8  # as registers allow
        plan.launch(select_and_compact, (batch,), **given, **written, **memory, TILE=tile, PARTS=4)
        return index
    if total <= ONE_PROGRAM_TOKENS:
        padded = cdiv(total, LONG_TILE) * LONG_TILE
        given |= {
            "codes": plan.scratch(batch, padded, dtype=torch.int32),
            "stride_codes": padded,
            "num_warps": 32 if plan.is_cuda else 16,  # 1,024 threads
        }
        plan.launch(select_in_passes, (batch,), **given, **written, **memory, TILE=LONG_TILE)
        return index
    tiles = cdiv(total, LONG_TILE)
    given |= {
        "counts": plan.scratch(4, batch, tiles, 256, dtype=torch.int32),
        "certain": plan.scratch(batch, tiles, dtype=torch.int32),
        "state": plan.scratch(batch, 3, 2, dtype=torch.int32),
        "TILE": LONG_TILE,
        "BLOCK_TILES": 4,
    }
    for digit in range(4):
        plan.launch(count_digits, (tiles, batch), **given, **memory, DIGIT=digit)
        if memory["MEMORY"]:  # the scores are made, and the next passes read them
            given["sources"] = memory["ranked"], *given["sources"][1:]
            given["strides"] = _source_strides((total, 1), pool.stride(), pinned.stride())
            memory = _planned_memory(plan, first + 3, (batch, total), None)
    plan.launch(compact_tiles, (tiles, batch), **given, **written)
    return index


def _planned_memory(plan: Plan, first: int, shape: tuple[int, ...], decay: float | None) -> dict[str, Any]:
    """Arguments of a kernel for a memory, whose scores are a result.

    Args:
        plan: whose inputs hold the tensors of the memory.
        first: number of the first of them.
        shape: (B, L).
        decay: of the memory; None without one.
    """
    if decay is None:
        return dict.fromkeys(("remembered", "places", "ranked")) | {"decay": 0.0, "remembered_length": 0, "MEMORY": 0}
    slots: list[Slot | None] = []
    for number in (first, first + 1):
        tensor = plan.tensors[number]
        slots.append(None if tensor is None else Slot(number))
        if tensor is not None and (tensor.is_neg() or not tensor.is_contiguous()):
            plan.prepare(number, _contiguous(number))
    remembered = plan.tensors[first]
    return {
        "remembered": slots[0],
        "places": slots[1],
        "ranked": plan.result(*shape, dtype=torch.float32),
        "decay": float(decay),
        "remembered_length": 0 if remembered is None else remembered.shape[1],
        "MEMORY": 1 + sum(slot is not None for slot in slots),
    }


def _contiguous(number: int) -> Callable[[Sequence[Any]], Tensor]:
    return lambda tensors: as_stored(tensors[number]).contiguous()


def _source_strides(*strides: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of samples, then of tokens; the former times 16, or kernels would differ by whether 16 divides them."""
    return *(16 * stride for stride, _ in strides), *(stride for _, stride in strides)
