"""One routed forward: which tokens run in which stage, and what goes in and out of the compact sequence.

Nothing here knows a model: tensors come in, a ranking is a callable, and the kernels do the work.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from . import ops
from .policy import Policy

# What `ops.rank_tokens` takes to score the tokens of a sequence, from (hidden, tables, key mask or None, last token of
# each sample or None).
Ranking = Callable[[Tensor, "tuple[Tensor, ...]", "Tensor | None", "Tensor | None"], "dict[str, object]"]

# Scores by all heads, from (scores by the heads that this process has, how heads are reduced: "mean" or "max").
Combine = Callable[[Tensor, str], Tensor]


def _on(device: torch.device, tensor: Tensor | None) -> Tensor | None:
    """The tensor on a device; nothing is called where it is there already."""
    return tensor if tensor is None or tensor.device == device else tensor.to(device)


class Prompt:
    """Where the visual and text tokens of a batch stand, and how many there are.

    Reading the counts is the one transfer from the device that a routed prefill makes.

    Args:
        visual: (B, L) bool, positions that hold image or video features.
        valid: (B, L) bool, False at padding; None where there is none.
        positions: (B or 1, L), to find out whether they count by one; None not to ask.
    """

    def __init__(self, visual: Tensor, valid: Tensor | None, positions: Tensor | None = None):
        self.length = visual.shape[1]
        places = torch.arange(self.length, device=visual.device)
        if valid is None:
            valid = torch.ones_like(visual)
        visual = visual & valid
        last = torch.where(valid, places, -1).amax(dim=1)  # [B]
        is_last = places == last[:, None]
        # The next token is predicted from the last one, so it runs whatever it is.
        self.pinned = (valid & ~visual) | is_last
        self.pool = visual & ~is_last
        self.visual = visual
        gaps = torch.zeros_like(last) if positions is None else (positions.diff(dim=1) != 1).sum(1).expand_as(last)
        counts = torch.stack(
            [visual.sum(1), self.pool.sum(1), self.pinned.sum(1), valid.sum(1), self.length - 1 - last, gaps]
        ).tolist()
        self.visual_counts, self.pool_counts, self.pinned_counts, self.valid_counts, trailing, gaps = counts
        self.has_gaps = max(gaps) > 0
        self.padded = min(self.valid_counts) < self.length
        self.right_padded = max(trailing) > 0
        self.valid = valid if self.padded else None
        self.last = last if self.padded else None

    @property
    def has_visual_tokens(self) -> bool:
        return any(self.visual_counts)


@dataclass
class Sequence:
    """Tokens in order: hidden states with everything else that is per token.

    hidden: (B, L, d); tables: tensors (B, L, ...); pool, pinned: (B, L) bool; valid: (B, L) bool, or None where all
    are; last: (B,) place of each sample's last token, or None where it is the last of the row; kept: (B, L) positions
    in the full sequence, or None where this is the full sequence.
    """

    hidden: Tensor
    tables: tuple[Tensor, ...]
    pool: Tensor
    pinned: Tensor
    valid: Tensor | None
    last: Tensor | None
    kept: Tensor | None

    def to(self, device: torch.device) -> Sequence:
        flags = (self.pool, self.pinned, self.valid, self.last, self.kept)
        return Sequence(
            _on(device, self.hidden),
            tuple(_on(device, table) for table in self.tables),
            *(_on(device, tensor) for tensor in flags),
        )


class RoutedForward:
    """The state of one routed prefill, from its first decision until the full sequence is restored.

    It follows the hidden states from device to device.

    Args:
        policy: what to route.
        prompt: the batch that is prefilled.
        combine: completes the scores where heads are split over processes; None where each has all heads.
    """

    def __init__(self, policy: Policy, prompt: Prompt, combine: Combine | None = None):
        self.policy = policy
        self.prompt = prompt
        self.combine = combine
        per_sample = [
            policy.selected_counts(visual, pool)
            for visual, pool in zip(prompt.visual_counts, prompt.pool_counts, strict=True)
        ]
        self.selected_counts = list(zip(*per_sample, strict=True))  # [stage][sample]
        self.row_lengths = [
            [pinned + selected for pinned, selected in zip(prompt.pinned_counts, counts, strict=True)]
            for counts in self.selected_counts
        ]
        self.lengths = [max(rows) for rows in self.row_lengths]
        last_rows = [[length - 1 for length in rows] for rows in self.row_lengths]
        self.keep, self.last = torch.tensor([self.selected_counts, last_rows], device=prompt.visual.device)
        self.kept: list[Tensor] = []
        self._full: Tensor | None = None
        self._owns_full = False
        self._sequence: Sequence | None = None

    @property
    def tables(self) -> tuple[Tensor, ...]:
        """The per-token tensors of the tokens that run in this stage."""
        return self._sequence.tables

    def is_ragged(self, stage: int) -> bool:
        """Whether some sample fills its row of this stage up with rows that hold no token."""
        return min(self.row_lengths[stage]) < self.lengths[stage]

    def decide(self, hidden: Tensor, tables: tuple[Tensor, ...], rank: Ranking) -> Tensor:
        """Start the next stage: rank, select and compact.

        Args:
            hidden: (B, L, d) of the full sequence at the first decision, then (B, M, d) as the last stage left it.
            tables: per-token tensors of the full sequence, (B, L, ...).
            rank: gives the queries and keys that score the candidates.

        Returns:
            (B, M, d), the hidden states of the tokens that run.
        """
        stage = len(self.kept)
        source = self._source(hidden, tables)
        removes = self.policy.action == "remove"
        # What is removed is no candidate later: its flags leave with it, and places are counted in the full sequence.
        carried = (source.pool, source.pinned) if removes else ()
        if source.kept is not None:
            carried += (source.kept,)
        index, (compact, *rows) = self._route(
            rank(source.hidden, source.tables, source.valid, source.last),
            pool=source.pool,
            pinned=source.pinned,
            keep=_on(hidden.device, self.keep[stage]),
            length=self.lengths[stage],
            tensors=(source.hidden, *source.tables, *carried),
        )
        tables, carried = tuple(rows[: len(source.tables)]), rows[len(source.tables) :]
        pool, pinned = carried[:2] if removes else (source.pool, source.pinned)
        kept = index if source.kept is None else torch.where(index < 0, index, carried[-1])
        self.kept.append(kept)
        valid, last = (kept >= 0, _on(kept.device, self.last[stage])) if self.is_ragged(stage) else (None, None)
        self._sequence = Sequence(compact, tables, pool, pinned, valid, last, kept)
        return compact

    def _route(self, ranking: dict[str, object], pool, pinned, keep, length, tensors):
        """`ops.route_tokens`, in steps where scores must be combined."""
        if self.combine is None:
            return ops.route_tokens(**ranking, pool=pool, pinned=pinned, keep=keep, length=length, tensors=tensors)
        scores = self.combine(ops.rank_tokens(**ranking), ranking.get("head_reduction", "mean"))
        index = ops.select_tokens(scores, pool, pinned, keep, length)
        return index, ops.gather_tokens(index, *tensors)

    def _source(self, hidden: Tensor, tables: tuple[Tensor, ...]) -> Sequence:
        """The sequence to select from: all tokens under `reroute`, the survivors under `remove`."""
        if self._full is None:
            self._full = hidden
        else:
            self._write_back(hidden)
            if self.policy.action == "remove":
                self._sequence.hidden = hidden
                return self._sequence
        prompt = self.prompt
        full = Sequence(self._full, tables, prompt.pool, prompt.pinned, prompt.valid, prompt.last, None)
        return full.to(hidden.device)

    def _follow(self, hidden: Tensor) -> None:
        """Move to the device of the hidden states what is carried from layer to layer."""
        if self._full.device != hidden.device:
            self._full, self._owns_full = self._full.to(hidden.device), True
            self._sequence.hidden = hidden
            self._sequence = self._sequence.to(hidden.device)

    def _write_back(self, hidden: Tensor) -> None:
        self._follow(hidden)
        # The hidden states at the first decision belong to the model (hooks may hold them): never write there.
        if not self._owns_full:
            self._full, self._owns_full = self._full.clone(), True
        self._full = ops.scatter_tokens_(self._full, self._sequence.kept, hidden)

    def add(self, hidden: Tensor, addition: Tensor) -> Tensor:
        """Add to the tokens between two layers, to deferred ones too.

        Args:
            hidden: (B, M, d) of the stage, or (B, L, d) before the first decision.
            addition: (B, L, d).

        Returns:
            The sum, of the shape of `hidden`.
        """
        addition = _on(hidden.device, addition)
        if self._sequence is None:
            return hidden + addition
        self._follow(hidden)
        self._full, self._owns_full = self._full + addition, True
        (compact,) = ops.gather_tokens(self._sequence.kept, addition)
        return hidden + compact

    def finish(self, hidden: Tensor) -> Tensor:
        """Full-length hidden states after the last layer; what did not run shows its last hidden state.

        Trailing padding shows its sample's last token, so that reading the last position of a row is right whatever
        the padding side.
        """
        self._write_back(hidden)
        full, prompt = self._full, self.prompt
        if prompt.right_padded:
            last = _on(full.device, prompt.last)
            trailing = torch.arange(prompt.length, device=full.device) > last[:, None]
            last_row = full.gather(1, last.clamp(min=0)[:, None, None].expand(-1, 1, full.shape[2]))
            full = torch.where(trailing[:, :, None], last_row, full)
        return full


@dataclass(frozen=True, eq=False)
class StageTrace:
    """What one stage of a routed prefill did; nothing is copied from the device before it is read."""

    layer: int
    """The decision layer."""
    keep: float
    """The share of visual tokens that was asked for."""
    tokens: int
    """M, the tokens that each row of this stage's layers holds and caches."""
    _kept: Tensor = field(repr=False)
    _visual: Tensor = field(repr=False)

    @cached_property
    def selected(self) -> list[Tensor]:
        """For each sample the positions of the visual tokens that ran: int64, ascending, on the CPU."""
        kept, visual = self._kept.cpu(), self._visual.cpu()
        rows = (row[row >= 0] for row in kept)
        return [row[is_visual[row]] for row, is_visual in zip(rows, visual, strict=True)]


@dataclass(frozen=True, eq=False)
class Trace:
    """What the latest routed prefill did."""

    policy: Policy
    length: int
    """L, the tokens of the prompt, padding included."""
    visual_counts: list[int]
    """Visual tokens of each sample."""
    stages: list[StageTrace]

    @classmethod
    def of(cls, forward: RoutedForward) -> Trace:
        prompt, policy = forward.prompt, forward.policy
        stages = [
            StageTrace(stage.layer, stage.keep, length, kept, prompt.visual)
            for stage, length, kept in zip(policy.schedule, forward.lengths, forward.kept, strict=True)
        ]
        return cls(policy, prompt.length, prompt.visual_counts, stages)


@dataclass(eq=False)
class CachedPrompt:
    """What later calls must know about a cache that a routed prefill filled. It lives with the cache object."""

    policy: Policy
    batch: int
    length: int
    """L, the tokens of the prompt, padding included."""
    stage_lengths: list[int]
    """Tokens that each layer of a stage cached."""
    stage_valid: list[Tensor | None]
    """(B, M) bool, False at cached rows that hold no token; None where all do."""
    last_position: Tensor | None
    """Rotary position of each sample's last token, (..., B, 1), where later positions must be derived from it."""
    right_padded: bool

    @classmethod
    def of(cls, forward: RoutedForward, last_position: Tensor | None) -> CachedPrompt:
        stages = range(len(forward.kept))
        return cls(
            policy=forward.policy,
            batch=forward.prompt.visual.shape[0],
            length=forward.prompt.length,
            stage_lengths=forward.lengths,
            stage_valid=[forward.kept[stage] >= 0 if forward.is_ragged(stage) else None for stage in stages],
            last_position=last_position,
            right_padded=forward.prompt.right_padded,
        )

    def valid_keys(self, stage: int, batch: int, added: Tensor | None, new_tokens: int) -> Tensor | None:
        """Which of a stage's keys count for the tokens of a later call.

        Args:
            stage: number of the stage.
            batch: samples of the call, B or a multiple of it (each sample repeated in place).
            added: (B, T) bool of all tokens after the prompt, False at padding; None where there is none.
            new_tokens: T, the tokens after the prompt, those of the call included.

        Returns:
            (B, M + T) bool, or None where every key counts.
        """
        cached = self.stage_valid[stage]
        if cached is None and added is None:
            return None
        device = added.device if cached is None else cached.device
        if cached is None:
            cached = torch.ones(batch, self.stage_lengths[stage], dtype=torch.bool, device=device)
        elif cached.shape[0] != batch:
            cached = cached.repeat_interleave(batch // cached.shape[0], dim=0)
        if added is None:
            added = torch.ones(batch, new_tokens, dtype=torch.bool, device=device)
        return torch.cat([cached, _on(cached.device, added)], dim=1)
