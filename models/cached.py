"""Record of the routed prompt that filled a cache, which lives with the cache object."""

from __future__ import annotations

from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor

from reroute_kernels.policy import Policy
from reroute_kernels.routing import RoutedForward, on_device

_ATTRIBUTE = "_reroute_kernels_prompt"
"""The attribute of a cache object that holds its `CachedPrompt`: it lives, is copied and dies with the cache."""


def has_record(cache) -> bool:
    """Whether a routed prompt filled a cache, or began to."""
    return hasattr(cache, _ATTRIBUTE)


def record_of(cache) -> CachedPrompt | None:
    """Record of the routed prompt in a cache; None if there is none, or if the call that filled it failed."""
    return getattr(cache, _ATTRIBUTE, None)


def begin_record(cache) -> None:
    """Mark a cache that a routed prompt is about to fill, so that a failed call leaves no finished prompt there."""
    if not hasattr(cache, _ATTRIBUTE):
        setattr(cache, _ATTRIBUTE, None)


def set_record(cache, prompt: CachedPrompt) -> None:
    """Leave with a cache the record of the routed prompt that it holds."""
    setattr(cache, _ATTRIBUTE, prompt)


def drop_record(cache) -> None:
    """Take the record off a cache."""
    delattr(cache, _ATTRIBUTE)


@dataclass(eq=False)
class CacheState:
    """Contents of a cache before a call. Lists have one entry per stage."""

    length: int
    """Tokens of the full sequence, padding included."""
    lengths: list[int]
    """P, the cached tokens of a stage's layers."""
    valid: list[Tensor | None]
    """(B, P) bool, False at cached rows that hold no token; None if all do."""
    positions: list[Tensor]
    """(B or 1, P) positions in the full sequence."""
    visible: list[Tensor | None] | None = None
    """(B, P) bool, False also at keys that this call hides and the next one may show; None if it hides none."""

    def seen(self, stage: int) -> Tensor | None:
        """Which keys of a stage the call sees, (B, P) bool; None for all."""
        return (self.valid if self.visible is None else self.visible)[stage]

    def extended(self, stage: int, valid: Tensor | None, kept: Tensor, ragged: bool) -> tuple[Tensor | None, Tensor]:
        """Which keys of a stage count, and their positions, once a prompt's rows are cached behind them.

        Args:
            stage: index of the stage.
            valid: (B, P) bool, which of the keys before count; None for all.
            kept: (B, M) positions in the prompt, -1 at rows that hold no token.
            ragged: whether there are such rows.

        Returns:
            (B, P + M) bool, or None if all do; and (B, P + M).
        """
        batch, length = kept.shape
        valid = _joined(valid, self.lengths[stage], kept >= 0 if ragged else None, length, kept, batch)
        earlier = on_device(kept.device, self.positions[stage]).expand(batch, -1)
        return valid, torch.cat([earlier, kept + self.length], dim=1)

    @classmethod
    def unrouted(cls, length: int, visible: Tensor | None, stages: int, device: torch.device) -> CacheState:
        """State of a cache that no routed prompt filled: all layers hold the same `length` tokens.

        visible: (B, length) bool, the tokens that the call sees, or None if it sees all.
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
    """Rotary position of each sample's last token, (..., B, 1), if later positions are derived from it; else None."""
    right_padded: bool
    rows: Tensor
    """(stages, B), the tokens of each sample that each stage ran."""

    @classmethod
    def of(cls, forward: RoutedForward, before: CacheState | None, last_position: Tensor | None) -> CachedPrompt:
        """Record of a finished forward on a cache that held `before`, without draft tokens, which can be rejected."""
        prompt = forward.prompt
        lengths, all_valid, positions = [], [], []
        for stage in range(len(forward.kept)):
            kept, ragged = forward.cached(stage)
            length = kept.shape[1] - prompt.draft_tokens
            kept = kept[:, :length]
            valid, of_stage = (kept >= 0 if ragged else None), kept
            if before:
                valid, of_stage = before.extended(stage, before.valid[stage], kept, ragged)
                length += before.lengths[stage]
            lengths.append(length)
            all_valid.append(valid)
            positions.append(of_stage)
        length = (before.length if before else 0) + prompt.length - prompt.draft_tokens
        past = CacheState(length, lengths, all_valid, positions)
        rows = forward.rows - prompt.draft_tokens
        return cls(forward.policy, prompt.visual.shape[0], past, last_position, prompt.right_padded, rows)

    def valid_keys(self, stage: int, batch: int, visible: Tensor | None, count: int) -> Tensor | None:
        """Which of a stage's keys count for the tokens of a later call.

        Args:
            stage: index of the stage.
            batch: samples of the call, B or a multiple of it (each sample repeated in place).
            visible: (batch, L + count) bool of the prompt and all tokens after it, False at padding and at tokens that
                the call hides; None if there is neither.
            count: the tokens after the prompt.

        Returns:
            (batch, P + count) bool, or None if every key counts.
        """
        positions, cached = self.past.positions[stage], _repeated(self.past.valid[stage], batch)
        added = None
        if visible is not None:
            visible = on_device(positions.device, visible)
            index = _repeated(positions, batch).clamp(min=0).expand(batch, -1)
            shown = visible[:, : self.past.length].gather(1, index)
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


@overload
def _repeated(rows: Tensor, batch: int) -> Tensor: ...


@overload
def _repeated(rows: None, batch: int) -> None: ...


@overload
def _repeated(rows: Tensor | None, batch: int) -> Tensor | None: ...


def _repeated(rows: Tensor | None, batch: int) -> Tensor | None:
    if rows is None or rows.shape[0] in (1, batch):
        return rows
    return rows.repeat_interleave(batch // rows.shape[0], dim=0)


def _joined(
    first: Tensor | None, first_length: int, second: Tensor | None, second_length: int, like: Tensor, batch: int
) -> Tensor | None:
    """(batch, first + second) bool of two masks, each None if it is all True; None if both are."""
    if first is None and second is None:
        return None
    parts = [
        torch.ones(batch, length, dtype=torch.bool, device=like.device)
        if mask is None
        else on_device(like.device, mask).expand(batch, -1)
        for mask, length in ((first, first_length), (second, second_length))
    ]
    return torch.cat(parts, dim=1)
