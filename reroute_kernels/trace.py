"""Trace of a routed prefill: which tokens ran in each stage, and their scores."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .policy import Policy

if TYPE_CHECKING:
    from .routing import RoutedForward


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
    def of(cls, forward: RoutedForward, offset: int = 0) -> Trace:
        """Record of a finished forward; offset: the tokens that its cache held before."""
        prompt, policy = forward.prompt, forward.policy
        keeps: list[float | None] = [stage.keep for stage in policy.schedule]
        if policy.reducer is not None:
            keeps.insert(0, None)
        stages = [
            StageTrace(layer, keep, length, kept, prompt.visual, offset, scored)
            for layer, keep, length, kept, scored in zip(
                policy.stage_layers, keeps, forward.lengths, forward.kept, forward.scored, strict=True
            )
        ]
        reduction = stages.pop(0) if policy.reducer is not None else None
        return cls(policy, prompt.length, prompt.visual_counts, stages, reduction)
