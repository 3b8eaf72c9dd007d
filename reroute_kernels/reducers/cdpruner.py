"""CDPruner: tokens that are relevant to the text and unlike each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..precision import full_precision
from .base import ShareReducer, VisionFeatures, with_features


def cdpruner_relevance(features: Tensor, text: Tensor | Sequence[Tensor]) -> Tensor:
    """Relevance of tokens to a text: their mean cosine to it, negated, from 0 to 1 in each image.

    Args:
        features: (T, N, d'), in the space of the text's embeddings: CLIP's, or that of the language model's input.
        text: (M, d'), embeddings of the text; or T of them, one for each image.

    Returns:
        (T, N) float32; 1 everywhere in an image whose tokens are equally relevant, or whose text is empty.
    """
    texts = [text] * len(features) if isinstance(text, Tensor) else text
    # The mean cosine to vectors is the product with the mean of their directions.
    means = {id(each): normalize(each.float(), dim=-1).sum(dim=0) / max(1, len(each)) for each in texts}
    directions = torch.stack([means[id(each)].to(features.device) for each in texts])
    with full_precision(features.device):
        negated = -(normalize(features.float(), dim=-1) @ directions[:, :, None])[:, :, 0]
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

    The text is that of the prompt in which the image stands: all of it, as the language model's input embeddings. The
    paper's is that of CLIP's text tower, which a language model's checkpoint does not hold.

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
