"""Stages, and the policy that a model follows."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from numbers import Real
from operator import index as as_integer
from typing import Any, NamedTuple

from .checks import expect_one_of
from .rankings import LastQuery, Mixed, RankingLike, part_of
from .reducers import ReducerLike

ACTIONS = ("reroute", "remove", "freeze")
POSITIONS = ("original", "contiguous")
ALIGNMENTS = (None, "stage", "proxy")
PROXIES = 8
"""One in so many of the tokens that a stage runs is a proxy under `align="proxy"`."""

TOKENS_PER_CLUSTER = 10
"""Recycled tokens for each of their clusters, as in SparseVLM."""

LAST_QUERY = LastQuery()
"""The default ranking."""


def recycled_tokens(removed: int, share: float) -> tuple[int, int]:
    """How many of the removed tokens are recycled, and how many clusters they make."""
    tokens = min(removed, int(share * removed) + 1)
    return tokens, tokens // TOKENS_PER_CLUSTER + 1


@dataclass(frozen=True)
class Stage:
    """A decision layer and the share of the prompt's visual tokens that run from it on.

    Args:
        layer: decoder layer before which tokens are ranked and selected, counted from 0.
        keep: share of a sample's visual tokens that run, in (0, 1], always relative to the number in the prompt.
        ranking: of this decision, as in `Policy`; None for the policy's.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range, or the name of a ranking is unknown.

    >>> from reroute_kernels.rankings import Uniform
    >>> Stage(3, 0.25), Stage(7, 0.1, ranking=Uniform())
    (Stage(layer=3, keep=0.25), Stage(layer=7, keep=0.1, ranking=Uniform()))
    """

    layer: int
    keep: float
    ranking: RankingLike | None = None

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
        if self.ranking is not None:
            object.__setattr__(self, "ranking", _accepted_ranking(self.ranking))

    def __repr__(self) -> str:
        ranking = "" if self.ranking is None else f", ranking={self.ranking!r}"
        return f"Stage(layer={self.layer}, keep={self.keep!r}{ranking})"


def _accepted_ranking(given: object) -> RankingLike:
    """A ranking, given as it is or by its name, or an error that tells what is accepted."""
    if given == "last_query":
        return LAST_QUERY
    if isinstance(given, str):
        raise ValueError(
            f"ranking must be 'last_query' or an object such as those of reroute_kernels.rankings, got {given!r}"
        )
    return _with_method("ranking", given, "rank")


def _with_method(name: str, given: Any, method: str) -> Any:
    """An object that has a method, or an error."""
    if isinstance(given, type) or not callable(getattr(given, method, None)):
        raise TypeError(f"{name} must be an object with a method {method!r}, got {given!r}")
    return given


class Budget(NamedTuple):
    """Budget that a policy was solved for, see `reroute_kernels.solve`."""

    kind: str
    """`"avg_tokens"`, `"flops"` or `"kv_bytes"`."""
    limit: float
    """The limit."""
    reached: float
    """The policy's cost; never above the limit."""

    @property
    def under(self) -> float:
        """By how much the policy stays under the limit."""
        return self.limit - self.reached


@dataclass(frozen=True)
class Policy:
    """Which visual tokens run in which layers.

    Args:
        schedule: stages in ascending order of their decision layers; may be empty if there is a reducer.
        action: `"reroute"` defers tokens that are not selected, so that they are candidates again at the next decision
            layer (arXiv 2606.12412); `"remove"` drops them for good, as FastV and PyramidDrop do; `"freeze"` lets them
            write their keys and values in the layers that they skip, so that text and the tokens that run still read
            them (ShortV, arXiv 2504.00502), and makes them candidates again.
        ranking: one of `reroute_kernels.rankings`, or an object with such a method `rank`. The default, `LastQuery()`
            or its name `"last_query"`, ranks a token by the attention that the last prompt token pays to it in the
            decision layer, averaged over heads. A stage may have its own.
        positions: `"original"` keeps every token's rotary position; `"contiguous"` numbers the tokens that run in a
            stage from 0 on, and the tokens decoded after them likewise.
        reducer: one of `reroute_kernels.reducers`, or an object with such a method `reduce`; it drops visual tokens
            before the language model runs, and the rest is the pool of all decisions. Keep ratios stay relative to all
            visual tokens of the prompt, the dropped ones included.
        budget: the budget that the schedule was solved for, if it was. Does not take part in comparisons.
        align: what becomes of the hidden states of deferred tokens. None: they stay as they are. `"stage"`, under
            `reroute` alone: when the next decision begins, each receives the mean change that the layers since the last
            one made to the candidates of its sample that ran. `"proxy"`, as in SwiftVLM (arXiv 2602.03134): one in 8 of
            the tokens that a stage runs is the mean of a group of deferred ones of similar hidden states, in the place
            of one of them, and each of the group receives the change that the layers made to it. After the last stage
            nothing is added, and the last stage has no such means.
        recycle: share of the removed tokens, in [0, 1], that is merged, under `remove` alone, as in SparseVLM (arXiv
            2410.04417). Those with the best scores are clustered, one cluster for every ten tokens and one more. The
            mean of a cluster takes the place of one of its tokens. The means are among the K tokens of the stage, and
            candidates later. With 0 every removed token is gone.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: `schedule` is empty without a reducer, out of order, or begins at layer 0 with a reducer or with a
            ranking by the previous layer there; a name is unknown; `align` is given under another action than
            `reroute` or `recycle` under another one than `remove`, or positions are contiguous under `freeze`.

    >>> policy = Policy([Stage(layer=3, keep=0.25), Stage(layer=7, keep=0.1)], action="remove")
    >>> policy.selected_counts(visual_tokens=576)
    (144, 57)
    """

    schedule: Sequence[Stage]
    action: str = "reroute"
    ranking: RankingLike = LAST_QUERY
    positions: str = "original"
    reducer: ReducerLike | None = None
    budget: Budget | None = field(default=None, compare=False, repr=False)
    align: str | None = None
    recycle: float = 0.0

    def __post_init__(self):
        object.__setattr__(self, "ranking", _accepted_ranking(self.ranking))
        self._check_schedule()
        if self.reducer is not None:
            _with_method("reducer", self.reducer, "reduce")
        expect_one_of(
            action=(self.action, ACTIONS), positions=(self.positions, POSITIONS), align=(self.align, ALIGNMENTS)
        )
        if self.action == "freeze" and self.positions != "original":
            raise ValueError(
                "positions must be 'original' under the action 'freeze', which leaves every token in its place, got "
                f"{self.positions!r}"
            )
        if self.align is not None and self.action != "reroute":
            raise ValueError(
                f"align must be None under the action {self.action!r}, under which no token waits, got {self.align!r}"
            )
        self._check_recycle()
        if self.schedule and self.schedule[0].layer == 0:
            self._check_first_layer()

    def _check_recycle(self) -> None:
        if isinstance(self.recycle, bool) or not isinstance(self.recycle, Real):
            raise TypeError(f"recycle must be a number in [0, 1], got {self.recycle!r}")
        object.__setattr__(self, "recycle", float(self.recycle))
        if not 0.0 <= self.recycle <= 1.0:
            raise ValueError(f"recycle must be in [0, 1], got {self.recycle}")
        if self.recycle and self.action != "remove":
            raise ValueError(
                f"recycle must be 0 under the action {self.action!r}, under which no token is removed, got "
                f"{self.recycle}"
            )

    def _check_schedule(self) -> None:
        if not isinstance(self.schedule, Iterable):
            raise TypeError(f"schedule must be a sequence of Stage, got {self.schedule!r}")
        object.__setattr__(self, "schedule", tuple(self.schedule))
        if not self.schedule and self.reducer is None:
            raise ValueError("schedule must hold at least one Stage, got none")
        for stage in self.schedule:
            if not isinstance(stage, Stage):
                raise TypeError(f"schedule must hold Stage objects, got {stage!r}")
        layers = [stage.layer for stage in self.schedule]
        if any(later <= earlier for earlier, later in pairwise(layers)):
            raise ValueError(f"schedule must have strictly ascending layers, got {layers}")

    def _check_first_layer(self) -> None:
        if self.reducer is not None:
            raise ValueError("schedule must begin after layer 0 where there is a reducer, got a decision at layer 0")
        if -1 in self.layers_ranking_ahead:
            raise ValueError(
                f"schedule must begin after layer 0 where the previous layer ranks, got a decision at layer 0 and "
                f"{self.rankings[0]!r}"
            )

    @classmethod
    def parse(cls, text: str, model: object = None) -> Policy:
        """Policy of a preset or a schedule in text form, or of a file.

        Args:
            text: a preset (`"llava-1.5-7b/reroute-fastv/192"`), a schedule (`"3:0.25,7:0.25"`, `"remove:3:0.25"`), or
                the path of a file that `save` wrote: a text that ends with `.json` or names a file.
            model: the model of the policy, if presets are to be named without their model: the name of a published
                model, a transformers model or its configuration.

        Raises:
            TypeError: the text is no string.
            ValueError: the text is none of them, the preset is for another number of layers, or the file holds no
                policy.
            OSError: the file cannot be read.

        >>> Policy.parse("remove:3:0.25,7:0.1").schedule[1]
        Stage(layer=7, keep=0.1)
        >>> print(Policy.parse("3:0.25,7:0.1"))
        3:0.25,7:0.1
        """
        from .notation import parse_policy

        return parse_policy(text, model)

    def to_dict(self) -> dict[str, object]:
        """The policy as plain values, as JSON has them; `from_dict` is the inverse.

        A ranking or reducer is a mapping with its `name` and its arguments. The budget that the schedule was solved for
        is there, too.

        Raises:
            TypeError: a ranking or reducer is none of `reroute_kernels.rankings` and `reroute_kernels.reducers`, or an
                argument is no plain value.
            ValueError: a number is infinite, or no float equals it.

        >>> Policy([Stage(3, 0.25)]).to_dict()["schedule"]
        [{'layer': 3, 'keep': 0.25}]
        """
        from .policy_file import policy_to_dict

        return policy_to_dict(self)

    @classmethod
    def from_dict(cls, given: Mapping[str, object]) -> Policy:
        """The policy of values as `to_dict` gives them. An argument that is left out has its default.

        Raises:
            TypeError: a value has the wrong type.
            ValueError: the version of the format is another one, a key is unknown or missing, or a value is not
                accepted.

        >>> print(Policy.from_dict({"version": 1, "schedule": [{"layer": 3, "keep": 0.25}], "action": "remove"}))
        remove:3:0.25
        """
        from .policy_file import policy_from_dict

        return policy_from_dict(given)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the policy to a file of JSON, as `to_dict` gives it.

        A file that is there already is replaced once the new one is whole.

        Args:
            path: of the file; a name that ends with `.json` is taken wherever a policy is named.

        Raises:
            TypeError, ValueError: as in `to_dict`, or `path` is no path; nothing is written.
            OSError: the file cannot be written; one that was there is as it was.
        """
        from .policy_file import save_policy

        save_policy(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Policy:
        """Read a policy from a file that `save` wrote.

        Raises:
            TypeError: `path` is no path.
            ValueError: the file holds no JSON, or no policy.
            OSError: the file cannot be read.
        """
        from .policy_file import load_policy

        return load_policy(path)

    def __str__(self) -> str:
        """The schedule as `parse` takes it, or Python if it would not say everything: other rankings, a reducer."""
        from .notation import is_plain, policy_text

        return policy_text(self) if is_plain(self) else repr(self)

    def __deepcopy__(self, memo) -> Policy:
        return self  # nothing in it changes, and a copy of a ranking may not equal it

    @property
    def rankings(self) -> tuple[RankingLike, ...]:
        """The ranking of each stage of the schedule: its own, or the policy's."""
        return tuple(self.ranking if stage.ranking is None else stage.ranking for stage in self.schedule)

    @property
    def layers_ranking_ahead(self) -> tuple[int, ...]:
        """The layers that rank for a decision in the next layer, where the ranking uses the previous one."""
        return tuple(
            stage.layer - 1
            for stage, ranking in zip(self.schedule, self.rankings, strict=True)
            if getattr(ranking, "layer", "this") == "previous"
        )

    @property
    def ranks_by_previous_layer(self) -> bool:
        """Whether the layer before some decision layer ranks for it."""
        return bool(self.layers_ranking_ahead)

    @property
    def stage_layers(self) -> tuple[int, ...]:
        """The first layer of each stage: 0 for the stage of a reducer, and the decision layers."""
        before = () if self.reducer is None else (0,)
        return before + tuple(stage.layer for stage in self.schedule)

    def selected_counts(self, visual_tokens: int, candidates: int | None = None) -> tuple[int, ...]:
        """How many tokens are selected at each stage: K = min(pool, max(1, trunc(N * keep))).

        Args:
            visual_tokens: N, the visual tokens of one sample's prompt.
            candidates: how many of them may be selected at the first decision (default: all).

        Returns:
            One K per stage. Under `remove` the pool of a stage is the tokens that the stage before it kept.
        """
        pool = visual_tokens if candidates is None else candidates
        counts = []
        for stage in self.schedule:
            counts.append(min(pool, max(1, math.trunc(visual_tokens * stage.keep))))
            if self.action == "remove":
                pool = counts[-1]
        return tuple(counts)

    def even_counts(self, selected: Sequence[int]) -> tuple[int, ...]:
        """How many of the K tokens of each stage are selected at even distances, whatever their scores.

        Args:
            selected: K of each stage, as `selected_counts` gives them.
        """
        mixed = [part_of(ranking, Mixed) for ranking in self.rankings]
        return tuple(0 if each is None else each.count(count) for each, count in zip(mixed, selected, strict=True))

    def proxy_counts(self, selected: Sequence[int], candidates: int) -> tuple[int, ...]:
        """How many of the K tokens of each stage run in place of deferred ones, under `align="proxy"`.

        Args:
            selected: K of each stage, as `selected_counts` gives them.
            candidates: how many tokens may be selected at each decision.

        >>> policy = Policy([Stage(3, 0.25), Stage(7, 0.25)], align="proxy")
        >>> policy.proxy_counts(policy.selected_counts(576), 576)
        (18, 0)
        """
        if self.align != "proxy":
            return (0,) * len(selected)
        even = self.even_counts(selected)
        counts = [
            min(count // PROXIES, candidates - count, count - even[stage]) for stage, count in enumerate(selected)
        ]
        return (*counts[:-1], *(0 for _ in counts[-1:]))

    def recycled_counts(self, selected: Sequence[int], candidates: int) -> tuple[tuple[int, int], ...]:
        """How many removed tokens each stage recycles, and how many of its K tokens are means of clusters of them.

        Args:
            selected: K of each stage, as `selected_counts` gives them.
            candidates: how many tokens may be selected at the first decision.

        >>> policy = Policy([Stage(3, 309.5 / 576)], action="remove", recycle=0.3)
        >>> policy.recycled_counts(policy.selected_counts(576), 576)  # 300 are selected by score, and 276 are not
        ((83, 9),)
        """
        counts = []
        for count, even in zip(selected, self.even_counts(selected), strict=True):
            counts.append(self._recycled(candidates - count, count - even - 1))
            candidates = count
        return tuple(counts)

    def _recycled(self, dropped: int, most: int) -> tuple[int, int]:
        """Tokens that are recycled and their clusters, at most so many, if `dropped` tokens are not in the stage."""
        if not self.recycle or dropped < 1 or most < 1:
            return 0, 0

        clusters = min(most, int(self.recycle * dropped / (TOKENS_PER_CLUSTER - self.recycle)))
        while clusters < most and recycled_tokens(dropped + clusters, self.recycle)[1] > clusters:
            clusters += 1
        return recycled_tokens(dropped + clusters, self.recycle)[0], clusters
