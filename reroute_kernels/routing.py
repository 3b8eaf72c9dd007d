"""One routed forward: which tokens run in which stage, and what goes in and out of the compact sequence.

Nothing here knows a model: tensors come in, a ranking is a callable, and the kernels do the work.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from . import ops
from .attention import Attention
from .policy import Policy
from .rankings import Candidates
from .trace import DecisionScores

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
