"""Trace of a routed prefill: which tokens ran in each stage, and their scores."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass, field
from functools import cached_property
from html import escape
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .policy import Policy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .routing import RoutedForward


@dataclass(eq=False)
class DecisionScores:
    """Scores of one decision, (B, S) float32 over a sequence of S tokens, and which of them are candidates.

    pool: (B, S) bool; kept: (B, S) positions in the full sequence, or None if this is the full sequence.
    """

    scores: Tensor
    pool: Tensor
    kept: Tensor | None

    def of_visual(self, visual: Tensor) -> list[Tensor]:
        """For each sample the scores of its visual tokens, NaN at those that were no candidates; visual: (B, L)."""
        scores = self.scores.cpu().masked_fill(~self.pool.cpu(), torch.nan)
        if self.kept is not None:
            # Rows without a token go to an extra column, which is cut off.
            index, length = self.kept.cpu(), visual.shape[1]
            full = scores.new_full((len(scores), length + 1), torch.nan)
            scores = full.scatter_(1, torch.where(index < 0, length, index), scores)[:, :length]
        return [row[is_visual] for row, is_visual in zip(scores, visual, strict=True)]


@dataclass(frozen=True, eq=False)
class StageTrace:
    """Record of one stage of a routed prefill; nothing is copied from the device before it is read."""

    layer: int
    """The decision layer; 0 for the stage of a reducer."""
    keep: float | None
    """The share of visual tokens that was asked for; None for the stage of a reducer."""
    tokens: int
    """M, the tokens that each row of this stage's layers holds and caches; under `freeze` others are cached, too."""
    _kept: Tensor = field(repr=False)
    _visual: Tensor = field(repr=False)
    _offset: int = field(repr=False)
    _scored: DecisionScores | None = field(repr=False)

    @cached_property
    def selected(self) -> list[Tensor]:
        """For each sample the positions of the visual tokens that ran: int64, ascending, on the CPU.

        They count from the first token of the conversation: tokens that a cache held before stand in front.
        """
        kept, visual = self._kept.cpu(), self._visual.cpu()
        rows = (row[row >= 0] for row in kept)
        return [row[is_visual[row]] + self._offset for row, is_visual in zip(rows, visual, strict=True)]

    @cached_property
    def scores(self) -> list[Tensor] | None:
        """For each sample the scores of its N visual tokens: (N,) float32, in their order, on the CPU.

        To be compared within a sample and a decision; the highest run. NaN at tokens that were no candidates, such as
        those gone under `remove`. None for the stage of a reducer, which is not ranked here.
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
    _visual: Tensor | None = field(default=None, repr=False)
    _offset: int = field(default=0, repr=False)

    @cached_property
    def visual_positions(self) -> list[Tensor]:
        """For each sample the positions of its visual tokens: int64, on the CPU; counted as in `selected`."""
        assert self._visual is not None
        return [row.nonzero().flatten() + self._offset for row in self._visual.cpu()]

    def __repr__(self) -> str:
        return f"Trace({self.summary()})"

    def summary(self) -> str:
        """Tokens that ran, stage by stage: a line that needs no copy from the device."""
        visual = ", ".join(f"{count:,}" for count in self.visual_counts)
        parts = [f"{visual} visual of {self.length:,} tokens"]
        if self.reduction is not None:
            parts.append(f"a reducer left {self.reduction.tokens:,} tokens")
        parts += [f"{stage.tokens:,} tokens from layer {stage.layer}" for stage in self.stages]
        return "; ".join(parts)

    def plot(self, sample: int = 0) -> Figure:
        """Picture of a sample: a row for each stage, a column for each visual token: run, deferred or removed.

        It needs matplotlib.

        Args:
            sample: of the batch.

        Returns:
            A figure, to be saved by its method `savefig`.

        Raises:
            IndexError: there is no such sample.
        """
        from .cli.plot import draw_trace

        if not 0 <= sample < len(self.visual_counts):
            raise IndexError(f"sample must be from 0 to {len(self.visual_counts) - 1}, got {sample}")
        return draw_trace(self, sample)

    def _repr_html_(self) -> str:
        """Table of the stages and, if matplotlib is installed, the picture of the first sample; for notebooks."""
        header = "".join(f"<th>{title}</th>" for title in ("layers from", "tokens in a row", "visual tokens that ran"))
        rows = "".join(
            f"<tr><td>{stage.layer}</td><td>{stage.tokens:,}</td>"
            f"<td>{', '.join(f'{len(each):,}' for each in stage.selected)}</td></tr>"
            for stage in self.stages
        )
        table = f"<p>{escape(str(self.policy))}</p><table><tr>{header}</tr>{rows}</table>"
        try:
            figure = self.plot()
        except ModuleNotFoundError:
            return table
        png = io.BytesIO()
        figure.savefig(png, format="png", dpi=80)
        return f'{table}<img alt="" src="data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}">'

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
        return cls(policy, prompt.length, prompt.visual_counts, stages, reduction, prompt.visual, offset)
