"""Pick tokens one after the other, so that together they span a large volume: a determinantal point process."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_dpp
from .greedy import Lines, by_rows

SPANNED = 1e-5
"""Squared length outside the picked tokens' span, up to which a unit vector counts as inside."""
LARGEST = torch.finfo(torch.float32).max


def select_dpp(features: Tensor, relevance: Tensor, *, keep: int, lengths: Tensor | None = None) -> Tensor:
    """See `reroute_kernels.ops.select_dpp`."""
    check_dpp(features, relevance, keep, lengths)
    return by_rows(_pick, features, relevance, keep, lengths)


def _pick(lines: Lines, relevance: Tensor, count: int) -> list[int]:
    """The picked tokens of a row in their order."""
    picked: list[int] = []
    squares = (relevance * relevance).clamp_(max=LARGEST)
    outside = torch.ones_like(relevance)  # squared length of each unit vector outside the picked ones' span
    along = relevance.new_zeros(count, len(relevance))  # its parts along the directions that they added
    taken = torch.zeros_like(relevance)  # minus infinity for the picked ones
    scores = squares
    while len(picked) < count:
        step, token = len(picked), int(scores.argmax())
        picked.append(token)
        added = outside[token].item()
        if added > 0 and step + 1 < count:
            line = lines.of(token, scores, count - step)
            part = torch.addmv(line, along[:step].T, along[:step, token], alpha=-1).mul_(added**-0.5)
            along[step] = part
            torch.threshold_(outside.addcmul_(part, part, value=-1), SPANNED, 0.0)
        taken[token] = -torch.inf
        scores = torch.addcmul(taken, squares, outside)
    return picked
