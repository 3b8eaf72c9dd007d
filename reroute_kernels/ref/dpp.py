"""Pick tokens one after the other, so that together they span a large volume: a determinantal point process."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_dpp
from .greedy import Picks, existing, similarities, unit_vectors

SPANNED = 1e-5
"""Share of a squared length outside the picked tokens' span, up to which a token counts as inside."""


def select_dpp(features: Tensor, relevance: Tensor, *, keep: int, lengths: Tensor | None = None) -> Tensor:
    """See `reroute_kernels.ops.select_dpp`."""
    check_dpp(features, relevance, keep, lengths)
    unit, is_usable = unit_vectors(features)
    exists = existing(features, lengths)
    is_usable &= exists & relevance.isfinite()
    picks = Picks(exists)
    steps = min(keep, features.shape[1])
    squares = (relevance * relevance).masked_fill_(~is_usable, torch.nan)
    outside = torch.ones_like(relevance)  # squared length of each unit vector outside the picked ones' span
    along = relevance.new_empty(*relevance.shape, steps)  # its parts along the directions that they added
    for step in range(steps):
        picked = picks.pick(squares * outside)
        added = outside.gather(1, picked)
        before = along[:, :, :step]
        of_picked = before.gather(1, picked[:, :, None].expand(-1, -1, step))
        part = similarities(unit, picked) - (before @ of_picked.transpose(1, 2)).squeeze(2)
        part = torch.where(added > 0, part * added.rsqrt(), 0.0)
        along[:, :, step] = part
        outside = outside - part * part
        outside = torch.where(outside > SPANNED, outside, 0.0)
    return picks.ascending(keep)
