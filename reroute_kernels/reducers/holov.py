"""HoloV: salient and distinct tokens from every part of an image."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..precision import full_precision
from .base import ShareReducer, VisionFeatures, best_tokens, check_count, check_numbers, with_features


def holov_tokens(features: Tensor, saliency: Tensor, *, keep: int, chunks: int = 16, variation: float = 0.09) -> Tensor:
    """Tokens that HoloV (arXiv 2510.02912) leaves of an image.

    The N tokens are cut, in their order, into chunks of N / chunks tokens, as nearly as can be. A token scores its
    saliency, plus the variance of its cosines to the others of its chunk, scaled to `variation` of the mean saliency.
    Each chunk keeps a share of the tokens by its mean score; what is left over by rounding, or finds no room, goes to
    the chunks with the largest means.

    Args:
        features: (T, N, d).
        saliency: (T, N) float32.
        keep: tokens that stay, 1 to N.
        chunks: parts of an image.
        variation: weight of the variances.

    Returns:
        (T, keep) int64, ascending.
    """
    tokens = features.shape[1]
    chunks = min(chunks, tokens)
    number = torch.arange(tokens, device=features.device) * chunks // tokens
    together = number[:, None] == torch.arange(chunks, device=features.device)  # [N, P]
    size = together.sum(dim=0)

    variance = _variance_in_chunks(normalize(features.float(), dim=-1), number, chunks)
    salient = saliency.float()
    scale = salient.abs().mean(dim=1, keepdim=True) / variance.mean(dim=1, keepdim=True).clamp(min=1e-12)
    scores = salient + variation * variance * scale
    with full_precision(features.device):
        means = scores @ together.float() / size
    quota = (keep * means / means.sum(dim=1, keepdim=True)).nan_to_num().long().clamp(min=0).minimum(size)

    order = means.argsort(dim=1, descending=True, stable=True)
    room = (size - quota).gather(1, order)
    left = keep - quota.sum(dim=1, keepdim=True)
    more = (left - (room.cumsum(dim=1) - room)).clamp(min=0).minimum(room)
    quota = quota + torch.zeros_like(quota).scatter(1, order, more)

    ranked = scores.argsort(dim=1, descending=True, stable=True)
    by_chunk = number[ranked].argsort(dim=1, stable=True)
    place = torch.arange(tokens, device=features.device) - (size.cumsum(dim=0) - size)[number]
    chosen = torch.zeros_like(saliency, dtype=torch.bool)
    chosen = chosen.scatter(1, ranked.gather(1, by_chunk), place < quota[:, number])
    return best_tokens(scores, keep, pool=chosen)


def _variance_in_chunks(unit: Tensor, number: Tensor, chunks: int) -> Tensor:
    """(T, N): the variance of the cosines of each token to the other tokens of its chunk; 0 if it is alone."""
    tokens = unit.shape[1]
    widest = -(-tokens // chunks)
    first = torch.searchsorted(number, torch.arange(chunks, device=number.device))
    columns = first[:, None] + torch.arange(widest, device=number.device)  # [P, S]
    inside = (columns < tokens) & (number[columns.clamp(max=tokens - 1)] == number[first][:, None])
    columns = columns.clamp(max=tokens - 1)
    part = unit[:, columns]  # [T, P, S, d]
    with full_precision(unit.device):
        cosines = part @ part.transpose(-1, -2)
    own = torch.eye(widest, dtype=torch.bool, device=unit.device)
    counted = inside[:, :, None] & inside[:, None] & ~own
    count = counted.sum(dim=-1)
    mean = cosines.masked_fill(~counted, 0).sum(dim=-1) / count.clamp(min=1)
    apart = (cosines - mean[..., None]).masked_fill(~counted, 0)
    variance = apart.square().sum(dim=-1) / (count - 1).clamp(min=1)  # unbiased
    return variance[:, inside]


@dataclass(frozen=True)
class HoloV(ShareReducer):
    """HoloV (arXiv 2510.02912), see `holov_tokens`.

    Args:
        keep: share of the tokens that stay, in (0, 1]; their number is rounded up.
        chunks: parts of an image.
        variation: weight of the variances.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range.

    >>> HoloV(keep=64 / 576).survivors(576)
    64
    """

    chunks: int = 16
    variation: float = 0.09

    def __post_init__(self):
        super().__post_init__()
        check_count("chunks", self.chunks)
        check_numbers(self, "variation")
        if not self.variation >= 0:
            raise ValueError(f"variation must be 0 or more, got {self.variation}")

    def reduce(self, image: VisionFeatures) -> tuple[Tensor, Tensor]:
        count = self.survivors(image.features.shape[1])
        index = holov_tokens(image.features, image.saliency, keep=count, chunks=self.chunks, variation=self.variation)
        return with_features(image.features, index)
