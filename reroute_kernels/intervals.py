"""Means with bootstrap intervals."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_RESAMPLES = 1000


class Interval(NamedTuple):
    """A mean with the interval that holds 95% of the means of bootstrap samples."""

    mean: float
    low: float
    high: float


def bootstrap_intervals(values: Tensor, seed: int) -> list[Interval]:
    """For each row of (R, S) values the interval of its mean; all rows are drawn alike."""
    generator = torch.Generator().manual_seed(seed)
    count = values.shape[1]
    drawn = []
    for _ in range(_RESAMPLES):
        index = torch.randint(count, (count,), generator=generator, device="cpu")
        drawn.append(values[:, index].mean(dim=1))
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64, device="cpu")
    low, high = torch.stack(drawn).quantile(ends, dim=0)
    return list(map(Interval, values.mean(dim=1).tolist(), low.tolist(), high.tolist()))
