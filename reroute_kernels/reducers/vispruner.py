"""VisPruner: salient tokens, and diverse ones of the others."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..precision import full_precision
from .base import ShareReducer, VisionFeatures, best_tokens, check_numbers, flags, with_features

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
    rest = best_tokens(-saliency, tokens - salient, pool=~flags(first, tokens))
    order = saliency.gather(1, rest).argsort(dim=1, descending=True, stable=True)
    rest, unit = rest.gather(1, order), normalize(features.float(), dim=-1)
    while diverse and rest.shape[1] > diverse:
        rest = _thinned(rest, unit, min(AT_ONCE, rest.shape[1] - diverse))
    index = torch.cat([first, rest], dim=1) if diverse else first
    return index.sort(dim=1).values


def _thinned(rest: Tensor, unit: Tensor, count: int) -> Tensor:
    """The tokens (T, R) less `count` of those with even numbers, or all of these; in the same order."""
    even, odd = (with_features(unit, rest[:, first::2])[1] for first in (0, 1))
    count = min(count, even.shape[1])
    with full_precision(unit.device):
        likeness = (even @ odd.transpose(1, 2)).amax(dim=-1)
    gone = torch.zeros_like(rest, dtype=torch.bool)
    gone[:, ::2] = flags(best_tokens(likeness, count), even.shape[1])
    places = torch.arange(rest.shape[1], device=rest.device).float().neg().expand(len(rest), -1)
    return rest.gather(1, best_tokens(places, rest.shape[1] - count, pool=~gone))


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
