"""Reducers: rules that leave only some of an image's visual tokens before the language model runs.

A reducer is any object with a method `reduce(image)`, which gives the tokens that stay, and their features. Dropped
tokens never enter the language model; the others are the pool of all decisions. `survivors` is needed to cost it.

Equally many tokens of each of T images are given as (T, K); frames of a video that keep different numbers of tokens as
one flat index over all T x N.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Real
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from .precision import full_precision


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


def nuwa_anchors(
    features: Tensor,
    similarity_features: Tensor,
    saliency: Tensor,
    *,
    grid: tuple[int, int],
    count: int,
    per_cell: int,
    distance: float,
    quantile: float,
    keeps_own: bool = True,
) -> tuple[Tensor, Tensor]:
    """Stage 1 of Nüwa (arXiv 2602.02951): spread anchors over the image and let them absorb near, similar tokens.

    Each cell of 2 x 2 tokens proposes its `per_cell` most salient ones, of which the `count` most salient become
    anchors. Those from the given quantile of the anchors' saliency on stay as they are. Each of the others takes up
    every token by its cosine similarity, if positive, times a weight that falls linearly with distance.

    Args:
        features: (T, N, d), from which the anchors are mixed.
        similarity_features: (T, N, d'), by which tokens are compared.
        saliency: (T, N) float32.
        grid: rows and columns, N of them. Cells at the border of an odd grid hold fewer tokens.
        count: anchors per image; if cells propose fewer, all proposals become anchors.
        per_cell: proposals of a cell, 1 to 4.
        distance: distance at which the weight becomes 0, in tokens.
        quantile: of the anchors' saliency, 0 to 1.
        keeps_own: whether an anchor counts fully (1.0) beside the normalized mix, or as one of it.

    Returns:
        (T, K) int64 anchors, ascending, and (T, K, d), their features in the dtype of `features`. Ties go to the
        smaller position.
    """
    from . import ops  # a policy that names a reducer needs no kernels

    height, width = grid
    count = min(count, _proposals(grid, per_cell))
    anchors = ops.select_tokens(
        saliency,
        pool=_proposed(saliency, grid, per_cell),
        pinned=torch.zeros_like(saliency, dtype=torch.bool),
        keep=count,
        length=count,
    )

    def of_anchors(tensor: Tensor) -> Tensor:
        return ops.gather_tokens(anchors, tensor)[0]

    own_saliency = of_anchors(saliency)
    stays = own_saliency >= torch.quantile(own_saliency, quantile, dim=1, keepdim=True)

    unit = normalize(similarity_features.float(), dim=-1)
    with full_precision(features.device):
        similarity = of_anchors(unit) @ unit.transpose(1, 2)
    rows, columns = (torch.arange(size, device=saliency.device).float() for size in grid)
    coordinates = torch.cartesian_prod(rows, columns).view(height * width, 2)
    apart = torch.linalg.vector_norm(coordinates[anchors][:, :, None] - coordinates, dim=-1)
    weights = similarity.relu() * (1 - apart / distance).clamp(min=0)
    is_own = anchors[:, :, None] == torch.arange(height * width, device=anchors.device)
    weights = weights.masked_fill(stays[:, :, None] & ~is_own, 0)
    weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-8)
    if keeps_own:
        weights = weights.masked_fill(is_own, 1)
    with full_precision(features.device):
        return anchors, (weights @ features.float()).to(features.dtype)


def _proposals(grid: tuple[int, int], per_cell: int) -> int:
    """How many tokens the cells of a grid propose."""
    sides = [[2] * (size // 2) + [1] * (size % 2) for size in grid]
    return sum(min(per_cell, height * width) for height in sides[0] for width in sides[1])


def _proposed(saliency: Tensor, grid: tuple[int, int], per_cell: int) -> Tensor:
    """(T, N) bool, the most salient tokens of each cell of 2 x 2."""
    height, width = grid
    odd = (0, width % 2, 0, height % 2)
    cells = pad(saliency.view(-1, height, width), odd, value=-math.inf)
    cells = cells.unflatten(1, (-1, 2)).unflatten(3, (-1, 2)).transpose(2, 3).flatten(3)  # [T, rows, columns, 4]
    other, own = cells[..., None, :], cells[..., :, None]
    order = torch.arange(4, device=saliency.device)
    ahead = (other > own) | ((other == own) & (order < order[:, None]))
    best = ahead.sum(dim=-1) < per_cell
    best = best.unflatten(3, (2, 2)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    return best[:, :height, :width].flatten(1)


@dataclass(frozen=True)
class Nuwa(Reducer):
    """Stage 1 of Nüwa (arXiv 2602.02951), see `nuwa_anchors`.

    Args:
        keep: share of an image's tokens that become anchors, in (0, 1]; their number is rounded up.
        per_cell: tokens that each cell of 2 x 2 proposes.
        distance: distance from which on an anchor absorbs nothing, as a share of the diagonal of the grid.
        quantile: anchors from this quantile of their saliency on stay as they are.
        keeps_own: whether an anchor counts fully beside the tokens that it absorbs.

    The defaults for `distance`, `quantile` and `keeps_own` are those for LLaVA-1.5.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range.

    >>> Nuwa(keep=1 / 3, per_cell=2).survivors(576)
    192
    """

    keep: float
    per_cell: int
    distance: float = math.sqrt(280 / 1058)
    quantile: float = 0.55
    keeps_own: bool = True

    def __post_init__(self):
        for name in ("keep", "distance", "quantile"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Real):
                raise TypeError(f"{name} must be a number, got {value!r}")
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep must be in (0, 1], got {self.keep}")
        if not self.distance > 0:
            raise ValueError(f"distance must be above 0, got {self.distance}")
        if not 0 <= self.quantile <= 1:
            raise ValueError(f"quantile must be in [0, 1], got {self.quantile}")
        if self.per_cell not in (1, 2, 3, 4) or not isinstance(self.per_cell, int) or isinstance(self.per_cell, bool):
            raise ValueError(f"per_cell must be 1, 2, 3 or 4, got {self.per_cell!r}")
        if not isinstance(self.keeps_own, bool):
            raise TypeError(f"keeps_own must be a bool, got {self.keeps_own!r}")

    def reduce(self, image: VisionFeatures) -> tuple[Tensor, Tensor]:
        even = [size + size % 2 for size in image.grid]
        return nuwa_anchors(
            image.features,
            image.similarity_features,
            image.saliency,
            grid=image.grid,
            count=self._anchors(image.features.shape[1]),
            per_cell=self.per_cell,
            distance=self.distance * math.hypot(*(size - 1 for size in even)),
            quantile=self.quantile,
            keeps_own=self.keeps_own,
        )

    def survivors(self, visual_tokens: int) -> int:
        """Number of anchors of an image; exact for grids of even sides."""
        return min(self._anchors(visual_tokens), math.ceil(visual_tokens * self.per_cell / 4))

    def _anchors(self, visual_tokens: int) -> int:
        return math.ceil(visual_tokens * self.keep - 1e-9)  # 576 * (112 / 576) may be a little above 112
