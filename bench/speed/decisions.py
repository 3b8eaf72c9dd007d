"""Cost of a decision beyond the key projection: every operation, the fused call, and the usual eager code.

Each time comes with the bytes that must move, the launches, and the floor that both put under it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch

import reroute_kernels as rk
from bench.speed import eager
from bench.speed.device import Clock

TEXT = 64
EPS = 1e-6


@dataclass(frozen=True)
class Shape:
    """Query heads, key heads, channels of a head, hidden size, tokens of a sample, share of them to keep."""

    name: str
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    length: int
    keep: float = 0.2644


SHAPES = (
    Shape("LLaVA-1.5-7B", 32, 32, 128, 4096, 640),
    Shape("Qwen2.5-VL-7B", 28, 4, 128, 3584, 1500),
    Shape("Qwen2.5-VL-7B", 28, 4, 128, 3584, 16384),
)
TINY_SHAPES = (Shape("tiny", 4, 2, 16, 32, 80),)
BATCHES = (1, 8, 32)


class Decision:
    """Random tensors of one decision, and the calls that make it.

    Args:
        shape: of a sample.
        batch: samples.
        device, dtype: of the tensors.
        fill: makes them; `torch.empty` if no one computes with them.
    """

    def __init__(
        self,
        shape: Shape,
        batch: int,
        device: torch.device,
        dtype: torch.dtype,
        fill: Callable[..., torch.Tensor] = torch.randn,
    ):
        self.shape, self.batch, length = shape, batch, shape.length

        def random(*size: int) -> torch.Tensor:
            return fill(batch, length, *size, device=device, dtype=dtype)

        self.queries = random(shape.heads, shape.head_dim)
        angles = torch.rand(1, length, shape.head_dim // 2, device=device).repeat(1, 1, 2) * 6
        self.ranking = {
            "query": self.queries[:, -1:],
            "key": random(shape.kv_heads, shape.head_dim),
            "cos": angles.cos().to(dtype),
            "sin": angles.sin().to(dtype),
        }
        self.hidden = random(shape.hidden)
        self.weight = torch.rand(shape.hidden, device=device).to(dtype)
        self.rows = (self.hidden, *(self.ranking[name].expand(batch, -1, -1) for name in ("cos", "sin")))
        pinned = torch.ones(batch, length, dtype=torch.bool, device=device)
        pinned[:, TEXT // 4 : length - TEXT * 3 // 4] = False
        self.count = int((length - TEXT) * shape.keep)
        self.selection = {
            "pool": ~pinned,
            "pinned": pinned,
            "keep": torch.full((batch,), self.count, device=device),
            "length": TEXT + self.count,
        }

    @cached_property
    def scores(self) -> torch.Tensor:
        return rk.ops.rank_tokens(**self.ranking)

    @cached_property
    def index(self) -> torch.Tensor:
        return rk.ops.select_tokens(self.scores, **self.selection)

    @cached_property
    def compact(self) -> torch.Tensor:
        return rk.ops.gather_tokens(self.index, self.hidden)[0]

    def check(self) -> None:
        """Compare the backend that runs with the reference.

        Raises:
            AssertionError: something is not equal.
        """
        torch.testing.assert_close(self.scores, rk.ref.rank_tokens(**self.ranking), atol=1e-5, rtol=0)
        if not torch.equal(self.index, rk.ref.select_tokens(self.scores, **self.selection)):
            raise AssertionError("selections differ")
        index, compact = rk.ops.route_tokens(**self.ranking, **self.selection, tensors=self.rows)
        expected = rk.ref.gather_tokens(self.index, *self.rows)
        if not torch.equal(index, self.index) or not all(map(torch.equal, compact, expected)):
            raise AssertionError("the fused decision differs")
        written = rk.ops.scatter_tokens_(torch.zeros_like(self.hidden), self.index, self.compact)
        if not torch.equal(written, rk.ref.scatter_tokens_(torch.zeros_like(self.hidden), self.index, self.compact)):
            raise AssertionError("scattered rows differ")
        self._check_norm()

    def _check_norm(self) -> None:
        whole, expected = torch.zeros_like(self.hidden), torch.zeros_like(self.hidden)
        normed = rk.ops.scatter_norm_tokens_(whole, self.index, self.compact, self.weight, EPS)
        wanted = rk.ref.scatter_norm_tokens_(expected, self.index, self.compact, self.weight, EPS)
        if not torch.equal(whole, expected):
            raise AssertionError("scattered rows differ")
        # Sums in another order now and then round the other way, once or twice.
        exact = self.hidden.dtype == torch.float32
        torch.testing.assert_close(normed, wanted, atol=1e-5, rtol=0 if exact else 2**-6)

    def calls(self) -> dict[str, Callable[[], object]]:
        """Each operation as a call without arguments; `decision` is the fused call with the scatter before it."""
        scores, index, compact = self.scores, self.index, self.compact

        def route():
            return rk.ops.route_tokens(**self.ranking, **self.selection, tensors=self.rows)

        def scatter():
            return rk.ops.scatter_tokens_(self.hidden, index, compact)

        return {
            "rank_tokens": lambda: rk.ops.rank_tokens(**self.ranking),
            "select_tokens": lambda: rk.ops.select_tokens(scores, **self.selection),
            "gather_tokens": lambda: rk.ops.gather_tokens(index, *self.rows),
            "scatter_tokens_": scatter,
            "scatter_norm_tokens_": lambda: rk.ops.scatter_norm_tokens_(self.hidden, index, compact, self.weight, EPS),
            "route_tokens": route,
            "decision": lambda: (scatter(), route()),
        }

    def eager_calls(self) -> dict[str, Callable[[], object]]:
        """The same calls by plain eager code, on the first sample."""
        key, cos, sin = (self.ranking[name] for name in ("key", "cos", "sin"))
        pool, pinned = self.selection["pool"], self.selection["pinned"]
        scores, kept, compact = self.scores, self.index[0], self.compact

        def rank():
            return eager.rank_tokens(self.queries, key, cos, sin)

        def route():
            index = eager.select_tokens(rank(), pool, pinned, self.count)
            return index, eager.gather_tokens(index[0], *self.rows)

        def scatter():
            return eager.scatter_tokens_(self.hidden, kept, compact)

        return {
            "rank_tokens": rank,
            "select_tokens": lambda: eager.select_tokens(scores, pool, pinned, self.count),
            "gather_tokens": lambda: eager.gather_tokens(kept, *self.rows),
            "scatter_tokens_": scatter,
            "scatter_norm_tokens_": lambda: eager.norm_tokens(scatter(), self.weight, EPS),
            "route_tokens": route,
            "decision": lambda: (scatter(), route()),
        }

    def bytes_moved(self) -> dict[str, int]:
        """Bytes that each call must read and write, scratch included."""
        key, cos = self.ranking["key"], self.ranking["cos"]
        logits = 4 * self.batch * self.shape.heads * self.shape.length
        rank = key.numel() * key.element_size() + 2 * cos.numel() * cos.element_size() + 2 * logits
        select = self.scores.numel() * (4 + 1 + 1) + self.index.numel() * 8
        rows = self.index.numel() * sum(row[0, 0].numel() * row.element_size() for row in self.rows)
        hidden = 2 * self.compact.numel() * self.compact.element_size()
        moved = {
            "rank_tokens": rank,
            "select_tokens": select,
            "gather_tokens": 2 * rows,
            "scatter_tokens_": hidden,
            "scatter_norm_tokens_": 2 * self.hidden.numel() * self.hidden.element_size() + hidden // 2,
            "route_tokens": rank + select + 2 * rows,
        }
        return moved | {"decision": moved["route_tokens"] + hidden}


def count_launches(call: Callable[[], object]) -> int:
    """Triton launches of a call."""
    from triton.runtime.jit import KernelInterface

    launch_on, launched = KernelInterface.__getitem__, 0

    def counting(kernel, grid):
        nonlocal launched
        launched += 1
        return launch_on(kernel, grid)

    KernelInterface.__getitem__ = counting
    try:
        call()
    finally:
        KernelInterface.__getitem__ = launch_on
    return launched


def measure_operations(clock: Clock, floors: dict, shapes, batches, dtype: torch.dtype) -> list[dict]:
    """Rows of every operation at every shape and batch, in and outside a graph."""
    rows = []
    for shape in shapes:
        for batch in batches:
            decision = Decision(shape, batch, clock.device, dtype)
            decision.check()
            calls, moved = decision.calls(), decision.bytes_moved()
            times = {"eager": clock.in_turn(calls), "graph": clock.graphs_in_turn(calls)}
            for name, call in calls.items():
                launches = count_launches(call)
                row = {"operation": name, "shape": shape.name, "length": shape.length, "batch": batch}
                row |= {"launches": launches, "bytes": moved[name]}
                for mode, launch in (("eager", "empty_launch_us"), ("graph", "empty_launch_in_graph_us")):
                    microseconds = times[mode][name]["median"]
                    floor = max(moved[name] / floors["copy_gb_per_s"] / 1e3, launches * floors[launch])
                    row[mode] = times[mode][name] | {
                        "gb_per_s": moved[name] / microseconds / 1e3,
                        "floor_us": floor,
                        "over_floor": microseconds / floor,
                    }
                rows.append(row)
            del decision, calls, call
    return rows


def measure_copies(clock: Clock, batch: int, length: int, hidden: int, dtype: torch.dtype) -> list[dict]:
    """Gather and scatter of half the rows of a large tensor: bandwidth, to be compared with that of a plain copy."""
    full = torch.randn(batch, length, hidden, device=clock.device, dtype=dtype)
    kept = torch.rand(batch, length, device=clock.device).argsort(dim=1)[:, : length // 2].sort(dim=1).values
    (compact,) = rk.ops.gather_tokens(kept, full)
    if not torch.equal(compact, full.gather(1, kept[:, :, None].expand(-1, -1, hidden))):
        raise AssertionError("gathered rows differ")
    target = rk.ops.scatter_tokens_(torch.zeros_like(full), kept, compact)
    if not torch.equal(target, torch.zeros_like(full).scatter_(1, kept[:, :, None].expand(-1, -1, hidden), compact)):
        raise AssertionError("scattered rows differ")
    times = clock.graphs_in_turn(
        {
            "gather_tokens": lambda: rk.ops.gather_tokens(kept, full),
            "scatter_tokens_": lambda: rk.ops.scatter_tokens_(target, kept, compact),
        }
    )
    moved = 2 * compact.numel() * compact.element_size()
    rows = []
    for name, timing in times.items():
        row = {"operation": name, "batch": batch, "length": length, "hidden": hidden, "bytes": moved, **timing}
        rows.append(row | {"gb_per_s": moved / timing["median"] / 1e3})
    return rows


def measure_against_eager(clock: Clock, shapes, dtype: torch.dtype) -> list[dict]:
    """The fused decision against the whole attention matrix, top-k and `nonzero`, one sample, in one run.

    The eager code cannot be captured in a graph, because of `nonzero`; the fused decision is timed in one too.
    """
    rows = []
    for shape in shapes:
        decision = Decision(shape, 1, clock.device, dtype)
        eagerly, fused = (calls["decision"] for calls in (decision.eager_calls(), decision.calls()))
        row = {"shape": shape.name, "length": shape.length, "batch": 1}
        try:
            _, (kept, _) = eagerly()
            # The eager code rotates in the precision of the model: nearly equal scores may change places.
            row["same_tokens"] = len(set(kept[0].tolist()) & set(decision.index[0].tolist())) / kept.shape[1]
            row |= clock.in_turn({"eager": eagerly, "fused": fused})
        except torch.OutOfMemoryError:
            row |= {"eager": None, **clock.in_turn({"fused": fused})}
        row |= clock.graphs_in_turn({"fused_in_graph": fused})
        for name in ("fused", "fused_in_graph"):
            row[f"eager_over_{name}"] = row["eager"] and row["eager"]["median"] / row[name]["median"]
        rows.append(row)
        del decision, eagerly, fused
        if clock.device.type == "cuda":
            torch.cuda.empty_cache()
    return rows
