"""Greedy selections at the sizes of their papers: the operations, and loops of torch calls written from the formulas.

The loops hold the matrix of all pairs and read the rows of all picked tokens anew at every step, as the published codes
of DivPrune, FlashVID and CDPruner do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

import reroute_kernels as rk
from bench.speed.device import Clock


def eager_diverse(features: Tensor, weights: Tensor, keep: int) -> Tensor:
    """(T, keep) picked tokens of each row, ascending; features (T, N, d), weights (T, N)."""
    rows = []
    for tokens, weight in zip(features, weights, strict=True):
        unit = normalize(tokens.float(), dim=-1)
        matrix = (1 - unit @ unit.T) * weight
        picked = torch.empty(keep, dtype=torch.int64, device=features.device)
        for step in range(keep):
            if step == 0:
                scores = matrix.topk(2, dim=0, largest=False).values[1]
            else:
                scores = matrix.index_select(0, picked[:step]).amin(dim=0)
                scores = scores.index_fill(0, picked[:step], -torch.inf)
            picked[step] = scores.argmax()
        rows.append(picked.sort().values)
    return torch.stack(rows)


def eager_dpp(features: Tensor, relevance: Tensor, keep: int) -> Tensor:
    """(T, keep) picked tokens of each row, ascending; features (T, N, d), relevance (T, N)."""
    rows = []
    for tokens, relevant in zip(features, relevance, strict=True):
        unit = normalize(tokens.float(), dim=-1)
        kernel = relevant[:, None] * (unit @ unit.T) * relevant
        left = kernel.diagonal().clone()
        parts = torch.zeros(keep, len(left), dtype=torch.float32, device=features.device)
        picked = torch.empty(keep, dtype=torch.int64, device=features.device)
        for step in range(keep):
            best = left.argmax()
            picked[step] = best
            part = (kernel[best] - parts[:step, best] @ parts[:step]) / left[best].sqrt()
            parts[step] = part
            left = left - part.square()
            left[best] = -torch.inf
        rows.append(picked.sort().values)
    return torch.stack(rows)


@dataclass(frozen=True)
class GreedyShape:
    """One selection: `rows` frames or images of `tokens` tokens of `width` channels, `keep` of each picked."""

    name: str
    operation: str
    rows: int
    tokens: int
    width: int
    keep: int

    def inputs(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Random features, and random values: weights of 1 to 2 in FlashVID, ones in DivPrune, and any relevance."""
        generator = torch.Generator().manual_seed(0)
        features = torch.randn(self.rows, self.tokens, self.width, generator=generator, dtype=torch.float32)
        values = torch.rand(self.rows, self.tokens, generator=generator, dtype=torch.float32)
        if self.operation == "select_diverse":
            values = values + 1 if self.name.startswith("FlashVID") else torch.ones_like(values)
        return features.to(device, dtype), values.to(device)

    def calls(self, device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], Tensor]]:
        """The loop and the operation."""
        features, values = self.inputs(device, dtype)
        eager = {"select_diverse": eager_diverse, "select_dpp": eager_dpp}[self.operation]
        operation = getattr(rk.ops, self.operation)
        return {
            "eager": lambda: eager(features, values, self.keep),
            "operation": lambda: operation(features, values, keep=self.keep),
        }


SHAPES = (
    GreedyShape("DivPrune", "select_diverse", 1, 576, 4096, 64),
    GreedyShape("DivPrune, 2,880 tokens", "select_diverse", 1, 2880, 4096, 282),
    GreedyShape("CDPruner", "select_dpp", 1, 576, 4096, 64),
    GreedyShape("FlashVID, LLaVA-OneVision, 10%", "select_diverse", 32, 196, 3584, 18),
    GreedyShape("FlashVID, LLaVA-OneVision, 25%", "select_diverse", 32, 196, 3584, 44),
    GreedyShape("FlashVID, LLaVA-Video, 10%", "select_diverse", 64, 169, 3584, 16),
    GreedyShape("FlashVID, LLaVA-Video, 25%", "select_diverse", 64, 169, 3584, 38),
)
TINY_SHAPES = (
    GreedyShape("tiny", "select_diverse", 2, 20, 32, 5),
    GreedyShape("tiny", "select_dpp", 2, 40, 8, 5),
)


def same_picks(one: Tensor, other: Tensor) -> float:
    """Share of the picks that two selections have in common."""
    return (one[:, :, None] == other[:, None]).any(dim=2).float().mean().item()


def measure_greedy(
    clock: Clock, shapes: tuple[GreedyShape, ...], dtype: torch.dtype, graphs: bool = True
) -> Iterator[dict[str, object]]:
    """Each selection and its loop, one after the other in turns; the operation alone in a graph, too, if asked to."""
    for shape in shapes:
        calls = shape.calls(clock.device, dtype)
        row: dict[str, object] = {**vars(shape), "same_picks": same_picks(*(call() for call in calls.values()))}
        row["microseconds"] = clock.in_turn(calls)
        if graphs:
            row["graph"] = clock.graphs_in_turn({"operation": calls["operation"]})["operation"]
        yield row
