"""Rankings: the rules that score the candidates of a decision.

A ranking is any object with a method `rank(candidates)`, which gives scores (B, L) float32; the highest should run. One
that scores by attention returns `candidates.attention(...)` instead, which is computed in the same call as the
selection. The scores of tokens outside the pool are ignored.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, NamedTuple, Protocol, TypeAlias, TypeVar

from torch import Tensor

from .attention import Attention
from .checks import REDUCTIONS, expect_one_of
from .ref.rank import last_queries

LAYERS = ("this", "previous")
Kind = TypeVar("Kind")


class Norm(NamedTuple):
    """An RMSNorm that `ops.scatter_norm_tokens_` computes, with its arguments."""

    weight: Tensor
    eps: float
    one_plus: bool


Rotary: TypeAlias = tuple[Tensor, ...]
"""Per-token tensors of the rotary embedding, (B, L, ...)."""


class Projection(Protocol):
    """Queries and keys of the layer that ranks, for the tokens of a sequence."""

    def norm(self, hidden: Tensor) -> Norm | None:
        """The norm of its input that the layer begins with; None leaves it to the layer.

        Args:
            hidden: hidden states of the dtype and on the device of those that will be ranked, (B, M, d).
        """

    def attention(
        self,
        hidden: Tensor,
        rotary: Rotary | None,
        key_mask: Tensor | None,
        positions: Tensor | None,
        states: Tensor | None,
    ) -> Attention:
        """Attention that some tokens would pay to all.

        Args:
            hidden: (B, L, d), the input of the layer.
            rotary: per-token tensors of the rotary embedding, (B, L, ...). None: neither queries nor keys are rotated,
                and keys of earlier turns, which a cache holds rotated, do not count.
            key_mask: (B, L) bool, False at tokens that no query sees; None if there are none.
            positions: (B, Q) of the queries in the sequence, -1 for none; None for the last of each row.
            states: (B, L, d), the norm of `hidden`, if it was computed.
        """

    def keys(self, hidden: Tensor, rotary: Rotary, states: Tensor | None) -> Tensor:
        """(B, L, Hkv, D), the keys of all tokens, before a norm of keys."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Candidates:
    """Input of a ranking at one decision: the candidates, and the other tokens of the sequence.

    Under `reroute` these are all tokens of the prompt, or all that a reducer left; under `remove` those that ran. The
    tensors are to be read, not written to.
    """

    pool: Tensor
    """(B, L) bool, the visual tokens that may be selected."""
    text: Tensor
    """(B, L) bool, the tokens that run whatever their score."""
    valid: Tensor | None
    """(B, L) bool, False at tokens that the ranking token does not see, such as padding; None if it sees all."""
    last: Tensor | None
    """(B,) int64, position of the last token of each sample's prompt, before an answer; None if it is the last of the
    row."""
    keep: Tensor
    """(B,) int64, how many will be selected."""
    most_text: int
    """The text tokens of the sample that has most."""
    decision: int
    """The number of the decision, from 0."""
    _hidden: Tensor = field(repr=False)
    _lend: Callable[[], Tensor] = field(repr=False)
    _rotary: tuple[Tensor, ...] = field(repr=False)
    _projection: Projection = field(repr=False)
    _states: Tensor | None = field(default=None, repr=False)
    _raters: Callable[[], Tensor] | None = field(default=None, repr=False)

    @property
    def hidden(self) -> Tensor:
        """(B, L, d), the input of the layer that ranks. Whoever asks may keep it: later stages write to a copy."""
        return self._lend()

    @property
    def ordinals(self) -> Tensor:
        """(B, L) int64, running index of the candidates within each sample, from 0; meaningful at candidates only.

        It does not depend on padding or on other samples of the batch.
        """
        return self.pool.cumsum(dim=1) - 1

    @property
    def raters(self) -> Tensor:
        """(B, L) bool, the text tokens that are relevant to the visual tokens, found once for a prompt.

        Raises:
            NotImplementedError: the embeddings of the prompt are not known where a decision is made.
        """
        if self._raters is None:
            raise NotImplementedError(
                "ranking must not ask for text raters where the embeddings of the prompt are not known"
            )
        return self._raters()

    def attention(
        self, queries: int | str = 1, query_reduction: str = "mean", head_reduction: str = "mean", rotary: bool = True
    ) -> Attention:
        """Attention that some queries pay to each token in the layer that ranks.

        Args:
            queries: how many tokens at the end of each sample ask, or `"text"` for all text tokens, or `"raters"` for
                those of SparseVLM, see `TextRaters`. A token sees itself and the tokens before it. A mean over text
                counts that of the sample that has most.
            query_reduction, head_reduction: `"mean"` or `"max"`; queries are reduced first.
            rotary: False: attention without rotary position, to the tokens of this prompt alone: keys of earlier turns,
                which a cache holds rotated, do not count.

        Returns:
            `Attention`, to be returned as it is, or to be asked for its `scores()`.
        """
        length = self.pool.shape[1]
        positions: Tensor | None
        if isinstance(queries, str):
            expect_one_of(queries=(queries, ("text", "raters")))
            text = self.raters if queries == "raters" else self.text
            text = text if self.valid is None else text & self.valid
            positions = last_queries(self._hidden, text, min(self.most_text, length))
        elif queries == 1:
            positions = None if self.last is None else self.last[:, None]
        else:
            positions = last_queries(self._hidden, self.valid, min(queries, length))
        tables = self._rotary if rotary else None
        attention = self._projection.attention(self._hidden, tables, self.valid, positions, self._states)
        return attention._replace(query_reduction=query_reduction, head_reduction=head_reduction)

    def keys(self) -> Tensor:
        """(B, L, Hkv, D), the keys of all tokens in the layer that ranks, as projected, before a norm of keys."""
        return self._projection.keys(self._hidden, self._rotary, self._states)


class RankingLike(Protocol):
    """Anything that ranks: `Policy.ranking` needs no base class."""

    def rank(self, candidates: Candidates) -> Tensor | Attention:
        """Scores (B, L) float32, or the result of `candidates.attention`."""


class Ranking(ABC):
    """Base of the rankings here. One's own needs no base, only `rank`; and `flops`, to be costed.

    Attributes:
        layer: `"this"`: ranks by the weights of the decision layer; `"previous"`: by those of the layer before it and
            by its input.
        projects: whether it asks for attention or keys at every decision. Then the norm before them is computed with
            the write-back of the last stage, in one launch, if it can be.
        nonnegative: whether its scores are 0 or more, so that `Remembered` may divide them by their sum.
    """

    layer = "this"
    projects = False
    nonnegative = False

    @abstractmethod
    def rank(self, candidates: Candidates) -> Tensor | Attention:
        """Scores (B, L) float32, or the result of `candidates.attention`."""

    @abstractmethod
    def flops(self, decoder, tokens: int, text_tokens: int) -> int:
        """Floating-point operations of one decision, multiplications and additions of matrix products.

        Args:
            decoder: a `reroute_kernels.cost.Decoder`.
            tokens: number of ranked tokens, text included.
            text_tokens: number of text tokens among them.
        """


class _ByAttention(Ranking):
    projects = True
    nonnegative = True
    query_reduction: str
    head_reduction: str
    rotary: bool

    def __post_init__(self):
        expect_one_of(
            layer=(self.layer, LAYERS),
            head_reduction=(self.head_reduction, REDUCTIONS),
            query_reduction=(self.query_reduction, REDUCTIONS),
        )
        if not isinstance(self.rotary, bool):
            raise TypeError(f"rotary must be a bool, got {self.rotary!r}")

    def _flops(self, decoder, tokens: int, queries: int) -> int:
        query_channels, key_channels = decoder.heads * decoder.head_dim, decoder.kv_heads * decoder.head_dim
        projections = 2 * decoder.hidden_size * (tokens * key_channels + queries * query_channels)
        return projections + 2 * queries * query_channels * tokens


@dataclass(frozen=True)
class LastQuery(_ByAttention):
    """Attention that the last tokens of the prompt pay to a candidate.

    With the defaults this is FastV (arXiv 2403.06764) and PyramidDrop (arXiv 2410.17247) as the Reroute paper's code
    runs them; one row of attention is computed, never more.

    Args:
        layer: whose weights and input rank: `"this"`, the decision layer, or `"previous"`, the layer before it, as
            FastV's own code does.
        queries: how many tokens at the end of the prompt ask.
        query_reduction, head_reduction: `"mean"` or `"max"`, over the queries first, then over the heads.
        rotary: False: without rotary position, so that a candidate is not preferred for standing close to the end, as
            FEATHER ranks (arXiv 2412.13180). Then keys of earlier turns, which a cache holds rotated, do not count.

    Raises:
        TypeError: `queries` is not an integer, or `rotary` no bool.
        ValueError: an argument is not accepted.

    >>> from reroute_kernels import Policy, Stage
    >>> Policy([Stage(3, 0.25)], ranking=LastQuery(queries=3, head_reduction="max")).ranking.queries
    3
    """

    layer: str = "this"
    queries: int = 1
    query_reduction: str = "mean"
    head_reduction: str = "mean"
    rotary: bool = True

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.queries, int) or isinstance(self.queries, bool):
            raise TypeError(f"queries must be an integer, got {self.queries!r}")
        if self.queries < 1:
            raise ValueError(f"queries must be 1 or more, got {self.queries}")

    def rank(self, candidates: Candidates) -> Attention:
        return candidates.attention(self.queries, self.query_reduction, self.head_reduction, self.rotary)

    def flops(self, decoder, tokens: int, text_tokens: int) -> int:
        return self._flops(decoder, tokens, min(self.queries, tokens))


@dataclass(frozen=True)
class AllText(_ByAttention):
    """Attention that all text tokens of the prompt pay to a candidate; text before an image does not see it.

    Args:
        layer, query_reduction, head_reduction, rotary: as in `LastQuery`.

    Raises:
        TypeError: `rotary` is no bool.
        ValueError: an argument is not accepted.
    """

    layer: str = "this"
    query_reduction: str = "mean"
    head_reduction: str = "mean"
    rotary: bool = True

    def rank(self, candidates: Candidates) -> Attention:
        return candidates.attention("text", self.query_reduction, self.head_reduction, self.rotary)

    def flops(self, decoder, tokens: int, text_tokens: int) -> int:
        return self._flops(decoder, tokens, text_tokens)


@dataclass(frozen=True)
class TextRaters(_ByAttention):
    """Attention that the raters of SparseVLM (arXiv 2410.04417) pay to a candidate.

    Raters are text tokens behind the image whose embeddings resemble those of the visual tokens: each visual token's
    relevance is spread over the text by a softmax of products, and those with at least the mean rate. They are found
    once for a prompt, before any layer runs. A score is the sum over the raters, divided by the number of text tokens
    of the sample that has most.

    Args:
        layer, query_reduction, head_reduction, rotary: as in `LastQuery`. SparseVLM ranks by the layer before.

    Raises:
        TypeError: `rotary` is no bool.
        ValueError: an argument is not accepted.
    """

    layer: str = "previous"
    query_reduction: str = "mean"
    head_reduction: str = "mean"
    rotary: bool = True

    def rank(self, candidates: Candidates) -> Attention:
        return candidates.attention("raters", self.query_reduction, self.head_reduction, self.rotary)

    def flops(self, decoder, tokens: int, text_tokens: int) -> int:
        """As many as if all text rated. The search for raters is counted at every decision, though it is made once."""
        search = 2 * decoder.hidden_size * text_tokens * tokens
        return self._flops(decoder, tokens, text_tokens) + search


@dataclass(frozen=True)
class KeyNorm(Ranking):
    """Keys of small L2 norm first (mean over key heads), as they tend to draw attention (arXiv 2406.11430).

    If a layer normalizes its keys (Qwen3-VL and others), they are taken before, since all norms are alike after.

    Args:
        layer: as in `LastQuery`.

    Raises:
        ValueError: `layer` is not accepted.
    """

    layer: str = "this"
    projects = True

    def __post_init__(self):
        expect_one_of(layer=(self.layer, LAYERS))

    def rank(self, candidates: Candidates) -> Tensor:
        return -candidates.keys().float().norm(dim=-1).mean(dim=-1)

    def flops(self, decoder, tokens: int, text_tokens: int) -> int:
        return 2 * decoder.hidden_size * tokens * decoder.kv_heads * decoder.head_dim


@dataclass(frozen=True)
class Random(Ranking):
    """A baseline: chance. The same tokens for the same seed, on every device and in every batch.

    Args:
        seed: an integer; each decision draws anew from it.

    Raises:
        TypeError: `seed` is not an integer.
    """

    seed: int = 0
    nonnegative = True

    def __post_init__(self):
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise TypeError(f"seed must be an integer, got {self.seed!r}")

    def rank(self, candidates: Candidates) -> Tensor:
        # The 32-bit finalizer of MurmurHash3: scores depend on a candidate's number alone, not on how many follow.
        drawn = candidates.ordinals + 1 + (2 * self.seed + 1) * 0x9E3779B9 + candidates.decision * 0x7F4A7C15
        drawn = drawn & 0xFFFFFFFF
        for factor, shift in ((0x85EBCA6B, 16), (0xC2B2AE35, 13)):
            drawn = ((drawn ^ (drawn >> shift)) * factor) & 0xFFFFFFFF
        drawn = drawn ^ (drawn >> 16)
        return (drawn >> 8).float()  # 24 bits are exact

    def flops(self, decoder, tokens: int, text_tokens: int) -> int:
        return 0


@dataclass(frozen=True)
class Uniform(Ranking):
    """A baseline: candidates at even distances, in the order of the prompt, whatever the image shows."""

    nonnegative = True

    def rank(self, candidates: Candidates) -> Tensor:
        return evenly(candidates.pool, candidates.keep).float()

    def flops(self, decoder, tokens: int, text_tokens: int) -> int:
        return 0


def evenly(pool: Tensor, keep: Tensor) -> Tensor:
    """Candidates at even distances: of n, number i is taken if i * K / n passes a whole number there.

    Args:
        pool: (B, L) bool, the candidates.
        keep: (B,) int64, K; at most n.

    Returns:
        (B, L) bool. It does not depend on padding or on other samples of the batch.
    """
    number, keep = pool.cumsum(dim=1), keep[:, None]
    count = number[:, -1:].clamp(min=1)
    return pool & (number * keep // count > (number - 1) * keep // count)


class _Around(Ranking):
    """A ranking that takes its scores from another one; `RoutedForward` knows what it adds to them."""

    ranking: RankingLike

    def __post_init__(self):
        if not callable(getattr(self.ranking, "rank", None)):
            raise TypeError(
                f"ranking must be an object such as those of reroute_kernels.rankings, with a method 'rank', got "
                f"{self.ranking!r}"
            )
        if part_of(self.ranking, type(self)) is not None:
            raise ValueError(f"ranking must hold no {type(self).__name__} itself, got {self.ranking!r}")

    @property
    def layer(self) -> str:  # type: ignore[override]
        return getattr(self.ranking, "layer", "this")

    @property
    def projects(self) -> bool:  # type: ignore[override]
        return getattr(self.ranking, "projects", False)

    @property
    def nonnegative(self) -> bool:  # type: ignore[override]
        return getattr(self.ranking, "nonnegative", False)

    def rank(self, candidates: Candidates) -> Tensor | Attention:
        return self.ranking.rank(candidates)

    def flops(self, decoder, tokens: int, text_tokens: int) -> int:
        flops = getattr(self.ranking, "flops", None)
        if not callable(flops):
            raise TypeError(f"ranking must have a method 'flops' to be costed, got {self.ranking!r}")
        return flops(decoder, tokens, text_tokens)


def part_of(ranking: Any, kind: type[Kind]) -> Kind | None:
    """The ranking, or the one within that it takes its scores from, that is of a type; None if none is."""
    while not isinstance(ranking, kind):
        if not isinstance(ranking, _Around):
            return None
        ranking = ranking.ranking
    return ranking


def innermost(ranking: Any) -> Any:
    """The ranking that scores, without those around it."""
    while isinstance(ranking, _Around):
        ranking = ranking.ranking
    return ranking


def _expect_share(name: str, value: object) -> None:
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not 0 <= float(value) <= 1:
        raise ValueError(f"{name} must be from 0 to 1, got {value!r}")


@dataclass(frozen=True)
class Mixed(_Around):
    """Some candidates at even distances, whatever their scores, and the best of the others.

    Of the K that a decision selects, `trunc(uniform * K)` stand at even distances over the candidates, as `Uniform`
    takes them; the others are selected by score. So each part of an image is seen, as in the first stage of FEATHER
    (arXiv 2412.13180).

    Args:
        ranking: gives the scores.
        uniform: the share of K, from 0 to 1.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: `uniform` is no share, or `ranking` mixes already.

    >>> Mixed(LastQuery(rotary=False), uniform=0.2).count(30)
    6
    """

    ranking: RankingLike
    uniform: float = 0.2

    def __post_init__(self):
        super().__post_init__()
        _expect_share("uniform", self.uniform)

    def count(self, keep: int) -> int:
        """How many of K are taken at even distances."""
        return int(self.uniform * keep)


@dataclass(frozen=True)
class Remembered(_Around):
    """Scores in which those of the decisions before live on, so that a later layer does not forget a find.

    At each decision the scores of the candidates are divided by their sum, and `decay` times what was remembered of
    each is added. The result ranks, and is remembered. If all scores are 0, or some are not finite, what was remembered
    ranks alone. Each routed prompt remembers for itself. Remembering takes no launch more.

    Args:
        ranking: gives the scores, of 0 or more: `LastQuery`, `AllText`, `TextRaters`, `Random`, `Uniform`, or a ranking
            of one's own with an attribute `nonnegative = True`. `Mixed` may be around this ranking or within it; both
            are the same, for it never changes scores.
        decay: from 0, which remembers nothing, to 1.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: `decay` is outside 0 ... 1, or `ranking` remembers already, or may give negative scores.

    >>> from reroute_kernels import Policy, Stage
    >>> Policy([Stage(3, 0.25), Stage(7, 0.25)], ranking=Remembered(LastQuery(), decay=0.5)).ranking.decay
    0.5
    """

    ranking: RankingLike
    decay: float = 0.3

    def __post_init__(self):
        super().__post_init__()
        _expect_share("decay", self.decay)
        if not self.nonnegative:
            raise ValueError(
                "ranking must give scores of 0 or more, as LastQuery, AllText, TextRaters, Random and Uniform do, or "
                f"one's own with nonnegative = True, got {self.ranking!r}"
            )
