"""One routed forward: which tokens run in which stage, and what goes in and out of the compact sequence.

Nothing here knows a model: tensors come in, a ranking is a callable, and the kernels do the work.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial

import torch
from torch import Tensor

from . import ops
from .attention import Attention
from .policy import Policy
from .rankings import Candidates

# Gives the attention that scores a sequence, from (hidden, tables, key mask or None, places of the queries
# (B, Q), or None if only the last token asks); with `keys_alone=True` the keys, (B, L, Hkv, D).
Project = Callable[..., "Attention | Tensor"]

# Scores by all heads, from (scores by the heads that this process has, how heads are reduced: "mean" or "max").
Combine = Callable[[Tensor, str], Tensor]


def on_device(device: torch.device, tensor: Tensor | None) -> Tensor | None:
    """The tensor on a device; nothing is called where it is there already."""
    return tensor if tensor is None or tensor.device == device else tensor.to(device)


class Prompt:
    """Where the visual and text tokens of a batch stand, and how many there are.

    Reading the counts is the one transfer from the device that a routed prefill makes.

    Args:
        visual: (B, L) bool, positions that hold image or video features.
        valid: (B, L) bool, False at padding; None where there is none.
        draft_tokens: how many tokens at the end of every row come from a draft model. They run, and do not rank.
        starts: (B,) int64, the place of the first token of an answer that is scored with its prompt, behind all visual
            tokens; L where a row has none. Answers run, and do not rank. None where no row has one.
        marks: (B, L) bool, tokens that a reducer dropped, and those that any did; None where there is no reducer.
        asked: integer tensors without dimensions, by name, to be read in the same transfer.

    Attributes:
        answers: the numbers asked for, by name.
    """

    def __init__(
        self,
        visual: Tensor,
        valid: Tensor | None,
        draft_tokens: int = 0,
        marks: tuple[Tensor, Tensor] | None = None,
        asked: Mapping[str, Tensor] | None = None,
        starts: Tensor | None = None,
    ):
        asked = asked or {}
        self.length = visual.shape[1]
        self.draft_tokens = draft_tokens
        places = torch.arange(self.length, device=visual.device)
        if valid is None:
            valid = torch.ones_like(visual)
        end = torch.where(valid, places, -1).amax(dim=1)  # [B]
        last = end - draft_tokens  # of the prompt itself
        if starts is not None:
            last = torch.minimum(last, starts - 1)
        visual = visual & valid & (places <= last[:, None])
        is_last = places == last[:, None]
        # The next token is predicted from the last one, so it runs whatever it is.
        self.pinned = (valid & ~visual) | is_last
        self.pool = visual & ~is_last
        self.visual = visual
        if marks is not None:
            dropped, foreign = marks[0] & visual, (marks[1] & ~marks[0]) & visual
            self.pool = self.pool & ~dropped
            counts = {"dropped": dropped, "last_dropped": dropped & is_last, "foreign": foreign}
            asked = {**asked, **{name: tokens.sum() for name, tokens in counts.items()}}
        behind = [] if starts is None else [(valid & (places > last[:, None])).sum(1)]
        counts = torch.stack(
            [visual.sum(1), self.pool.sum(1), self.pinned.sum(1), valid.sum(1), self.length - 1 - end, *behind]
            + [number.to(end.device, end.dtype).expand_as(end) for number in asked.values()]
        ).tolist()
        self.visual_counts, self.pool_counts, self.pinned_counts, self.valid_counts, trailing, *answers = counts
        self.unranked_counts = answers.pop(0) if behind else [draft_tokens] * len(trailing)
        self.answers = {name: numbers[0] for name, numbers in zip(asked, answers, strict=True)}
        self.padded = min(self.valid_counts) < self.length
        # A sample without a token sits this prompt out: it is padded on neither side.
        self.right_padded = any(after and tokens for after, tokens in zip(trailing, self.valid_counts, strict=True))
        self.has_empty_rows = min(self.valid_counts) == 0
        self.valid = valid if self.padded else None
        self.end = end if self.padded else None
        # The token that ranks, and the tokens it sees: the prompt without draft tokens and answers.
        self.last = last if self.padded or self.ranks_within else None
        self.ranked = valid & (places <= last[:, None]) if self.ranks_within else self.valid

    @property
    def ranks_within(self) -> bool:
        """Whether tokens stand behind the one that ranks, in some row."""
        return any(self.unranked_counts)

    @property
    def most_text(self) -> int:
        """The text tokens that may rank, of the sample that has most."""
        return max(map(operator.sub, self.pinned_counts, self.unranked_counts))

    @property
    def has_visual_tokens(self) -> bool:
        return any(self.visual_counts)

    @property
    def ends_in_image(self) -> bool:
        """Whether the last token of some row, before an answer, is a visual one."""
        return sum(self.visual_counts) > sum(self.pool_counts) + self.answers.get("dropped", 0)


@dataclass(eq=False)
class TokenSequence:
    """Tokens in order: hidden states with everything else that is per token.

    Unless it is the full sequence, its hidden states go back to the places of a parent. A write to hidden states copies
    them first where others may hold them: hooks of the model, or a ranking.

    hidden: (B, L, d); tables: tensors (B, L, ...); pool, pinned: (B, L) bool; ranked: (B, L) bool, what the ranking
    token sees, or None where that is all; last: (B,) place of each sample's ranking token, or None where it is the last
    of the row; kept: (B, L) positions in the full sequence, or None where this is the full sequence; parent: the
    sequence that the hidden states go back to; places: (B, L) where there; owned: whether no one else holds `hidden`.
    """

    hidden: Tensor
    tables: tuple[Tensor, ...]
    pool: Tensor
    pinned: Tensor
    ranked: Tensor | None
    last: Tensor | None
    kept: Tensor | None = None
    parent: TokenSequence | None = None
    places: Tensor | None = None
    owned: bool = False

    def take(self, hidden: Tensor) -> None:
        """Go on with hidden states that the model made, on their device."""
        self.hidden, self.owned = hidden, False
        self.move(hidden.device)

    def move(self, device: torch.device) -> None:
        """Bring everything to a device, parents included."""
        if self.hidden.device != device:
            self.hidden, self.owned = self.hidden.to(device), True
        self.tables = tuple(on_device(device, table) for table in self.tables)
        self.pool, self.pinned = on_device(device, self.pool), on_device(device, self.pinned)
        self.ranked, self.last = on_device(device, self.ranked), on_device(device, self.last)
        self.kept, self.places = on_device(device, self.kept), on_device(device, self.places)
        if self.parent is not None:
            self.parent.move(device)

    def write_back(self) -> None:
        """Put the hidden states at their places in the parent."""
        parent = self.parent
        if not parent.owned:
            parent.hidden, parent.owned = parent.hidden.clone(), True
        parent.hidden = ops.scatter_tokens_(parent.hidden, self.places, self.hidden)

    def add(self, addition: Tensor) -> None:
        """Add (B, L, d) of the full sequence to the hidden states, parents included."""
        own = addition if self.kept is None else ops.gather_tokens(self.kept, addition)[0]
        self.hidden, self.owned = self.hidden + own, True
        if self.parent is not None:
            self.parent.add(addition)


@dataclass(eq=False)
class DecisionScores:
    """Scores of one decision, (B, S) float32 over a sequence of S tokens, and which of them are candidates.

    pool: (B, S) bool; kept: (B, S) positions in the full sequence, or None where this is the full sequence.
    """

    scores: Tensor
    pool: Tensor
    kept: Tensor | None

    def of_visual(self, visual: Tensor) -> list[Tensor]:
        """For each sample the scores of its visual tokens, NaN at those that were no candidates; visual: (B, L)."""
        scores = self.scores.cpu().masked_fill(~self.pool.cpu(), torch.nan)
        if self.kept is not None:
            # Rows without a token go to an extra column, which is cut off.
            places, length = self.kept.cpu(), visual.shape[1]
            full = scores.new_full((len(scores), length + 1), torch.nan)
            scores = full.scatter_(1, torch.where(places < 0, length, places), scores)[:, :length]
        return [row[is_visual] for row, is_visual in zip(scores, visual, strict=True)]


class RoutedForward:
    """The state of one routed prefill, from its first stage until the full sequence is restored.

    A reducer's stage comes before those of the schedule; nothing is ranked for it. It follows the hidden states from
    device to device.

    Args:
        policy: what to route.
        prompt: the batch that is prefilled.
        pad_left: rows of shorter samples are filled up at their front, for layers in which what stands last counts
            (sliding windows, recurrent states); otherwise at their end, where causality alone keeps the fill out.
        combine: completes the scores where heads are split over processes; None where each has all heads.
    """

    def __init__(self, policy: Policy, prompt: Prompt, pad_left: bool = False, combine: Combine | None = None):
        self.policy = policy
        self.prompt = prompt
        self.pad_left = pad_left
        self.combine = combine
        self._reduces = policy.reducer is not None
        per_sample = [
            ((pool,) if self._reduces else ()) + policy.selected_counts(visual, pool)
            for visual, pool in zip(prompt.visual_counts, prompt.pool_counts, strict=True)
        ]
        self.selected_counts = list(zip(*per_sample, strict=True))  # [stage][sample]
        self.row_lengths = [
            [pinned + selected for pinned, selected in zip(prompt.pinned_counts, counts, strict=True)]
            for counts in self.selected_counts
        ]
        self.lengths = [max(rows) for rows in self.row_lengths]
        ends = [[max(rows)] * len(rows) if pad_left else rows for rows in self.row_lengths]
        lasts = [[end - 1 - after for end, after in zip(rows, prompt.unranked_counts, strict=True)] for rows in ends]
        self._keep, self.rows, self._last = torch.tensor(
            [self.selected_counts, self.row_lengths, lasts], device=prompt.visual.device
        )
        self.kept: list[Tensor] = []
        self._active: TokenSequence | None = None  # what runs in this stage
        self._scores: Tensor | None = None
        self.scored: list[DecisionScores | None] = []

    @property
    def tables(self) -> tuple[Tensor, ...]:
        """The per-token tensors of the tokens that run in this stage."""
        return self._active.tables

    @tables.setter
    def tables(self, tables: tuple[Tensor, ...]) -> None:
        self._active.tables = tables

    def is_ragged(self, stage: int) -> bool:
        """Whether some sample fills its row of this stage up with rows that hold no token."""
        return min(self.row_lengths[stage]) < self.lengths[stage]

    def numbers(self, device: torch.device) -> Tensor:
        """(B, M) int64: the tokens of this stage's rows numbered from 0, in rows that hold none any number."""
        stage = len(self.kept) - 1
        numbers = torch.arange(self.lengths[stage], device=device).expand(len(self.row_lengths[stage]), -1)
        if self.pad_left and self.is_ragged(stage):
            numbers = (numbers - (self.lengths[stage] - on_device(device, self.rows[stage]))[:, None]).clamp(min=0)
        return numbers

    def score(self, hidden: Tensor, tables: tuple[Tensor, ...], project: Project) -> None:
        """Rank for the next decision in the layer before it; arguments as in `decide`."""
        source = self._source(hidden, tables)
        ranked = self._ranked(source, project)
        self._scores = self._all_scores(ranked) if isinstance(ranked, Attention) else ranked

    def decide(self, hidden: Tensor, tables: tuple[Tensor, ...], project: Project) -> Tensor:
        """Start the next stage: rank, select and compact.

        Args:
            hidden: (B, L, d) of the full sequence at the first stage, then (B, M, d) as the last stage left it.
            tables: per-token tensors of the full sequence, (B, L, ...).
            project: gives the queries and keys that score the candidates.

        Returns:
            (B, M, d), the hidden states of the tokens that run.
        """
        stage = len(self.kept)
        reduces = self._reduces and stage == 0
        source = self._source(hidden, tables)
        # A token that is dropped for good is no candidate later: its flags leave with it. Places are counted in the
        # full sequence.
        for_good = self._drops(stage)
        carried = (source.pool, source.pinned) if for_good else ()
        if source.kept is not None:
            carried += (source.kept,)
        if reduces:
            ranked = torch.zeros(hidden.shape[:2], dtype=torch.float32, device=hidden.device)
        elif self._scores is not None:
            ranked, self._scores = on_device(hidden.device, self._scores), None
        else:
            ranked = self._ranked(source, project)
        index, rows, scores = self._route(
            ranked,
            pool=source.pool,
            pinned=source.pinned,
            keep=on_device(hidden.device, self._keep[stage]),
            length=self.lengths[stage],
            tensors=(source.hidden, *source.tables, *carried),
        )
        self.scored.append(None if reduces else DecisionScores(scores, source.pool, source.kept))
        ragged = self.is_ragged(stage)
        if ragged and self.pad_left:
            index, rows = self._move_to_end(index, rows, on_device(index.device, self.rows[stage]))
        compact, carried = rows[0], rows[1 + len(source.tables) :]
        # One operation made all rows, which have gradients for that: layers are handed tables without, as the model's.
        tables = tuple(
            row if table.requires_grad else row.detach() for row, table in zip(rows[1:], source.tables, strict=False)
        )
        pool, pinned = carried[:2] if for_good else (source.pool, source.pinned)
        kept = index if source.kept is None else torch.where(index < 0, index, carried[-1])
        self.kept.append(kept)
        ranked, last = None, None
        if self.prompt.ranks_within:
            last = on_device(kept.device, self._last[stage])
            ranked = torch.arange(compact.shape[1], device=compact.device) <= last[:, None]
            if ragged and self.pad_left:
                ranked = ranked & (kept >= 0)
        elif ragged:
            last, ranked = None if self.pad_left else on_device(kept.device, self._last[stage]), kept >= 0
        parent, places = source, index
        if self.policy.action == "remove" and source.parent is not None:
            parent, places = source.parent, kept  # the survivors' own sequence is needed no more
        self._active = TokenSequence(compact, tables, pool, pinned, ranked, last, kept, parent, places)
        return compact

    def _drops(self, stage: int) -> bool:
        """Whether what a stage does not run is no candidate of later decisions."""
        return self.policy.action == "remove" or (self._reduces and stage == 0)

    def _ranked(self, source: TokenSequence, project: Project) -> Attention | Tensor:
        """Rank the candidates of the next decision by the policy's rule."""
        stage = len(self.kept)
        source.owned = False  # the ranking and the hooks of the norm before it may hold the hidden states
        candidates = Candidates(
            source.hidden,
            source.pool,
            source.pinned,
            source.ranked,
            source.last,
            on_device(source.hidden.device, self._keep[stage]),
            self.prompt.most_text,
            stage - self._reduces,
            partial(project, source.hidden, source.tables, source.ranked),
        )
        with torch.no_grad():
            ranked = self.policy.ranking.rank(candidates)
        if isinstance(ranked, Attention):
            return ranked
        expected = tuple(source.pool.shape)
        if not isinstance(ranked, Tensor) or ranked.shape != expected or ranked.dtype != torch.float32:
            got = f"{tuple(ranked.shape)} {ranked.dtype}" if isinstance(ranked, Tensor) else type(ranked).__name__
            raise TypeError(
                f"ranking must give scores {expected} float32, or what candidates.attention returns, got {got} from "
                f"{self.policy.ranking!r}"
            )
        return self._combined(ranked.detach(), "mean")

    def _all_scores(self, ranked: Attention) -> Tensor:
        return self._combined(ranked.scores(), ranked.head_reduction)

    def _combined(self, scores: Tensor, reduction: str) -> Tensor:
        """Scores by all heads; on every process the same."""
        return scores if self.combine is None else self.combine(scores, reduction)

    def _route(self, ranked: Attention | Tensor, pool, pinned, keep, length, tensors):
        """`ops.route_tokens`, in steps where there are scores, or where they must be combined."""
        if isinstance(ranked, Attention) and self.combine is None:
            selection = {"pool": pool, "pinned": pinned, "keep": keep, "length": length, "tensors": tensors}
            return ops.route_tokens(**ranked._asdict(), **selection, return_scores=True)
        if isinstance(ranked, Attention):
            ranked = self._all_scores(ranked)
        index = ops.select_tokens(ranked, pool, pinned, keep, length)
        return index, ops.gather_tokens(index, *tensors), ranked

    @staticmethod
    def _move_to_end(index: Tensor, rows: list[Tensor], lengths: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The same rows with their fill in front: index (B, M), rows (B, M, ...), lengths (B,) without the fill."""
        length = index.shape[1]
        places = torch.arange(length, device=index.device) - (length - lengths)[:, None]
        places = places.clamp(min=-1)
        moved = torch.where(places < 0, places, index.gather(1, places.clamp(min=0)))
        return moved, ops.gather_tokens(places, *rows)

    def _source(self, hidden: Tensor, tables: tuple[Tensor, ...]) -> TokenSequence:
        """The sequence to select from: under `reroute` all tokens, or all that a reducer left, else the survivors."""
        active = self._active
        if active is None:
            prompt = self.prompt
            full = TokenSequence(hidden, tables, prompt.pool, prompt.pinned, prompt.ranked, prompt.last)
            full.move(hidden.device)
            return full
        active.take(hidden)
        drops = self._drops(len(self.kept) - 1)
        # The tokens that a reducer left are written back once, at the end.
        if not drops or self.policy.action == "remove":
            active.write_back()
        return active if drops else active.parent

    def add(self, hidden: Tensor, addition: Tensor) -> Tensor:
        """Add to the tokens between two layers, to deferred ones too.

        Args:
            hidden: (B, M, d) of the stage, or (B, L, d) before the first decision.
            addition: (B, L, d).

        Returns:
            The sum, of the shape of `hidden`.
        """
        addition = on_device(hidden.device, addition)
        if self._active is None:
            return hidden + addition
        self._active.take(hidden)
        self._active.add(addition)
        return self._active.hidden

    def finish(self, hidden: Tensor) -> Tensor:
        """Full-length hidden states after the last layer; what did not run shows its last hidden state.

        Trailing padding shows its sample's last token, so that reading the last position of a row is right whatever
        the padding side.
        """
        sequence = self._active
        sequence.take(hidden)
        while sequence.parent is not None:
            sequence.write_back()
            sequence = sequence.parent
        full, prompt = sequence.hidden, self.prompt
        if prompt.right_padded:
            end = on_device(full.device, prompt.end)
            trailing = torch.arange(prompt.length, device=full.device) > end[:, None]
            last_row = full.gather(1, end.clamp(min=0)[:, None, None].expand(-1, 1, full.shape[2]))
            full = torch.where(trailing[:, :, None], last_row, full)
        return full


@dataclass(frozen=True, eq=False)
class StageTrace:
    """Record of one stage of a routed prefill; nothing is copied from the device before it is read."""

    layer: int
    """The decision layer; 0 for what a reducer left."""
    keep: float | None
    """The share of visual tokens that was asked for; None for what a reducer left."""
    tokens: int
    """M, the tokens that each row of this stage's layers holds and caches."""
    _kept: Tensor = field(repr=False)
    _visual: Tensor = field(repr=False)
    _offset: int = field(repr=False)
    _scored: DecisionScores | None = field(repr=False)

    @cached_property
    def selected(self) -> list[Tensor]:
        """For each sample the positions of the visual tokens that ran: int64, ascending, on the CPU.

        They count from the first token of the conversation: what a cache held before stands in front.
        """
        kept, visual = self._kept.cpu(), self._visual.cpu()
        rows = (row[row >= 0] for row in kept)
        return [row[is_visual[row]] + self._offset for row, is_visual in zip(rows, visual, strict=True)]

    @cached_property
    def scores(self) -> list[Tensor] | None:
        """For each sample what the ranking gave its N visual tokens: (N,) float32, in their order, on the CPU.

        To be compared within a sample and a decision; higher runs. NaN at tokens that were no candidates, such as those
        gone under `remove`. None for what a reducer left, which is not ranked here.
        """
        return None if self._scored is None else self._scored.of_visual(self._visual.cpu())


@dataclass(frozen=True, eq=False)
class Trace:
    """Record of a routed prefill."""

    policy: Policy
    length: int
    """L, the tokens of the prompt, padding included."""
    visual_counts: list[int]
    """Visual tokens of each sample."""
    stages: list[StageTrace]
    """One for each stage of the schedule."""
    reduction: StageTrace | None = None
    """The tokens that a reducer left; None without one."""

    @classmethod
    def of(cls, forward: RoutedForward, past: CacheState | None = None) -> Trace:
        prompt, policy, offset = forward.prompt, forward.policy, past.length if past else 0
        keeps = (None,) * (policy.reducer is not None) + tuple(stage.keep for stage in policy.schedule)
        stages = [
            StageTrace(layer, keep, length, kept, prompt.visual, offset, scored)
            for layer, keep, length, kept, scored in zip(
                policy.stage_layers, keeps, forward.lengths, forward.kept, forward.scored, strict=True
            )
        ]
        reduction = stages.pop(0) if policy.reducer is not None else None
        return cls(policy, prompt.length, prompt.visual_counts, stages, reduction)


@dataclass(eq=False)
class CacheState:
    """Contents of a cache before a call. Lists have one entry per stage."""

    length: int
    """Tokens of the full sequence, padding included."""
    lengths: list[int]
    """P, the cached tokens of a stage's layers."""
    valid: list[Tensor | None]
    """(B, P) bool, False at cached rows that hold no token; None where all do."""
    positions: list[Tensor]
    """(B or 1, P) positions in the full sequence."""
    visible: list[Tensor | None] | None = None
    """(B, P) bool, False also at what this call hides, which the next one may show; None where it hides nothing."""

    def seen(self, stage: int) -> Tensor | None:
        """Which keys of a stage the call sees, (B, P) bool; None for all."""
        return (self.valid if self.visible is None else self.visible)[stage]

    def extended(self, stage: int, valid: Tensor | None, kept: Tensor, ragged: bool) -> tuple[Tensor | None, Tensor]:
        """Which keys of a stage count, and their positions, once a prompt's rows are cached behind them.

        Args:
            stage: number of the stage.
            valid: (B, P) bool, which of the keys before count; None for all.
            kept: (B, M) positions in the prompt, -1 at rows that hold no token.
            ragged: whether there are such rows.

        Returns:
            (B, P + M) bool, or None where all do; and (B, P + M).
        """
        batch, length = kept.shape
        valid = _joined(valid, self.lengths[stage], kept >= 0 if ragged else None, length, kept, batch)
        earlier = on_device(kept.device, self.positions[stage]).expand(batch, -1)
        return valid, torch.cat([earlier, kept + self.length], dim=1)

    @classmethod
    def unrouted(cls, length: int, visible: Tensor | None, stages: int, device: torch.device) -> CacheState:
        """Of a cache that no routed prompt filled: all layers hold the same `length` tokens.

        visible: (B, length) bool, what the call sees, or None where it sees all.
        """
        positions = torch.arange(length, device=device)[None]
        return cls(length, [length] * stages, [None] * stages, [positions] * stages, [visible] * stages)


@dataclass(eq=False)
class CachedPrompt:
    """Record of a cache that a routed prefill filled, for later calls on it. It lives with the cache object."""

    policy: Policy
    batch: int
    past: CacheState
    last_position: Tensor | None
    """Rotary position of each sample's last token, (..., B, 1), where later positions must be derived from it."""
    right_padded: bool
    rows: Tensor
    """(stages, B), the tokens of each sample that each stage ran."""

    @classmethod
    def of(cls, forward: RoutedForward, before: CacheState | None, last_position: Tensor | None) -> CachedPrompt:
        """From a finished forward on a cache that held `before`. Guesses may go again: the prompt ends before."""
        prompt = forward.prompt
        lengths, all_valid, positions = [], [], []
        for stage, kept in enumerate(forward.kept):
            length, ragged = forward.lengths[stage] - prompt.draft_tokens, forward.is_ragged(stage)
            kept = kept[:, :length]
            valid, places = (kept >= 0 if ragged else None), kept
            if before:
                valid, places = before.extended(stage, before.valid[stage], kept, ragged)
                length += before.lengths[stage]
            lengths.append(length)
            all_valid.append(valid)
            positions.append(places)
        length = (before.length if before else 0) + prompt.length - prompt.draft_tokens
        past = CacheState(length, lengths, all_valid, positions)
        rows = forward.rows - prompt.draft_tokens
        return cls(forward.policy, prompt.visual.shape[0], past, last_position, prompt.right_padded, rows)

    def valid_keys(self, stage: int, batch: int, visible: Tensor | None, count: int) -> Tensor | None:
        """Which of a stage's keys count for the tokens of a later call.

        Args:
            stage: number of the stage.
            batch: samples of the call, B or a multiple of it (each sample repeated in place).
            visible: (batch, L + count) bool of the prompt and all tokens after it, False at padding and at what the
                call hides; None if there is neither.
            count: the tokens after the prompt.

        Returns:
            (batch, P + count) bool, or None where every key counts.
        """
        positions, cached = self.past.positions[stage], _repeated(self.past.valid[stage], batch)
        added = None
        if visible is not None:
            visible = on_device(positions.device, visible)
            places = _repeated(positions, batch).clamp(min=0).expand(batch, -1)
            shown = visible[:, : self.past.length].gather(1, places)
            cached = shown if cached is None else cached & shown
            added = visible[:, self.past.length :]
        return _joined(cached, self.past.lengths[stage], added, count, positions, batch)

    def key_positions(self, stage: int, batch: int, count: int) -> Tensor:
        """Positions in the full sequence, (batch or 1, P + count), of the same keys."""
        cached = _repeated(self.past.positions[stage], batch)
        later = torch.arange(self.past.length, self.past.length + count, device=cached.device)
        return torch.cat([cached, later.expand(cached.shape[0], -1)], dim=1)

    def with_later(self, batch: int, visible: Tensor | None, count: int) -> CacheState:
        """The cache after `count` more tokens, before a call; arguments as in `valid_keys`."""
        stages = range(len(self.past.lengths))
        return CacheState(
            self.past.length + count,
            [length + count for length in self.past.lengths],
            [self.valid_keys(stage, batch, None, count) for stage in stages],
            [self.key_positions(stage, batch, count) for stage in stages],
            [self.valid_keys(stage, batch, visible, count) for stage in stages],
        )


def _repeated(rows: Tensor | None, batch: int) -> Tensor | None:
    if rows is None or rows.shape[0] in (1, batch):
        return rows
    return rows.repeat_interleave(batch // rows.shape[0], dim=0)


def _joined(
    first: Tensor | None, first_length: int, second: Tensor | None, second_length: int, like: Tensor, batch: int
) -> Tensor | None:
    """(batch, first + second) bool of two masks, each None where it is all True; None where both are."""
    if first is None and second is None:
        return None
    parts = [
        torch.ones(batch, length, dtype=torch.bool, device=like.device)
        if mask is None
        else on_device(like.device, mask).expand(batch, -1)
        for mask, length in ((first, first_length), (second, second_length))
    ]
    return torch.cat(parts, dim=1)
