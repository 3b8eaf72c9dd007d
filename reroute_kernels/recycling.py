"""Recycling of SparseVLM (arXiv 2410.04417): means of the best removed tokens stay in the sequence.

There a merged token stands behind those that were selected; here it takes the row of its cluster's peak, so that
positions, masks and caches are those of tokens that stay.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import ops
from .density import SIMILARITIES, density_peaks
from .positions import flags_of


@torch.no_grad()
def recycle(
    hidden: Tensor,
    scores: Tensor,
    removed: Tensor,
    tokens: Tensor,
    clusters: Tensor,
    most_tokens: int,
    most_clusters: int,
) -> tuple[Tensor, Tensor]:
    """Cluster the best of the removed tokens around peaks of density.

    Args:
        hidden: (B, P, d).
        scores: (B, P) float32.
        removed: (B, P) bool.
        tokens: (B,) int64, how many of these are recycled; of equal scores the first ones.
        clusters: (B,) int64.
        most_tokens, most_clusters: the largest of these.

    Returns:
        (B, P) bool, the peaks; and (B, P) int64, the cluster of each token, numbered in the order of the peaks, -1 for
        tokens that are not recycled.
    """
    best = ops.select_tokens(scores, removed, torch.zeros_like(removed), tokens, most_tokens)
    (values,) = ops.gather_tokens(best, hidden.detach().float())
    stay = best >= 0
    is_peak, nearest = torch.empty_like(stay), torch.empty_like(best)
    step = max(1, SIMILARITIES // most_tokens**2)
    for start in range(0, len(best), step):
        part = slice(start, start + step)
        apart, peaks = _distances(values[part], stay[part]), clusters[part]
        neighbours = peaks.clamp(min=1)
        is_peak[part], nearest[part] = density_peaks(apart, stay[part], peaks, neighbours, most_clusters, True)
    numbers = is_peak.cumsum(dim=1) - 1
    of_rows = torch.where(stay, numbers.gather(1, nearest), -1)
    groups = ops.scatter_tokens_(torch.full_like(scores, -1, dtype=torch.int64), best, of_rows)
    return flags_of(torch.where(is_peak, best, -1), removed.shape[1]), groups


def _distances(values: Tensor, stay: Tensor) -> Tensor:
    """(T, N, N), distances of tokens (T, N, d) to one another, over the root of d.

    The mean of those that stay, (T, N), is taken off first. Distances are the same, but a channel in which all tokens
    are large does not drown the others where they are computed by a matrix product.
    """
    counts = stay.sum(dim=1).clamp(min=1)[:, None, None]
    values = values - values.masked_fill(~stay[:, :, None], 0).sum(dim=1, keepdim=True) / counts
    apart = torch.cdist(values, values) / math.sqrt(values.shape[-1])
    apart.diagonal(dim1=1, dim2=2).zero_()
    return apart
