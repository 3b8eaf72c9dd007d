"""Tokens that each layer caches of a request, known from counts alone; no vLLM here.

How many visual tokens a stage selects depends on their number only, so the host knows the place of every later token.
In the layers of a stage that defers D of a request's tokens, the token at position p is row p - D of its cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from ..policy import Policy


@dataclass(frozen=True)
class Plan:
    """A policy on a decoder.

    Args:
        policy: the policy.
        layers: of the decoder.

    Raises:
        ValueError: the policy decides at a layer that the decoder has not.
    """

    policy: Policy
    layers: int

    def __post_init__(self):
        last = self.policy.schedule[-1].layer
        if last >= self.layers:
            raise ValueError(f"schedule must stay below layer {self.layers} of this model, got layer {last}")

    @property
    def stages(self) -> list[range]:
        """The layers of each stage."""
        starts = [stage.layer for stage in self.policy.schedule]
        return [range(*ends) for ends in pairwise((*starts, self.layers))]

    def stage_of(self, layer: int) -> int | None:
        """The number of the stage that a layer is in; None before the first decision."""
        numbers = [number for number, layers in enumerate(self.stages) if layer in layers]
        return numbers[0] if numbers else None

    def deferred(self, visual: int, ends_visual: bool = False) -> tuple[int, ...]:
        """How many tokens of a request each stage leaves out.

        Args:
            visual: N, its visual tokens.
            ends_visual: whether the prompt ends with one, which then runs whatever its score.
        """
        if visual == 0:
            return (0,) * len(self.policy.schedule)
        pool = visual - ends_visual
        return tuple(pool - kept for kept in self.policy.selected_counts(visual, pool))


@dataclass(frozen=True)
class Share:
    """The share that one request has in a step."""

    computed: int
    """Tokens whose keys the cache holds."""
    scheduled: int
    """Tokens of this step."""
    prompt: int
    """Tokens of the prompt."""
    deferred: tuple[int, ...]
    """Number of prompt tokens that each stage leaves out."""

    @property
    def starts(self) -> bool:
        """Whether the prompt is in this step: for the first time, or anew after a preemption."""
        return self.computed == 0

    @property
    def is_routed(self) -> bool:
        return any(self.deferred)


@dataclass(frozen=True)
class StageLayout:
    """The tokens that run in the layers of a stage, request after request.

    query_lens, seq_lens: (R,), tokens that run, and keys that the cache then holds; requests, rows: (T,), for each
    token its request and the row of its key in that request's cache.
    """

    query_lens: np.ndarray
    seq_lens: np.ndarray
    requests: np.ndarray
    rows: np.ndarray


def stage_layout(shares: Sequence[Share], stage: int) -> StageLayout:
    """Lay out the tokens of a step for the layers of a stage.

    Raises:
        RuntimeError: a step holds a part of a routed prompt only.
    """
    query_lens, seq_lens, rows = [], [], []
    for share in shares:
        deferred = share.deferred[stage]
        if share.is_routed and (share.computed + share.scheduled if share.starts else share.computed) < share.prompt:
            raise RuntimeError(
                f"a prompt with visual tokens must be prefilled in one step, got {share.scheduled} tokens after "
                f"{share.computed} of {share.prompt}; chunked prefill and prefix caching must be off"
            )
        end = share.computed + share.scheduled - deferred
        count = end if share.starts else share.scheduled
        query_lens.append(count)
        seq_lens.append(end)
        rows.append(np.arange(end - count, end))
    counts = np.array(query_lens, dtype=np.int64)
    return StageLayout(
        counts, np.array(seq_lens, dtype=np.int64), np.repeat(np.arange(len(counts)), counts), np.concatenate(rows)
    )
