"""VisPruner: salient tokens, and diverse ones of the others."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..precision import full_precision
from .base import ShareReducer, VisionFeatures, best_tokens, check_numbers, other_tokens, with_features

AT_ONCE = 8
"""Tokens that are dropped in a round."""


def vispruner_tokens(features: Tensor, saliency: Tensor, *, salient: int, diverse: int) -> Tensor:
    """Tokens that VisPruner (arXiv 2412.01818) leaves of an image.

    The most salient tokens stay. The others are thinned out in rounds: by descending saliency they are numbered from 0,
    and of those with an even number the 8 that are most like some token with an odd number are dropped, by cosine.

    Args:
        features: (T, N, d).
        saliency: (T, N) float32.
        salient, diverse: tokens that stay for their saliency and of the others; 1 to N together.

    Returns:
        (T, salient + diverse) int64, ascending.
    """
    tokens = features.shape[1]
    first = best_tokens(saliency, salient)
    rest = other_tokens(first, tokens)
    order = saliency.gather(1, rest).argsort(dim=1, descending=True, stable=True)
    rest, unit = rest.gather(1, order), normalize(features.float(), dim=-1)
    cosines = None
    if rest.shape[1] <= features.shape[2]:  # no more memory than the features take
        own = with_features(unit, rest)[1]
        with full_precision(unit.device):
            cosines = own @ own.transpose(1, 2)
    left = torch.arange(rest.shape[1], device=rest.device).expand_as(rest)
    while diverse and left.shape[1] > diverse:
        left = _thinned(left, rest, unit, cosines, min(AT_ONCE, left.shape[1] - diverse))
    rest = rest.gather(1, left)
    index = torch.cat([first, rest], dim=1) if diverse else first
    return index.sort(dim=1).values


def _thinned(left: Tensor, rest: Tensor, unit: Tensor, cosines: Tensor | None, count: int) -> Tensor:
    """The places (T, L) in `rest` less `count` of those with even numbers, or all of these; in the same order.

    Args:
        left: (T, L) int64.
        rest: (T, R) int64, tokens by descending saliency.
        unit: (T, N, d), the tokens' directions.
        cosines: (T, R, R), of `rest`; None where that is too much to keep.
        count: how many are dropped.
    """
    count = min(count, left[:, ::2].shape[1])
    gone = 2 * best_tokens(_likeness(left, rest, unit, cosines), count)
    stay = torch.ones_like(left, dtype=torch.bool).scatter(1, gone, False)
    # Those that stay come first, in their order.
    return left.gather(1, stay.byte().argsort(dim=1, descending=True, stable=True)[:, : left.shape[1] - count])


def _likeness(left: Tensor, rest: Tensor, unit: Tensor, cosines: Tensor | None) -> Tensor:
    """(T, E): the largest cosine of each token with an even number to one with an odd number."""
    even, odd = left[:, ::2], left[:, 1::2]
    if cosines is not None:
        rows = cosines.gather(1, even[:, :, None].expand(-1, -1, cosines.shape[2]))
        return rows.gather(2, odd[:, None].expand(-1, even.shape[1], -1)).amax(dim=-1)
    ones, others = (with_features(unit, rest.gather(1, each))[1] for each in (even, odd))
    with full_precision(unit.device):
        return (ones @ others.transpose(1, 2)).amax(dim=-1)


@dataclass(frozen=True)
class VisPruner(ShareReducer):
    """VisPruner (arXiv 2412.01818), see `vispruner_tokens`.

    Args:
        keep: share of the tokens that stay, in (0, 1]; their number is rounded up.
        salient: share of these that stay for their saliency, in [0, 1]; their number is rounded down.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range.

    >>> VisPruner(keep=64 / 576).survivors(576)
    64
    """

    salient: float = 0.5

    def __post_init__(self):
        super().__post_init__()
        check_numbers(self, "salient")
        if not 0 <= self.salient <= 1:
            raise ValueError(f"salient must be in [0, 1], got {self.salient}")

    def reduce(self, image: VisionFeatures) -> tuple[Tensor, Tensor]:
        count = self.survivors(image.features.shape[1])
        salient = int(count * self.salient + 1e-9)
        index = vispruner_tokens(image.features, image.saliency, salient=salient, diverse=count - salient)
        return with_features(image.features, index)
