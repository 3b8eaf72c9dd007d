"""Pick tokens one after the other, each as far from those before as can be."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_diverse
from .greedy import Lines, by_rows

WORST = torch.finfo(torch.float32).min
AT_A_TIME = 32
"""Tokens whose nearest neighbours are looked for at a time."""


def select_diverse(
    features: Tensor, weights: Tensor | None = None, *, keep: int, lengths: Tensor | None = None
) -> Tensor:
    """See `reroute_kernels.ops.select_diverse`."""
    check_diverse(features, weights, keep, lengths)
    if weights is None:
        weights = torch.ones(features.shape[:2], dtype=torch.float32, device=features.device)
    return by_rows(_pick, features, weights, keep, lengths)


def _pick(lines: Lines, weights: Tensor, count: int) -> list[int]:
    """The picked tokens of a row in their order."""
    picked: list[int] = []
    least = torch.full_like(weights, torch.inf)
    cosines = lines.all() if len(lines) <= lines.tokens.shape[1] else None  # no more memory than the tokens take
    while len(picked) < count:
        if picked:
            token = int(least.argmax())
        else:
            token = _first(lines, weights) if cosines is None else _first_of_all(cosines, weights)
        picked.append(token)
        if len(picked) < count:
            line = lines.of(token, least, count - len(picked)) if cosines is None else cosines[token]
            entries = _entries(line, weights)
            least = torch.minimum(least, entries)
            least[token] = -torch.inf  # for good
    return picked


def _entries(cosines: Tensor, weights: Tensor) -> Tensor:
    """Weighted distances; rounding makes none negative."""
    return (1.0 - cosines).clamp_(min=0.0).mul_(weights).clamp_(min=WORST)


def _first_of_all(cosines: Tensor, weights: Tensor) -> int:
    """The token whose second smallest entry is the largest, from the cosines (N, N) of all tokens."""
    entries = _entries(cosines, weights[:, None])  # of the token in each row
    entries.fill_diagonal_(0.0)
    if len(entries) > 1:
        entries.scatter_(1, entries.argmin(dim=1, keepdim=True), torch.inf)
    return int(entries.amin(dim=1).argmax())


def _first(lines: Lines, weights: Tensor) -> int:
    """The token whose second smallest entry is the largest, of the entries for all tokens.

    The second smallest of some entries of a token is a bound for that of all. The tokens with the highest bounds are
    looked at, which lowers the bounds of others, until none is as high as the best that is known.
    """
    smallest, second = torch.zeros_like(weights), torch.full_like(weights, torch.inf)  # the former is its own entry
    known = torch.full_like(weights, -torch.inf)
    bounds = second.clone()
    while bounds.max() >= known.max() and bounds.max() > -torch.inf:
        numbers = bounds.topk(min(AT_A_TIME, len(lines))).indices
        numbers = numbers[bounds[numbers] > -torch.inf]
        cosines, own = lines.make(numbers), torch.arange(len(numbers), device=numbers.device)
        of_numbers = _entries(cosines, weights[numbers, None])
        of_numbers[own, numbers] = 0.0
        known[numbers] = of_numbers.topk(min(2, len(lines)), largest=False).values[:, -1]
        of_all = _entries(cosines, weights)
        of_all[own, numbers] = torch.inf
        least, at = of_all.min(dim=0)
        next_least = of_all.scatter_(0, at[None], torch.inf).amin(dim=0)
        second = torch.minimum(torch.maximum(smallest, least), torch.minimum(second, next_least))
        smallest = torch.minimum(smallest, least)
        bounds = second.masked_fill(known > -torch.inf, -torch.inf)
    return int(known.argmax())
