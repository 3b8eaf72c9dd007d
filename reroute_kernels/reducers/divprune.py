"""DivPrune: the tokens that lie farthest from each other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import ShareReducer, VisionFeatures, with_features


@dataclass(frozen=True)
class DivPrune(ShareReducer):
    """DivPrune (arXiv 2503.02175): the tokens whose least distance to each other is large, found one after the other.

    Distance is 1 - cosine of `VisionFeatures.projected`. Neither attention nor text is looked at. Tokens of all tiles
    of an image, and of all frames of a video, are compared with each other.

    Args:
        keep: share of the tokens that stay, in (0, 1]; their number is rounded up.

    Raises:
        TypeError, ValueError: `keep` is no such number.

    >>> DivPrune(keep=64 / 576).survivors(576)
    64
    """

    def reduce(self, image: VisionFeatures) -> tuple[Tensor, Tensor]:
        from .. import ops  # a policy that names a reducer needs no kernels

        features, projected = image.features, image.projected
        tokens = features.shape[1]
        if max(image.tiles) == 1:
            return with_features(features, ops.select_diverse(projected, keep=self.survivors(tokens)))
        first = [sum(image.tiles[:number]) for number in range(len(image.tiles))]
        found = []
        for size in set(image.tiles):
            starts = [start for start, tiles in zip(first, image.tiles, strict=True) if tiles == size]
            together = torch.stack([projected[start : start + size].flatten(0, 1) for start in starts])
            chosen = ops.select_diverse(together, keep=self.survivors(size * tokens))
            found += [start * tokens + each for start, each in zip(starts, chosen, strict=True)]
        index = torch.cat(found).sort().values
        return index, features.flatten(0, 1)[index]
