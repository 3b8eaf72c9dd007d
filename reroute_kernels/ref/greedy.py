"""Parts of the greedy selections: unit vectors, picks one after the other, and the list of what was picked."""

from __future__ import annotations

import torch
from torch import Tensor

from ..precision import full_precision
from .select import listed, order_of


def unit_vectors(features: Tensor) -> tuple[Tensor, Tensor]:
    """Directions of tokens, and which of them have a finite norm.

    Args:
        features: (T, N, d).

    Returns:
        (T, N, d) float32, zeros for a token of norm 0 or of none that is finite; and (T, N) bool.
    """
    wide = features.float()
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    is_finite = norm.isfinite()
    unit = (wide / norm).masked_fill_(~is_finite | (norm == 0), 0.0)
    return unit, is_finite.squeeze(2)


def existing(features: Tensor, lengths: Tensor | None) -> Tensor:
    """(T, N) bool, the tokens that count."""
    rows, total = features.shape[:2]
    if lengths is None:
        return torch.ones(rows, total, dtype=torch.bool, device=features.device)
    return torch.arange(total, device=features.device) < lengths[:, None]


def similarities(unit: Tensor, picked: Tensor) -> Tensor:
    """(T, N) float32, cosines of every token and the picked one of its row, (T, 1)."""
    rows = unit.gather(1, picked[:, :, None].expand(-1, -1, unit.shape[2]))
    with full_precision(unit.device):
        return (unit @ rows.transpose(1, 2)).squeeze(2)


class Picks:
    """Tokens that are picked one after the other, in every row.

    Args:
        exists: (T, N) bool, the tokens that may be picked.
    """

    def __init__(self, exists: Tensor):
        self._exists = exists
        self._free = exists.clone()
        self._places = torch.arange(exists.shape[1], device=exists.device)

    def pick(self, scores: Tensor) -> Tensor:
        """(T, 1) int64, the token of the largest score among those not picked so far; any, if there is none.

        Ties go to the smaller place, and a NaN ranks below every number.
        """
        picked = order_of(scores, self._free).argmax(dim=1, keepdim=True)
        self._free &= self._places != picked
        return picked

    def ascending(self, count: int) -> Tensor:
        """(T, count) int64, places of the picked tokens of each row, then -1."""
        return listed(self._exists & ~self._free, count)
