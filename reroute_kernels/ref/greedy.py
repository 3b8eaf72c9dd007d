"""Parts of the greedy selections: rows one by one, the tokens of each that count, and lines of their cosines."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..precision import full_precision

AHEAD = 64
"""Tokens whose lines of cosines are made at a time: those that are likely to be picked next."""
HELD = 128
"""Lines that are held."""
BLOCK = 96
"""Tokens that are multiplied at a time where all are compared."""


class Lines:
    """Cosines of single tokens of a row to all of them: memory grows with the tokens, not with their square.

    Args:
        tokens: (N, d) float32.
        norms: (N,) float32, their norms, all finite. A token of norm 0 has the cosine 0 to all.
    """

    def __init__(self, tokens: Tensor, norms: Tensor):
        self.tokens = tokens
        self._norms = norms
        self._inverse = torch.where(norms > 0, norms.reciprocal(), 0.0)
        self._held = tokens.new_empty(HELD, len(tokens))
        self._token_at = [-1] * HELD
        self._place_of: dict[int, int] = {}
        self._next = 0

    def __len__(self) -> int:
        return len(self.tokens)

    def among(self, numbers: Tensor) -> Lines:
        """Lines of some tokens to one another; numbers: (b,) int64."""
        return Lines(self.tokens.index_select(0, numbers), self._norms[numbers])

    def make(self, numbers: Tensor) -> Tensor:
        """(b, N) float32, the lines of b tokens, at most `AHEAD`; they are held until others need their place."""
        start = self._next if self._next + len(numbers) <= HELD else 0
        self._next = start + len(numbers)
        for place, number in enumerate(numbers.tolist(), start):
            if self._place_of.get(self._token_at[place]) == place:
                del self._place_of[self._token_at[place]]
            self._token_at[place], self._place_of[number] = number, place
        lines = self._held[start : self._next]
        with full_precision(self.tokens.device):
            torch.mm(self.tokens.index_select(0, numbers), self.tokens.T, out=lines)
        lines *= self._inverse[numbers, None]
        lines *= self._inverse
        return lines

    def all(self) -> Tensor:
        """(N, N) float32, the lines of all tokens; each pair is multiplied once."""
        count = len(self)
        lines = self.tokens.new_empty(count, count)
        with full_precision(self.tokens.device):
            for start in range(0, count, BLOCK):
                end = min(start + BLOCK, count)
                part = self.tokens[start:end] @ self.tokens[start:].T
                part *= self._inverse[start:end, None]
                part *= self._inverse[start:]
                lines[start:end, start:] = part
                lines[end:, start:end] = part[:, end - start :].T
        return lines

    def of(self, token: int, scores: Tensor, picks: int) -> Tensor:
        """(N,) float32, the line of a token; if it must be made, then with those of the next `picks` by score."""
        if token not in self._place_of:
            likely = scores.topk(min(AHEAD, picks, len(self))).indices.tolist()
            others = [other for other in likely if other != token and other not in self._place_of]
            self.make(torch.tensor([token, *others[: len(likely) - 1]], device=scores.device))
        return self._held[self._place_of[token]]


def by_rows(
    pick: Callable[[Lines, Tensor, int], list[int]],
    features: Tensor,
    values: Tensor,
    keep: int,
    lengths: Tensor | None,
) -> Tensor:
    """(T, keep) int64, the picked tokens of each row, ascending, then -1.

    Args:
        pick: gives, in the order of the picks, so many tokens of a row whose norms and values are finite. Other tokens
            come after them, by place.
        features: (T, N, d).
        values: (T, N) float32.
        keep: tokens to pick.
        lengths: (T,), or None.
    """
    features, values = features.detach(), values.detach()
    rows, total, _ = features.shape
    index = torch.full((rows, keep), -1, device=features.device)
    counts = [total] * rows if lengths is None else lengths.clamp(0, total).tolist()
    for row, count in enumerate(counts):
        tokens, value = features[row, :count].float(), values[row, :count]
        norms = torch.linalg.vector_norm(tokens, dim=1)
        is_usable = norms.isfinite() & value.isfinite()
        places = is_usable.nonzero().squeeze(1)
        if len(places) < count:
            tokens, value, norms = tokens[places], value[places], norms[places]
        picked = pick(Lines(tokens, norms), value, min(keep, len(places)))
        others = (~is_usable).nonzero().squeeze(1)[: min(keep, count) - len(picked)]
        chosen = torch.cat((places[picked], others)).sort().values
        index[row, : len(chosen)] = chosen
    return index
