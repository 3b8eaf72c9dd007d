"""VisionZip: the tokens that receive most attention, and merged ones for the others."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..precision import full_precision
from .base import ShareReducer, VisionFeatures, best_tokens, check_share, other_tokens, with_features


def visionzip_tokens(
    features: Tensor, saliency: Tensor, keys: Tensor, *, dominant: int, contextual: int
) -> tuple[Tensor, Tensor]:
    """Dominant and contextual tokens of VisionZip (arXiv 2412.04467).

    The most salient tokens are dominant, and stay as they are. Of the R others every `max(1, R // contextual)`-th is a
    target, in their order; each of those left joins the target whose key is most similar, by cosine. A contextual token
    is a target plus the mean of the tokens that joined it.

    Args:
        features: (T, N, d), from which tokens are merged.
        saliency: (T, N) float32.
        keys: (T, N, d'), by which tokens are compared.
        dominant: dominant tokens, 1 to N.
        contextual: contextual tokens; no more than there are others.

    Returns:
        (T, K) int64, ascending, a contextual token at the place of its target; and (T, K, d), in the dtype of
        `features`.
    """
    from .. import ops  # a policy that names a reducer needs no kernels

    tokens = features.shape[1]
    salient = best_tokens(saliency, dominant)
    count = min(contextual, tokens - dominant)
    if not count:
        return with_features(features, salient)
    rest = other_tokens(salient, tokens)
    step = max(1, rest.shape[1] // count)
    columns = torch.arange(rest.shape[1], device=rest.device)
    target = rest[:, : step * count : step]
    is_target = (columns % step == 0) & (columns < step * count)
    unit = normalize(with_features(keys, rest)[1].float(), dim=-1)
    with full_precision(unit.device):
        nearest = (unit @ unit[:, : step * count : step].transpose(1, 2)).argmax(dim=-1)
    joins = nearest.masked_fill(is_target, -1)
    means, _ = ops.merge_tokens(with_features(features, rest)[1].float(), joins, groups=count)
    merged = (with_features(features, target)[1].float() + means).to(features.dtype)
    index, order = torch.cat([salient, target], dim=1).sort(dim=1)
    made = torch.cat([with_features(features, salient)[1], merged], dim=1)
    return index, with_features(made, order)[1]


@dataclass(frozen=True)
class VisionZip(ShareReducer):
    """VisionZip (arXiv 2412.04467), see `visionzip_tokens`.

    Args:
        keep: share of the tokens that stay, in (0, 1]; their number is rounded up.
        contextual: share of these that are contextual, in (0, 1]; at least one is dominant.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range.

    >>> VisionZip(keep=64 / 576).survivors(576)
    64
    """

    contextual: float = 10 / 64

    def __post_init__(self):
        check_share(self, "keep", "contextual")

    def reduce(self, image: VisionFeatures) -> tuple[Tensor, Tensor]:
        count = self.survivors(image.features.shape[1])
        contextual = min(count - 1, int(count * self.contextual + 0.5))
        return visionzip_tokens(
            image.features, image.saliency, image.keys, dominant=count - contextual, contextual=contextual
        )
