"""The interface of reducers: the images that they are handed, and the class that those of this library derive from."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Real
from typing import Protocol

import torch
from torch import Tensor

from ..checks import FLOATING, expect_tensor


@dataclass(eq=False)
class VisionFeatures:
    """Output of the vision tower for T images, tiles or frames of one size, in patch order.

    `saliency` and `similarity_features` are computed when they are asked for.
    """

    features: Tensor
    """(T, N, d), before the projector into the language model, or after the merger if the tower has one."""
    grid: tuple[int, int]
    """Rows and columns of the N tokens."""
    _saliency: Callable[[], Tensor] = field(repr=False)
    _similarity_features: Callable[[], Tensor] = field(repr=False)
    is_video: bool = False
    """Whether the T are the frames of one video, in order; else they are images or tiles."""
    _keys: Callable[[], Tensor] | None = field(default=None, repr=False)
    _projected: Callable[[], Tensor] | None = field(default=None, repr=False)
    _text: Callable[[], Sequence[Tensor]] | None = field(default=None, repr=False)
    _tiles: Callable[[], Sequence[int]] | None = field(default=None, repr=False)

    @cached_property
    def saliency(self) -> Tensor:
        """(T, N) float32, attention that each token receives in the vision tower.

        From the class token in the layer whose output becomes the features, summed over heads, if there is a class
        token; else from all tokens in the last layer, summed over them, averaged over heads and merged patches.
        """
        return self._saliency()

    @cached_property
    def similarity_features(self) -> Tensor:
        """(T, N, d'), the mean of hidden states over many layers, to tell which tokens show the same."""
        return self._similarity_features()

    @cached_property
    def keys(self) -> Tensor:
        """(T, N, d'), the keys of the layer whose attention is the saliency, before rotation.

        Averaged over heads and merged patches, or pooled as the features are.

        Raises:
            NotImplementedError: they are not given. All towers that reducers work on give them.
        """
        if self._keys is None:
            raise NotImplementedError("reducer must not compare keys on this vision tower, which gives none")
        return self._keys()

    @cached_property
    def projected(self) -> Tensor:
        """(T, N, d'), the features as the language model receives them, if none is dropped.

        `features` where no projector follows. Where one does, it runs once more, without gradients.
        """
        return self.features if self._projected is None else self._projected()

    @cached_property
    def tiles(self) -> tuple[int, ...]:
        """How many of the T, in order, belong to each image: all of a video; 1 each where it is not known."""
        if self.is_video:
            return (len(self.features),)
        return (1,) * len(self.features) if self._tiles is None else tuple(self._tiles())

    @cached_property
    def text(self) -> tuple[Tensor, ...]:
        """For each of the T images: (M, d'), embeddings of its prompt's text, in the space of `projected`.

        Those of the language model's input, of all text of the row in which the image stands. To be asked for while
        the image is reduced.

        Raises:
            NotImplementedError: they are not given, or the prompt is not known where the images are encoded.
        """
        if self._text is None:
            raise NotImplementedError(
                "reducer must not depend on text where images come without their prompt; "
                "reroute_kernels.reducers.cdpruner_tokens takes features and relevance as tensors"
            )
        return tuple(self._text())


class ReducerLike(Protocol):
    """Anything that reduces: `Policy.reducer` needs no base class."""

    def reduce(self, image: VisionFeatures) -> tuple[Tensor, Tensor]:
        """The tokens that stay, each once, and their features in the dtype of `image.features`.

        (T, K) int64 and (T, K, d); or, where images or frames keep different numbers of tokens, (M,) int64, ascending
        over T x N, and (M, d), with at least one token in all.
        """


class Reducer(ABC):
    """Base of the reducers here. One's own needs no base, only `reduce`; and `survivors`, to be costed."""

    @abstractmethod
    def reduce(self, image: VisionFeatures) -> tuple[Tensor, Tensor]:
        """Choose tokens, and make their features.

        Returns:
            (T, K) int64, the tokens that stay, each once, and (T, K, d), their features in the dtype of
            `image.features`; or (M,) int64, ascending over T x N, and (M, d).
        """

    @abstractmethod
    def survivors(self, visual_tokens: int) -> int:
        """K, the tokens that stay of an image of `visual_tokens`."""


@dataclass(frozen=True)
class ShareReducer(Reducer):
    """Base of reducers that leave a share of an image's tokens.

    Args:
        keep: share of the tokens that stay, in (0, 1]; their number is rounded up.
    """

    keep: float

    def __post_init__(self):
        check_share(self, "keep")

    def survivors(self, visual_tokens: int) -> int:
        """Number of tokens that stay of an image."""
        return rounded_up(visual_tokens, self.keep)


def with_features(features: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """An index (T, K) int64, and the features (T, K, d) of (T, N, d) that it names, as they are."""
    return index, features.gather(1, index[:, :, None].expand(-1, -1, features.shape[2]))


def best_tokens(scores: Tensor, keep: int, pool: Tensor | None = None) -> Tensor:
    """(T, keep) int64, ascending: the tokens of a pool with the highest scores (T, N); of all tokens without one."""
    from .. import ops  # a policy that names a reducer needs no kernels

    pool = torch.ones_like(scores, dtype=torch.bool) if pool is None else pool
    return ops.select_tokens(scores, pool=pool, pinned=torch.zeros_like(pool), keep=keep, length=keep)


def other_tokens(index: Tensor, tokens: int) -> Tensor:
    """(T, N - K) int64, ascending: the tokens of N that are not in an index (T, K)."""
    from ..positions import flags_of, positions_of

    return positions_of(~flags_of(index, tokens), tokens - index.shape[1])


def check_numbers(owner: object, *names: str) -> None:
    """Refuse attributes that are no numbers."""
    for name in names:
        value = getattr(owner, name)
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{name} must be a number, got {value!r}")


def check_bools(owner: object, *names: str) -> None:
    """Refuse attributes that are no booleans."""
    for name in names:
        if not isinstance(getattr(owner, name), bool):
            raise TypeError(f"{name} must be a bool, got {getattr(owner, name)!r}")


def check_share(owner: object, *names: str) -> None:
    """Refuse attributes that are no share of the tokens, in (0, 1]."""
    check_numbers(owner, *names)
    for name in names:
        if not 0 < getattr(owner, name) <= 1:
            raise ValueError(f"{name} must be in (0, 1], got {getattr(owner, name)}")


def check_count(name: str, value: object) -> None:
    """Refuse a value that is no integer of 1 or more."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be 1 or more, got {value}")


def rounded_up(tokens: int, share: float) -> int:
    """Smallest number that is at least this share of the tokens."""
    return math.ceil(tokens * share - 1e-9)  # 576 * (112 / 576) may be a little above 112


def check_clip(features: Tensor, saliency: Tensor) -> None:
    """Refuse tensors that are no features and saliencies of the tokens of T images or frames."""
    expect_tensor("features", features)
    expect_tensor("saliency", saliency)
    if features.ndim != 3 or features.dtype not in FLOATING or not features.numel():
        got = f"{tuple(features.shape)} {features.dtype}"
        raise ValueError(f"features must be (T, N, d) float32, float16 or bfloat16, none of them 0, got {got}")
    if saliency.shape != features.shape[:2] or saliency.device != features.device:
        got = f"{tuple(saliency.shape)} on {saliency.device}"
        raise ValueError(f"saliency must be {tuple(features.shape[:2])} on {features.device}, got {got}")
