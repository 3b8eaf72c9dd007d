"""Pick tokens one after the other, each as far from those before as can be."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_diverse
from ..precision import full_precision
from .greedy import Picks, existing, similarities, unit_vectors

COLUMNS = 256
"""Tokens that are compared with all others at a time before the first pick."""


def select_diverse(
    features: Tensor, weights: Tensor | None = None, *, keep: int, lengths: Tensor | None = None
) -> Tensor:
    """See `reroute_kernels.ops.select_diverse`."""
    check_diverse(features, weights, keep, lengths)
    unit, is_usable = unit_vectors(features)
    if weights is None:
        weights = torch.ones_like(is_usable, dtype=torch.float32)
    exists = existing(features, lengths)
    is_usable &= exists & weights.isfinite()
    picks = Picks(exists)
    steps = min(keep, features.shape[1])
    least = torch.full_like(weights, torch.inf).masked_fill_(~is_usable, torch.nan)
    scores = _apart(unit, weights, is_usable) if steps else least
    for _ in range(steps):
        picked = picks.pick(scores.masked_fill(~is_usable, torch.nan))
        entries = _entries(similarities(unit, picked), weights)
        scores = least = torch.where(entries < least, entries, least)
    return picks.ascending(keep)


def _entries(similarity: Tensor, weights: Tensor) -> Tensor:
    """Weighted distances; rounding makes none negative."""
    return (1.0 - similarity).clamp_(min=0.0) * weights


def _apart(unit: Tensor, weights: Tensor, is_usable: Tensor) -> Tensor:
    """(T, N) float32, for each token the second smallest weighted distance of all to it, 0 from itself."""
    smallest = min(2, unit.shape[1])
    parts = []
    for begin in range(0, unit.shape[1], COLUMNS):
        columns = slice(begin, begin + COLUMNS)
        with full_precision(unit.device):
            similarity = unit[:, columns] @ unit.transpose(1, 2)  # [T, columns, N]
        entries = _entries(similarity, weights[:, columns, None])
        entries.diagonal(begin, 1, 2).zero_()
        entries.masked_fill_(~is_usable[:, None], torch.inf)
        parts.append(entries.topk(smallest, dim=2, largest=False).values[:, :, -1])
    return torch.cat(parts, dim=1)
