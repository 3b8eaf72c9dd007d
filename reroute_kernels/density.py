"""Peaks of density among tokens, as DPC-kNN finds them: centres of clusters in FlashVID and SparseVLM."""

from __future__ import annotations

import math

import torch
from torch import Tensor

SIMILARITIES = 2**26
"""Similarities or distances of pairs of tokens that are in memory at a time, or those of one row."""


def density_peaks(
    apart: Tensor, stay: Tensor, peaks: Tensor, neighbours: Tensor, most: int, break_ties: bool
) -> tuple[Tensor, Tensor]:
    """Tokens in dense places that are far from denser ones, and the nearest of them to each token.

    The density of a token is exp(-m), m the mean square of the distances to its nearest neighbours, itself included. A
    token's score is its density times the distance to the nearest denser token; of the densest it is the largest
    distance of the row. Of equal scores the first one counts. Compared are logarithms, which do not underflow.

    Args:
        apart: (T, N, N) float32, distances.
        stay: (T, N) bool, the tokens that count.
        peaks: (T,) int64, how many peaks are looked for in each row.
        neighbours: (T,) int64, how many neighbours the density is estimated from, at least 1.
        most: at least the largest of these.
        break_ties: whether the first of equally dense tokens is the denser one; two that are nearest to each other are
            equally dense where there are two neighbours. Else neither is.

    Returns:
        (T, N) bool, the peaks, and (T, N) int64, the place of the peak nearest to each token; of peaks, and of tokens
        that do not count, their own.
    """
    tokens = stay.shape[1]
    own = torch.arange(tokens, device=stay.device)
    both = stay[:, :, None] & stay[:, None]
    largest = apart.masked_fill(~both, 0).amax(dim=(1, 2))
    apart = apart.masked_fill(~both, math.inf)

    nearest = apart.topk(min(most, tokens), dim=-1, largest=False).values.square()
    is_counted = own[: nearest.shape[-1]] < neighbours[:, None]
    density = -nearest.masked_fill(~is_counted[:, None], 0).sum(dim=-1) / neighbours[:, None]
    is_denser = density[:, None] > density[:, :, None]
    if break_ties:
        is_denser |= (density[:, None] == density[:, :, None]) & (own < own[:, None])
    to_denser = torch.where(is_denser & both, apart, largest[:, None, None]).amin(dim=-1)
    score = (density + to_denser.log()).masked_fill(~stay, -math.inf)
    place = score.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    is_peak = (place < peaks[:, None]) & stay
    closest = apart.masked_fill(~is_peak[:, None], math.inf).argmin(dim=-1)
    return is_peak, torch.where(is_peak | ~stay, own, closest)
