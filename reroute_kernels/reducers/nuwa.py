"""Nüwa: spread anchors that absorb near, similar tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from ..precision import full_precision
from .base import Reducer, VisionFeatures, check_bools, check_numbers, check_share, rounded_up


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
    from .. import ops  # a policy that names a reducer needs no kernels

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
        check_share(self, "keep")
        check_numbers(self, "distance", "quantile")
        if not self.distance > 0:
            raise ValueError(f"distance must be above 0, got {self.distance}")
        if not 0 <= self.quantile <= 1:
            raise ValueError(f"quantile must be in [0, 1], got {self.quantile}")
        if self.per_cell not in (1, 2, 3, 4) or not isinstance(self.per_cell, int) or isinstance(self.per_cell, bool):
            raise ValueError(f"per_cell must be 1, 2, 3 or 4, got {self.per_cell!r}")
        check_bools(self, "keeps_own")

    def reduce(self, image: VisionFeatures) -> tuple[Tensor, Tensor]:
        even = [size + size % 2 for size in image.grid]
        return nuwa_anchors(
            image.features,
            image.similarity_features,
            image.saliency,
            grid=image.grid,
            count=rounded_up(image.features.shape[1], self.keep),
            per_cell=self.per_cell,
            distance=self.distance * math.hypot(*(size - 1 for size in even)),
            quantile=self.quantile,
            keeps_own=self.keeps_own,
        )

    def survivors(self, visual_tokens: int) -> int:
        """Number of anchors of an image; exact for grids of even sides."""
        return min(rounded_up(visual_tokens, self.keep), math.ceil(visual_tokens * self.per_cell / 4))
