"""One routed forward: which tokens run in which stage, and how tensors get into the compact sequence and back.

Nothing here knows a model: tensors come in, a ranking is a callable, and the kernels do the work.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, overload

import torch
from torch import Tensor

from . import ops
from .attention import Attention
from .backends import active_backend
from .memory import Memory
from .policy import Policy
from .positions import flags_of, positions_of
from .proxies import Proxies, closest_leaders, leaders, start_proxies
from .rankings import Candidates, Norm, Projection, RankingLike, Remembered, evenly, part_of
from .raters import rating_text, text_raters
from .recycling import recycle
from .trace import DecisionScores

if TYPE_CHECKING:
    from .prompt import Prompt

# Scores by all heads, from (scores by the heads that this process has, how heads are reduced: "mean" or "max").
Combine = Callable[[Tensor, str], Tensor]


@overload
def on_device(device: torch.device, tensor: Tensor) -> Tensor: ...


@overload
def on_device(device: torch.device, tensor: None) -> None: ...


@overload
def on_device(device: torch.device, tensor: Tensor | None) -> Tensor | None: ...


def on_device(device: torch.device, tensor: Tensor | None) -> Tensor | None:
    """The tensor on a device; nothing is called if it is there already."""
    return tensor if tensor is None or tensor.device == device else tensor.to(device)


@dataclass(eq=False)
class TokenSequence:
    """Tokens in order: hidden states with everything else that is per token.

    The hidden states of any sequence but the full one go back to positions of its parent. A write to hidden states
    copies them first if others may hold them: hooks of the model, or a ranking.

    hidden: (B, L, d); rotary: tensors (B, L, ...); pool, pinned: (B, L) bool; visible: (B, L) bool, the tokens that the
    ranking token sees, or None if it sees all; last: (B,) position of each sample's ranking token in the row, or None
    if it is the last of the row; kept: (B, L) positions in the full sequence, or None if this is the full sequence;
    parent: the sequence that the hidden states go back to; index: (B, L) positions there; proxies: the rows that run in
    place of groups of the parent's tokens, if any; owned: whether no one else holds `hidden`.
    """

    hidden: Tensor
    rotary: tuple[Tensor, ...]
    pool: Tensor
    pinned: Tensor
    visible: Tensor | None
    last: Tensor | None
    kept: Tensor | None = None
    parent: TokenSequence | None = None
    index: Tensor | None = None
    proxies: Proxies | None = None
    owned: bool = False
    _device: torch.device | None = None  # to which everything was moved

    def lend(self) -> Tensor:
        """The hidden states, for someone who may hold them."""
        self.owned = False
        return self.hidden

    def take(self, hidden: Tensor) -> None:
        """Go on with hidden states that the model made, on their device."""
        self.hidden, self.owned = hidden, False
        self.move(hidden.device)

    def move(self, device: torch.device) -> None:
        """Bring everything to a device, parents included."""
        if device == self._device == self.hidden.device:
            return
        self._device = device
        if self.hidden.device != device:
            self.hidden, self.owned = self.hidden.to(device), True
        self.rotary = tuple(on_device(device, table) for table in self.rotary)
        self.pool, self.pinned = on_device(device, self.pool), on_device(device, self.pinned)
        self.visible, self.last = on_device(device, self.visible), on_device(device, self.last)
        self.kept, self.index = on_device(device, self.kept), on_device(device, self.index)
        if self.proxies is not None:
            self.proxies.move(device)
        if self.parent is not None:
            self.parent.move(device)

    def write_back(self, norm: Norm | None = None, aligns: bool = False) -> tuple[TokenSequence, Tensor | None]:
        """Put the hidden states at their positions in the parent.

        Args:
            norm: of the parent's hidden states, to be computed with it; None without one.
            aligns: whether the other candidates follow: their proxies, or else the mean change of those that are
                written.

        Returns:
            The parent, and (B, L, d), the norm of its hidden states, or None without one.
        """
        parent, index = self.parent, self.index
        assert parent is not None
        assert index is not None
        if not parent.owned:
            parent.hidden, parent.owned = parent.hidden.clone(), True
        if self.proxies is not None:
            parent.hidden = ops.scatter_tokens_(parent.hidden, self.proxies.without(index), self.hidden)
            if aligns:
                parent.hidden = self.proxies.follow(parent.hidden, self.hidden)
            return parent, parent.normed(norm)
        if aligns:
            parent.hidden = ops.align_tokens_(parent.hidden, index, self.hidden, parent.pool)
            return parent, parent.normed(norm)
        if norm is None:
            parent.hidden = ops.scatter_tokens_(parent.hidden, index, self.hidden)
            return parent, None
        return parent, _normed(norm, parent.hidden, index, self.hidden)

    def normed(self, norm: Norm | None) -> Tensor | None:
        """(B, L, d), the norm of the hidden states; None without one."""
        return None if norm is None else _normed(norm, self.hidden, None, None)

    def add(self, addition: Tensor) -> None:
        """Add (B, L, d) of the full sequence to the hidden states, parents included."""
        own = self._of_own(addition)
        if self.proxies is not None:
            assert self.parent is not None
            own = self.proxies.added(self.parent._of_own(addition), own)
        self.hidden, self.owned = self.hidden + own, True
        if self.parent is not None:
            self.parent.add(addition)

    def _of_own(self, tensor: Tensor) -> Tensor:
        """The rows of these tokens in (B, L, d) of the full sequence."""
        return tensor if self.kept is None else ops.gather_tokens(self.kept, tensor)[0]


@dataclass(frozen=True, eq=False)
class FrozenTokens:
    """Tokens that do not run in a stage whose layers cache them; S tokens are cached, M run, F do not.

    hidden: (B, F, d), as they stay throughout the stage; rotary: tensors (B, F, ...); order: (B, S) int64, for each
    token that is cached its row among the M rows of the compact sequence and then the F of these, -1 at padding;
    places: (B, M) int64, where the tokens that run stand among those that are cached, -1 at rows without a token.
    """

    hidden: Tensor
    rotary: tuple[Tensor, ...]
    order: Tensor
    places: Tensor
    index: Tensor
    """(B, F) int64, where these stand among those that are cached, -1 at rows without a token."""


@torch.no_grad()
def _normed(norm: Norm, full: Tensor, index: Tensor | None, compact: Tensor | None) -> Tensor:
    weight, eps, one_plus = norm
    return ops.scatter_norm_tokens_(full, index, compact, weight, eps, one_plus=one_plus)


class RoutedForward:
    """The state of one routed prefill, from its first stage until the full sequence is restored.

    A reducer's stage comes before those of the schedule; nothing is ranked for it. It follows the hidden states from
    device to device.

    Args:
        policy: the policy.
        prompt: the batch that is prefilled.
        pad_left: whether compact rows are left-padded, for layers in which the last rows count (sliding windows,
            recurrent states); otherwise they are right-padded, and causality alone keeps the padding out.
        combine: completes the scores if heads are split over processes; None if each has all heads.
    """

    def __init__(self, policy: Policy, prompt: Prompt, pad_left: bool = False, combine: Combine | None = None):
        self.policy = policy
        self.prompt = prompt
        self.pad_left = pad_left
        self.combine = combine
        self._reduces = policy.reducer is not None
        self._rankings = policy.rankings
        per_sample = [
            (*([pool] if self._reduces else []), *policy.selected_counts(visual, pool))
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
        self._even_counts, self._merged_counts, self._recycled_counts = self._counts_apart()
        self._keep, self.rows, self._last, self._even, self._merged, self._recycled = torch.tensor(
            [
                self.selected_counts,
                self.row_lengths,
                lasts,
                self._even_counts,
                self._merged_counts,
                self._recycled_counts,
            ],
            device=prompt.visual.device,
        )
        # (B, L, d), embeddings as the first layer is handed them, for rankings that read them; None if unknown.
        self.inputs: Tensor | None = None
        self._raters: Tensor | None = None  # (B, L) bool, once they were asked for
        self.kept: list[Tensor] = []
        self._active: TokenSequence | None = None  # the tokens of this stage
        self._scores: Tensor | None = None
        self._memory: Memory | None = None  # of the latest decision that remembers
        self.scored: list[DecisionScores | None] = []
        self._frozen: FrozenTokens | None = None  # of this stage, once they were asked for
        self._frozen_in: Tensor | None = None  # hidden states that hold theirs

    def _ranking(self, stage: int) -> RankingLike:
        """The ranking of the decision that begins a stage."""
        return self._rankings[stage - self._reduces]

    def _counts_apart(self) -> tuple[list[tuple[int, ...]], ...]:
        """[stage][sample], how many tokens are selected at even distances, are means of others, and are recycled."""
        policy, before = self.policy, (0,) * self._reduces
        even, merged, recycled = [], [], []
        for counts, candidates in zip(zip(*self.selected_counts, strict=True), self.prompt.pool_counts, strict=True):
            decided = counts[self._reduces :]
            even.append(before + policy.even_counts(decided))
            of_removed = policy.recycled_counts(decided, candidates)
            recycled.append(before + tuple(tokens for tokens, _ in of_removed))
            clusters = tuple(each for _, each in of_removed)
            merged.append(before + (clusters if policy.recycle else policy.proxy_counts(decided, candidates)))
        return tuple(list(zip(*counts, strict=True)) for counts in (even, merged, recycled))

    @property
    def active(self) -> TokenSequence:
        """The tokens that run in this stage.

        Raises:
            RuntimeError: no stage has begun.
        """
        if self._active is None:
            raise RuntimeError("a routed forward must make its first decision before its tokens are asked for")
        return self._active

    @property
    def rotary(self) -> tuple[Tensor, ...]:
        """Per-token tensors of the rotary embedding, of the tokens that run in this stage."""
        return self.active.rotary

    @rotary.setter
    def rotary(self, rotary: tuple[Tensor, ...]) -> None:
        self.active.rotary = rotary

    def is_ragged(self, stage: int) -> bool:
        """Whether some sample fills its row of this stage up with rows that hold no token."""
        return min(self.row_lengths[stage]) < self.lengths[stage]

    def position_ids(self, device: torch.device) -> Tensor:
        """(B, M) int64, contiguous positions of the tokens of this stage from 0; padding has any."""
        stage = len(self.kept) - 1
        positions = torch.arange(self.lengths[stage], device=device).expand(len(self.row_lengths[stage]), -1)
        if self.pad_left and self.is_ragged(stage):
            padding = self.lengths[stage] - on_device(device, self.rows[stage])
            positions = (positions - padding[:, None]).clamp(min=0)
        return positions

    def score(self, hidden: Tensor, rotary: tuple[Tensor, ...], projection: Projection) -> None:
        """Rank for the next decision in the layer before it; arguments as in `decide`."""
        source, states = self._source(hidden, rotary, self._norm(hidden, projection))
        ranked = self._rank(source, projection, states)
        self._scores = self._all_scores(ranked) if isinstance(ranked, Attention) else ranked

    def decide(self, hidden: Tensor, rotary: tuple[Tensor, ...], projection: Projection) -> Tensor:
        """Start the next stage: rank, select and compact.

        Args:
            hidden: (B, L, d) of the full sequence at the first stage, then (B, M, d) as the last stage left it.
            rotary: per-token tensors of the rotary embedding of the full sequence, (B, L, ...): cos and sin, or
                positions.
            projection: queries and keys of the layer that ranks.

        Returns:
            (B, M, d), the hidden states of the tokens that run.
        """
        stage = len(self.kept)
        reduces = self._reduces and stage == 0
        ranks = not reduces and self._scores is None
        source, states = self._source(hidden, rotary, self._norm(hidden, projection) if ranks else None)
        # A token that is dropped for good is no candidate later: its flags leave with it. Positions count in the full
        # sequence.
        for_good = self._drops(stage)
        carried: tuple[Tensor, ...] = (source.pool, source.pinned) if for_good else ()
        if source.kept is not None:
            carried += (source.kept,)
        ranked: Attention | Tensor
        if reduces:
            ranked = torch.zeros(hidden.shape[:2], dtype=torch.float32, device=hidden.device)
        elif self._scores is not None:
            ranked, self._scores = on_device(hidden.device, self._scores), None
        else:
            ranked = self._rank(source, projection, states)
        pinned, keep = self._pinned(source, stage)
        memory = None if reduces else self._remembered(stage, hidden.device)
        merged: tuple[Tensor, Tensor] | None = None
        if any(self._merged_counts[stage]):
            ranked, pinned, keep, merged = self._lead(ranked, memory, source, pinned, keep)
        index, rows, scores = self._route(
            ranked,
            memory if merged is None else None,
            pool=source.pool,
            pinned=pinned,
            keep=keep,
            length=self.lengths[stage],
            tensors=(source.hidden, *source.rotary, *carried),
        )
        self.scored.append(None if reduces else DecisionScores(scores, source.pool, source.kept))
        if self.is_ragged(stage) and self.pad_left:
            index, rows = self._left_padded(index, rows, on_device(index.device, self.rows[stage]))
        self._remember(memory, scores, index if for_good else None)
        compact, carried = rows[0], rows[1 + len(source.rotary) :]
        proxies: Proxies | None = None
        if merged is not None:
            compact, proxies = start_proxies(compact, index, source.hidden, *merged, max(self._merged_counts[stage]))
            if for_good:
                proxies = None  # no token waits: the means are tokens like others from here on
        # One operation made all rows, so all have gradients; but layers are handed cos and sin without, as ever.
        rotary = tuple(
            row if table.requires_grad else row.detach() for row, table in zip(rows[1:], source.rotary, strict=False)
        )
        pool, pinned = carried[:2] if for_good else (source.pool, source.pinned)
        kept = index if source.kept is None else torch.where(index < 0, index, carried[-1])
        self.kept.append(kept)
        visible, last = self._seen_by_last(stage, kept)
        parent = source
        if self.policy.action == "remove" and source.parent is not None:
            parent, index = source.parent, kept  # the survivors' own sequence is needed no more
        self._active = TokenSequence(compact, rotary, pool, pinned, visible, last, kept, parent, index, proxies)
        self._frozen = self._frozen_in = None
        return compact

    def _seen_by_last(self, stage: int, kept: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """`visible` and `last` of the tokens of a stage, as in `TokenSequence`."""
        ragged = self.is_ragged(stage)
        if self.prompt.ranks_within:
            last = on_device(kept.device, self._last[stage])
            visible = torch.arange(kept.shape[1], device=kept.device) <= last[:, None]
            return visible & (kept >= 0) if ragged and self.pad_left else visible, last
        if ragged:
            return kept >= 0, None if self.pad_left else on_device(kept.device, self._last[stage])
        return None, None

    def _pinned(self, source: TokenSequence, stage: int) -> tuple[Tensor, Tensor]:
        """(B, L) bool, tokens that a stage runs whatever their score, and (B,), how many it selects by score."""
        keep = on_device(source.hidden.device, self._keep[stage])
        if not any(self._even_counts[stage]):
            return source.pinned, keep
        even = on_device(source.hidden.device, self._even[stage])
        return source.pinned | evenly(source.pool, even), keep - even

    def _lead(
        self, ranked: Attention | Tensor, memory: Memory | None, source: TokenSequence, pinned: Tensor, keep: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
        """Select the tokens of a stage the last of which are means of groups, by the leaders of the groups.

        Returns:
            (B, L) float32, the scores, with what was remembered; (B, L) bool, the tokens that run; (B,) zeros, how many
            are left to be selected; and of the groups (B, L) int64, the one of each token, -1 if it is in none, and
            (B, L) bool, the leaders.
        """
        stage = len(self.kept)
        count = on_device(keep.device, self._merged[stage])
        length, most = self.lengths[stage], max(self._merged_counts[stage])
        scores = self._all_scores(ranked) if isinstance(ranked, Attention) else ranked
        if memory is None:
            index = ops.select_tokens(scores, source.pool, pinned, keep - count, length)
        else:
            index, scores = ops.select_tokens(scores, source.pool, pinned, keep - count, length, memory)
        selected, hidden = flags_of(index, scores.shape[1]), source.hidden
        if self.policy.recycle:
            tokens, most_tokens = on_device(keep.device, self._recycled[stage]), max(self._recycled_counts[stage])
            led, groups = recycle(hidden, scores, source.pool & ~selected, tokens, count, most_tokens, most)
        else:
            led = leaders(selected, source.pool, count)
            groups = closest_leaders(hidden, source.pool & ~selected & ~led, led, most)
        return scores, selected | led, torch.zeros_like(keep), (groups, led)

    def _remembered(self, stage: int, device: torch.device) -> Memory | None:
        """Scores that a decision remembers, and how much of them counts; None if it does not remember."""
        rule = part_of(self._ranking(stage), Remembered)
        if rule is None:
            return None
        if self._memory is None:
            return Memory(float(rule.decay))
        return Memory(float(rule.decay), *(on_device(device, each) for each in self._memory.operands()))

    def _remember(self, memory: Memory | None, scores: Tensor, places: Tensor | None) -> None:
        """Keep scores for the next decision, whose candidates are the survivors at `places`, or all if it is None.

        Nothing is gathered for it: the next selection looks up what it needs. A decision that does not remember leaves
        what others did.
        """
        if memory is not None:
            self._memory = Memory(memory.decay, scores, places)
        elif self._memory is not None and places is not None:
            before = on_device(places.device, self._memory.places)
            if before is not None:
                places = torch.where(places < 0, -1, before.gather(1, places.clamp(min=0)))
            self._memory = self._memory._replace(places=places)

    def _drops(self, stage: int) -> bool:
        """Whether tokens that a stage does not run are no candidates of later decisions."""
        return self.policy.action == "remove" or (self._reduces and stage == 0)

    def freezes(self, stage: int) -> bool:
        """Whether the layers of a stage cache the tokens that do not run there."""
        return self.policy.action == "freeze" and not (self._reduces and stage == 0)

    def cached(self, stage: int) -> tuple[Tensor, bool]:
        """The tokens that the layers of a stage cache.

        Returns:
            (B, S) int64, their positions in the full sequence, -1 at rows that hold no token; and whether there are
            such rows.
        """
        if not self.freezes(stage):
            return self.kept[stage], self.is_ragged(stage)
        if self._reduces:
            return self.kept[0], self.is_ragged(0)
        prompt, device = self.prompt, self.kept[stage].device
        positions = torch.arange(prompt.length, device=device).expand(len(prompt.visual_counts), -1)
        valid = on_device(device, prompt.valid)
        return positions if valid is None else torch.where(valid, positions, -1), prompt.padded

    def frozen(self) -> FrozenTokens:
        """The tokens that do not run in this stage, which freezes them."""
        active = self.active
        parent, places = active.parent, active.index
        assert parent is not None
        assert places is not None
        found = self._frozen
        if found is None:
            found = self._find_frozen(parent, places)
        elif self._frozen_in is not parent.hidden:  # features were added to it, or it was moved
            (hidden,) = ops.gather_tokens(on_device(parent.hidden.device, found.index), parent.hidden)
            found = replace(found, hidden=hidden)
        self._frozen, self._frozen_in = found, parent.hidden
        return found

    def _find_frozen(self, parent: TokenSequence, places: Tensor) -> FrozenTokens:
        stage, device = len(self.kept) - 1, places.device
        batch, rows = places.shape
        counts = self.row_lengths[0] if self._reduces else self.prompt.valid_counts
        most = max(count - ran for count, ran in zip(counts, self.row_lengths[stage], strict=True))
        cached, ragged = self.cached(stage)
        size = cached.shape
        runs = flags_of(places, size[1])
        index = positions_of((cached >= 0) & ~runs if ragged else ~runs, most)
        order = torch.full(size, -1, dtype=torch.int64, device=device)
        numbers = torch.arange(rows + most, device=device).expand(batch, -1)
        order = ops.scatter_tokens_(order, torch.cat([places, index], dim=1), numbers.contiguous())
        hidden, *rotary = ops.gather_tokens(index, parent.hidden, *parent.rotary)
        return FrozenTokens(hidden, tuple(rotary), order, places, index)

    def _norm(self, hidden: Tensor, projection: Projection) -> Norm | None:
        """The norm before a ranking, if it is to be computed with the write-back; None leaves it to the layer.

        That is worth it where a kernel does it. The norm and what is written then take no part in gradients.
        """
        if not getattr(self._ranking(len(self.kept)), "projects", False) or torch.compiler.is_compiling():
            return None
        if active_backend(hidden.device) != "triton" or (torch.is_grad_enabled() and self._has_gradients(hidden)):
            return None
        return projection.norm(hidden)

    def _has_gradients(self, hidden: Tensor) -> bool:
        parent = None if self._active is None else self._active.parent
        return hidden.requires_grad or (parent is not None and parent.hidden.requires_grad)

    def _rank(self, source: TokenSequence, projection: Projection, states: Tensor | None) -> Attention | Tensor:
        """Rank the candidates of the next decision by its ranking; states are their norm, if it was computed."""
        stage = len(self.kept)
        if states is None:
            source.lend()  # the layer's norm is a module, whose hooks may hold its input
        candidates = Candidates(
            pool=source.pool,
            text=source.pinned,
            valid=source.visible,
            last=source.last,
            keep=on_device(source.hidden.device, self._keep[stage]),
            most_text=self.prompt.most_text,
            decision=stage - self._reduces,
            _hidden=source.hidden,
            _lend=source.lend,
            _rotary=source.rotary,
            _projection=projection,
            _states=states,
            _raters=None if self.inputs is None and self._raters is None else partial(self._raters_of, source),
        )
        with torch.no_grad():
            ranked = self._ranking(stage).rank(candidates)
        if isinstance(ranked, Attention):
            return ranked
        expected = tuple(source.pool.shape)
        if not isinstance(ranked, Tensor) or ranked.shape != expected or ranked.dtype != torch.float32:
            got = f"{tuple(ranked.shape)} {ranked.dtype}" if isinstance(ranked, Tensor) else type(ranked).__name__
            raise TypeError(
                f"ranking must give scores {expected} float32, or what candidates.attention returns, got {got} from "
                f"{self._ranking(stage)!r}"
            )
        return self._combined(ranked.detach(), "mean")

    def _raters_of(self, source: TokenSequence) -> Tensor:
        """(B, M) bool, the raters among the tokens of a sequence."""
        if self._raters is None:
            assert self.inputs is not None
            prompt, device = self.prompt, self.inputs.device
            visual, text = on_device(device, prompt.pool), on_device(device, rating_text(prompt))
            self._raters = text_raters(self.inputs, visual, text, prompt.most_text)
            self.inputs = None
        raters = on_device(source.hidden.device, self._raters)
        if source.kept is None:
            return raters
        return raters.gather(1, source.kept.clamp(min=0)) & (source.kept >= 0)

    def _all_scores(self, ranked: Attention) -> Tensor:
        return self._combined(ranked.scores(), ranked.head_reduction)

    def _combined(self, scores: Tensor, reduction: str) -> Tensor:
        """Scores by all heads; on every process the same."""
        return scores if self.combine is None else self.combine(scores, reduction)

    def _route(
        self,
        ranked: Attention | Tensor,
        memory: Memory | None,
        pool: Tensor,
        pinned: Tensor,
        keep: Tensor,
        length: int,
        tensors: tuple[Tensor, ...],
    ) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
        """`ops.route_tokens`, in steps if there are scores, or if they must be combined."""
        if isinstance(ranked, Attention) and self.combine is None:
            selection = pool, pinned, keep, length, tensors
            return ops.route_tokens(ranked, *selection, return_scores=True, memory=memory)  # type: ignore[return-value]
        if isinstance(ranked, Attention):
            ranked = self._all_scores(ranked)
        if memory is None:
            index = ops.select_tokens(ranked, pool, pinned, keep, length)
        else:
            index, ranked = ops.select_tokens(ranked, pool, pinned, keep, length, memory)
        return index, ops.gather_tokens(index, *tensors), ranked

    @staticmethod
    def _left_padded(index: Tensor, rows: Sequence[Tensor], lengths: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The same rows, left-padded: index (B, M), rows (B, M, ...), lengths (B,) without padding."""
        length = index.shape[1]
        shifted = torch.arange(length, device=index.device) - (length - lengths)[:, None]
        shifted = shifted.clamp(min=-1)
        moved = torch.where(shifted < 0, shifted, index.gather(1, shifted.clamp(min=0)))
        return moved, ops.gather_tokens(shifted, *rows)

    def _source(
        self, hidden: Tensor, rotary: tuple[Tensor, ...], norm: Norm | None
    ) -> tuple[TokenSequence, Tensor | None]:
        """The sequence to select from: under `reroute` all tokens, or all that a reducer left, else the survivors.

        With it the norm of its hidden states, or None without one.
        """
        active = self._active
        if active is None:
            prompt = self.prompt
            full = TokenSequence(hidden, rotary, prompt.pool, prompt.pinned, prompt.visible, prompt.last)
            full.move(hidden.device)
            return full, full.normed(norm)
        active.take(hidden)
        if not self._drops(len(self.kept) - 1):
            aligns = self.policy.align == "stage" or active.proxies is not None  # a small stage has no proxies
            return active.write_back(norm, aligns=aligns)
        if self.policy.action == "remove":  # the tokens that a reducer left are written back once, at the end
            active.write_back()
        return active, active.normed(norm)

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
        """Full-length hidden states after the last layer; a token that did not run shows its last hidden state.

        Trailing padding shows its sample's last token, so that reading the last position of a row is right whatever
        the padding side.
        """
        self.inputs = None
        sequence = self.active
        sequence.take(hidden)
        while sequence.parent is not None:
            sequence, _ = sequence.write_back()
        return self.with_padding(sequence.hidden)

    def with_padding(self, full: Tensor) -> Tensor:
        """Rows (B, L, ...) of the full sequence in which trailing padding shows its sample's last token."""
        prompt = self.prompt
        if prompt.right_padded and prompt.end is not None:
            end = on_device(full.device, prompt.end)
            trailing = torch.arange(prompt.length, device=full.device) > end[:, None]
            last_row = full.gather(1, end.clamp(min=0)[:, None, None].expand(-1, 1, full.shape[2]))
            full = torch.where(trailing[:, :, None], last_row, full)
        return full
