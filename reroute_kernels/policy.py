"""What to route: stages, and the policy that a model follows."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from numbers import Real
from operator import index as as_integer

ACTIONS = ("reroute", "remove")
RANKINGS = ("last_query",)
POSITIONS = ("original", "contiguous")


@dataclass(frozen=True)
class Stage:
    """A decision layer and the share of the prompt's visual tokens that run from it on.

    Args:
        layer: decoder layer before which tokens are ranked and selected, counted from 0.
        keep: share of a sample's visual tokens that run, in (0, 1], always relative to the number in the prompt.

    Raises:
        TypeError: an argument is not a number.
        ValueError: an argument is out of range.
    """

    layer: int
    keep: float

    def __post_init__(self):
        if isinstance(self.layer, bool):
            raise TypeError(f"layer must be an integer, got {self.layer!r}")
        try:
            object.__setattr__(self, "layer", as_integer(self.layer))
        except TypeError:
            raise TypeError(f"layer must be an integer, got {self.layer!r}") from None
        if self.layer < 0:
            raise ValueError(f"layer must be 0 or more, got {self.layer}")
        if isinstance(self.keep, bool) or not isinstance(self.keep, Real):
            raise TypeError(f"keep must be a number in (0, 1], got {self.keep!r} at layer {self.layer}")
        object.__setattr__(self, "keep", float(self.keep))
        if not 0.0 < self.keep <= 1.0:
            raise ValueError(f"keep must be in (0, 1], got {self.keep} at layer {self.layer}")


@dataclass(frozen=True)
class Policy:
    """Which visual tokens run in which layers.

    Args:
        schedule: stages in ascending order of their decision layers.
        action: `"reroute"` defers what is not selected, so that it is a candidate again at the next decision layer
            (arXiv 2606.12412); `"remove"` drops it for good, as FastV and PyramidDrop do.
        ranking: `"last_query"` scores a token by the attention that the last prompt token pays to it in the decision
            layer, averaged over heads.
        positions: `"original"` keeps every token's rotary position; `"contiguous"` renumbers the tokens that run.

    Raises:
        TypeError: `schedule` holds something else than stages.
        ValueError: `schedule` is empty or out of order, or a name is unknown.
    """

    schedule: tuple[Stage, ...]
    action: str = "reroute"
    ranking: str = "last_query"
    positions: str = "original"

    def __post_init__(self):
        if not isinstance(self.schedule, Iterable):
            raise TypeError(f"schedule must be a sequence of Stage, got {self.schedule!r}")
        object.__setattr__(self, "schedule", tuple(self.schedule))
        if not self.schedule:
            raise ValueError("schedule must hold at least one Stage, got none")
        for stage in self.schedule:
            if not isinstance(stage, Stage):
                raise TypeError(f"schedule must hold Stage objects, got {stage!r}")
        layers = [stage.layer for stage in self.schedule]
        if any(later <= earlier for earlier, later in pairwise(layers)):
            raise ValueError(f"schedule must have strictly ascending layers, got {layers}")
        for name, accepted in (("action", ACTIONS), ("ranking", RANKINGS), ("positions", POSITIONS)):
            value = getattr(self, name)
            if value not in accepted:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, accepted))}, got {value!r}")

    def selected_counts(self, visual_tokens: int, candidates: int | None = None) -> tuple[int, ...]:
        """How many tokens are selected at each stage: K = min(pool, max(1, trunc(N * keep))).

        Args:
            visual_tokens: N, the visual tokens of one sample's prompt.
            candidates: how many of them may be selected at the first decision (default: all).

        Returns:
            One K per stage. Under `remove` the pool of a stage is what the stage before it kept.
        """
        pool = visual_tokens if candidates is None else candidates
        counts = []
        for stage in self.schedule:
            counts.append(min(pool, max(1, math.trunc(visual_tokens * stage.keep))))
            if self.action == "remove":
                pool = counts[-1]
        return tuple(counts)
