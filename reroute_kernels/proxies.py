"""Proxies: tokens that run through a stage in place of groups of deferred ones, which then follow their change.

The alignment of SwiftVLM (arXiv 2602.03134). There a merged token joins the sequence beside those that were selected;
here it takes the row of its group's leader, so that positions, masks and caches stay what they are without it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from . import ops
from .positions import flags_of, positions_of
from .precision import full_precision
from .rankings import evenly


@dataclass(eq=False)
class Proxies:
    """The proxies of one stage; M rows run in it, up to G of them are proxies, P tokens are in the parent sequence.

    rows: (B, G) int64, the rows of the compact sequence in which they run, -1 where a sample has fewer; groups: (B, P)
    int64, the proxy that stands for each token, -1 if none does; start: (B, G, d), what each was when its change was
    last added.
    """

    rows: Tensor
    groups: Tensor
    start: Tensor

    def move(self, device: torch.device) -> None:
        """Bring everything to a device."""
        self.rows, self.groups, self.start = (x.to(device) for x in (self.rows, self.groups, self.start))

    def added(self, addition: Tensor, own: Tensor) -> Tensor:
        """Have the proxies receive the mean of what is added to their groups.

        Args:
            addition: (B, P, d), what is added to the parent's tokens.
            own: (B, M, d), what is added to the compact rows.

        Returns:
            (B, M, d), the latter with other rows for the proxies.
        """
        means, _ = ops.merge_tokens(addition.contiguous(), self.groups, self.rows.shape[1])
        self.start = self.start + means
        return _with_rows(own, self.rows, means)

    def follow(self, hidden: Tensor, compact: Tensor) -> Tensor:
        """Add the change of each proxy to the tokens for which it stands.

        Args:
            hidden: (B, P, d) of the parent.
            compact: (B, M, d), as the stage left them.

        Returns:
            (B, P, d). The sums are made in float32.
        """
        (now,) = ops.gather_tokens(self.rows, compact)
        (received,) = ops.gather_tokens(self.groups, now.float() - self.start.float())
        self.start = now
        waits = (self.groups >= 0)[:, :, None]
        return torch.where(waits, (hidden.float() + received).to(hidden.dtype), hidden)

    def without(self, index: Tensor) -> Tensor:
        """(B, M) positions in the parent, -1 in the rows of proxies, which are not written back."""
        return index.masked_fill(flags_of(self.rows, index.shape[1]), -1)


def leaders(selected: Tensor, pool: Tensor, count: Tensor) -> Tensor:
    """Deferred candidates at even distances, one for each group.

    Args:
        selected: (B, P) bool, the tokens that run for themselves.
        pool: (B, P) bool, the candidates.
        count: (B,) int64, groups of each sample.

    Returns:
        (B, P) bool.
    """
    return evenly(pool & ~selected, count)


def closest_leaders(hidden: Tensor, waits: Tensor, led: Tensor, most: int) -> Tensor:
    """Group waiting tokens by the leader that their hidden states resemble most, by cosine similarity.

    A leader is in its own group; of equally similar leaders the first one counts.

    Args:
        hidden: (B, P, d).
        waits: (B, P) bool, the tokens to group beside the leaders.
        led: (B, P) bool, the leaders.
        most: G, the most leaders of a sample.

    Returns:
        (B, P) int64, the number of each token's leader among those of its sample, -1 if it has none.
    """
    places = positions_of(led, most)
    with torch.no_grad():
        unit = normalize(hidden.detach().float(), dim=-1)
        (heads,) = ops.gather_tokens(places, unit)
        with full_precision(hidden.device):
            similarity = heads @ unit.transpose(1, 2)  # [B, G, P]
        nearest = similarity.masked_fill((places < 0)[:, :, None], -torch.inf).argmax(dim=1)
        numbers = torch.arange(most, device=waits.device).expand_as(places).contiguous()
        groups = torch.where(waits, nearest, -1)
        groups = ops.scatter_tokens_(groups, places, numbers)
        return torch.where((places >= 0).any(dim=1, keepdim=True), groups, -1)


def start_proxies(compact: Tensor, index: Tensor, hidden: Tensor, groups: Tensor, led: Tensor, most: int):
    """Put the means of groups in the rows of their leaders.

    Args:
        compact: (B, M, d), the tokens that were gathered to run.
        index: (B, M) int64, their positions, -1 at rows without a token.
        hidden: (B, P, d) of the parent.
        groups: (B, P) int64, the group of each token, numbered in the order of the leaders, -1 if it is in none.
        led: (B, P) bool, the leaders, which are among the positions.
        most: G, the most leaders of a sample.

    Returns:
        (B, M, d), the compact rows with those of proxies; and the proxies.
    """
    rows = positions_of(led.gather(1, index.clamp(min=0)) & (index >= 0), most)
    start, _ = ops.merge_tokens(hidden, groups, most)
    return _with_rows(compact, rows, start), Proxies(rows, groups, start)


def _with_rows(compact: Tensor, rows: Tensor, other: Tensor) -> Tensor:
    """A copy of compact rows (B, M, d) with others (B, G, d) at `rows`."""
    return ops.scatter_tokens_(compact.clone(), rows, other)
