"""CDPruner: tokens that are relevant to the text and unlike each other."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import normalize

from ..precision import full_precision
from .base import ShareReducer, VisionFeatures, with_features


def cdpruner_relevance(features: Tensor, text: Tensor) -> Tensor:
    """Relevance of tokens to a text: their mean cosine to it, negated, from 0 to 1 in each image.

    Args:
        features: (T, N, d'), in the space of the text's embeddings: CLIP's, or that of the language model's input.
        text: (M, d'), embeddings of the text.

    Returns:
        (T, N) float32; 1 everywhere in an image whose tokens are equally relevant.
    """
    with full_precision(features.device):
        cosines = normalize(features.float(), dim=-1) @ normalize(text.float(), dim=-1).T
    negated = -cosines.mean(dim=-1)
    least, most = negated.aminmax(dim=1, keepdim=True)
    scaled = (negated - least) / (most - least)
    return scaled.masked_fill(most == least, 1)


def cdpruner_tokens(features: Tensor, relevance: Tensor, *, keep: int) -> Tensor:
    """Tokens that CDPruner (arXiv 2506.10967) leaves: greedy MAP of a determinantal point process.

    Args:
        features: (T, N, d), as the language model receives them; tokens are compared by cosine.
        relevance: (T, N) float32, see `cdpruner_relevance`.
        keep: tokens that stay, 1 to N.

    Returns:
        (T, keep) int64, ascending.
    """
    from .. import ops  # a policy that names a reducer needs no kernels

    return ops.select_dpp(features, relevance, keep=keep)


@dataclass(frozen=True)
class CDPruner(ShareReducer):
    """CDPruner (arXiv 2506.10967), see `cdpruner_tokens` and `cdpruner_relevance`.

    It needs `VisionFeatures.text`, which no model gives yet: a call with images is refused before the decoder runs.

    Args:
        keep: share of the tokens that stay, in (0, 1]; their number is rounded up.

    Raises:
        TypeError, ValueError: `keep` is no such number.

    >>> CDPruner(keep=64 / 576).survivors(576)
    64
    """

    def reduce(self, image: VisionFeatures) -> tuple[Tensor, Tensor]:
        relevance = cdpruner_relevance(image.projected, image.text)
        count = self.survivors(image.features.shape[1])
        return with_features(image.features, cdpruner_tokens(image.projected, relevance, keep=count))
