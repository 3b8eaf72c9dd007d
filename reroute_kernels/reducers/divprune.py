"""DivPrune: the tokens that lie farthest from each other."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .base import ShareReducer, VisionFeatures, with_features


@dataclass(frozen=True)
class DivPrune(ShareReducer):
    """DivPrune (arXiv 2503.02175): the tokens whose least distance to each other is large, found one after the other.

    Distance is 1 - cosine of `VisionFeatures.projected`. Neither attention nor text is looked at.

    Args:
        keep: share of the tokens that stay, in (0, 1]; their number is rounded up.

    Raises:
        TypeError, ValueError: `keep` is no such number.

    >>> DivPrune(keep=64 / 576).survivors(576)
    64
    """

    def reduce(self, image: VisionFeatures) -> tuple[Tensor, Tensor]:
        from .. import ops  # a policy that names a reducer needs no kernels

        count = self.survivors(image.features.shape[1])
        return with_features(image.features, ops.select_diverse(image.projected, keep=count))
