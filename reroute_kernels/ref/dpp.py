"""Pick tokens one after the other, so that together they span a large volume: a determinantal point process."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..checks import check_dpp
from .greedy import Lines, by_rows

SPANNED = 1e-5
"""Squared length outside the picked tokens' span, up to which a unit vector counts as inside."""
MOST_RELEVANT = 2
"""So many times the tokens to pick are looked at first, the most relevant ones."""
LARGEST = torch.finfo(torch.float32).max


def select_dpp(features: Tensor, relevance: Tensor, *, keep: int, lengths: Tensor | None = None) -> Tensor:
    """See `reroute_kernels.ops.select_dpp`."""
    check_dpp(features, relevance, keep, lengths)
    return by_rows(_pick, features, relevance, keep, lengths)


def _pick(lines: Lines, relevance: Tensor, count: int) -> list[int]:
    """The picked tokens of a row in their order.

    A score never grows. The picks among the most relevant tokens are those among all, if each of them scored above the
    relevance of all others: no cosine of the others is needed then.
    """
    squares = (relevance * relevance).clamp_(max=LARGEST)
    if MOST_RELEVANT * count < len(lines):
        values, order = squares.topk(MOST_RELEVANT * count + 1)
        some = order[:-1].sort().values
        picked = _pick_above(values[-1].item(), lines.among(some), squares[some], count)
        if picked is not None:
            return some[picked].tolist()
    return _pick_above(-math.inf, lines, squares, count) or []


def _pick_above(limit: float, lines: Lines, squares: Tensor, count: int) -> list[int] | None:
    """The picked tokens of a row in their order; None if one would not score above the limit."""
    picked: list[int] = []
    outside = torch.ones_like(squares)  # squared length of each unit vector outside the picked ones' span
    along = squares.new_zeros(count, len(squares))  # its parts along the directions that they added
    taken = torch.zeros_like(squares)  # minus infinity for the picked ones
    scores = squares
    while len(picked) < count:
        step, token = len(picked), int(scores.argmax())
        if limit > -math.inf and scores[token] <= limit:
            return None
        picked.append(token)
        added = outside[token].item()
        if added > 0 and step + 1 < count:
            line, before = lines.of(token, scores, count - step), along[:step]
            part = torch.addmv(line, before.T, before[:, token], alpha=-1, out=along[step]).mul_(added**-0.5)
            torch.threshold_(outside.addcmul_(part, part, value=-1), SPANNED, 0.0)
        taken[token] = -torch.inf
        scores = torch.addcmul(taken, squares, outside)
    return picked
