"""Whole decoders with random weights: prefills, decisions part by part, and decoding, in CUDA graphs and eager."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

import reroute_kernels as rk
from bench.speed.device import Clock, Timing
from bench.speed.prefill import (
    LLAVA_7B,
    QWEN_7B,
    TEXT_AFTER,
    TEXT_BEFORE,
    Decoder,
    NoCopyCache,
    Prefill,
    make_inputs,
    make_model,
    set_visual_tokens,
)

TEXT = TEXT_BEFORE + TEXT_AFTER
TIER = 192


class Case(NamedTuple):
    """One prefill to measure."""

    visual_tokens: int
    batch: int
    tier: int = TIER


HEADLINES: dict[Decoder, list[Case]] = {
    LLAVA_7B: [Case(576, 1), Case(576, 8)],
    QWEN_7B: [Case(1500 - TEXT, 1), Case(1500 - TEXT, 8), Case(16384 - TEXT, 1)],
}
"""The prefills that the report measures first."""

MORE: dict[Decoder, list[Case]] = {
    decoder: [Case(576, batch, tier) for batch in (1, 8, 32) for tier in (192, 128, 64) if (batch, tier) != (1, 192)]
    for decoder in HEADLINES
}
"""Further budgets and batches, measured last."""

DECODING = Case(4096, 8, 128)
APART = ("scatter", "norm")
"""Parts of a decision that one launch does together."""


class Models:
    """Decoders with random weights, each made on first use.

    Args:
        device, dtype: of the weights.
        longest: visual tokens of the longest prompt.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, longest: int):
        self.device, self.dtype, self.longest = device, dtype, longest
        self._made: dict[str, nn.Module] = {}

    def get(self, decoder: Decoder, visual_tokens: int) -> nn.Module:
        """The model of a decoder, which sees each image as the given number of visual tokens."""
        if decoder.name not in self._made:
            self._made[decoder.name] = make_model(decoder, self.longest, self.device, self.dtype)
        model = self._made[decoder.name]
        set_visual_tokens(model, visual_tokens)
        return model


def measure_prefill(clock: Clock, models: Models, decoder: Decoder, cases: list[Case]) -> Iterator[dict]:
    """A row for each case, handed out once its graphs are timed, and again with the times of the eager calls.

    A CUDA graph holds the layers alone, with every count known; the oracle knows the indices, too. Eager is the whole
    model through `rk.apply`; its host milliseconds run until the call returns.
    """
    checked = set()
    for case in cases:
        model = models.get(decoder, case.visual_tokens)
        inputs = make_inputs(model, case.visual_tokens, case.batch)
        prefill, policies = Prefill(model, inputs), decoder.policies(case.tier)
        layers: dict[str, Callable] = {"unrouted": prefill.unrouted}
        layers |= {name: prefill.routed(policy) for name, policy in policies.items()}
        layers["reroute"]()
        layers["oracle"] = prefill.oracle(policies["reroute"], layers["reroute"].kept)
        if case.visual_tokens not in checked:
            _check(model, inputs, policies, layers)
            checked.add(case.visual_tokens)
        row: dict = {"decoder": decoder.name, **case._asdict(), "tokens": case.visual_tokens + TEXT}
        row["graph"] = _milliseconds(clock.in_turn({name: clock.graph(call) for name, call in layers.items()}))
        row["flops"] = _flops(model, case, policies)
        row |= _ratios(row)
        yield row
        with ExitStack() as routings, torch.no_grad():
            routed = twin(model)
            routings.enter_context(rk.apply(routed, policies["reroute"]))
            calls = {"unrouted": partial(model, **inputs), "reroute": partial(routed, **inputs)}
            row["eager"] = _milliseconds(clock.in_turn(calls))
            row["host_ms"] = {name: _host_milliseconds(clock, call) for name, call in calls.items()}
        row["peak_bytes"] = {name: _peak(clock.device, layers[name]) for name in ("unrouted", "reroute")}
        yield row


def _check(model, inputs: dict, policies: dict[str, rk.Policy], layers: dict[str, Callable]) -> None:
    """Check that all timed variants compute the same: layers alone against the adapter, and against the oracle."""
    with torch.no_grad():
        torch.testing.assert_close(layers["unrouted"](), model(**inputs).logits)
        for name, policy in policies.items():
            with rk.apply(model, policy) as routing:
                logits = model(**inputs).logits
            if routing.trace is None:
                raise AssertionError(f"{name} did not route")
            torch.testing.assert_close(layers[name](), logits)
        torch.testing.assert_close(layers["oracle"](), layers["reroute"]())


def twin(model: nn.Module) -> nn.Module:
    """The same model, with the same memory for its weights, to be routed beside it."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def _milliseconds(times: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    return {name: Timing(**timing).milliseconds() for name, timing in times.items()}


def _host_milliseconds(clock: Clock, call: Callable, calls: int = 5) -> float:
    return Timing.of([clock.host(call) for _ in range(calls)]).median / 1e3


def _flops(model: nn.Module, case: Case, policies: dict[str, rk.Policy]) -> dict[str, int]:
    """FLOPs of the layers and of the logits of the last token."""
    counted = {
        name: rk.cost(model, policy, TEXT, case.visual_tokens, case.batch)
        for name, policy in (("unrouted", None), *policies.items())
    }
    return {name: cost.prefill_flops + cost.lm_head_flops for name, cost in counted.items()}


def _peak(device: torch.device, call: Callable) -> int | None:
    """Peak of the bytes allocated, beyond those allocated before."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _ratios(row: dict) -> dict[str, float]:
    graph = {name: timing["median"] for name, timing in row["graph"].items()}
    speed_up = graph["unrouted"] / graph["reroute"]
    return {
        "reroute_over_oracle": graph["reroute"] / graph["oracle"],
        "unrouted_over_reroute": speed_up,
        "share_of_flops_speed_up": speed_up / (row["flops"]["unrouted"] / row["flops"]["reroute"]),
    }


@torch.no_grad()
def measure_decision(clock: Clock, models: Models, decoder: Decoder, cases: list[Case]) -> Iterator[dict]:
    """A row for each case: microseconds of every part of a decision, one by one and together, in a CUDA graph."""
    for case in cases:
        model = models.get(decoder, case.visual_tokens)
        prefill = Prefill(model, make_inputs(model, case.visual_tokens, case.batch))
        parts = decision_parts(prefill, decoder.policies(case.tier)["reroute"], case)

        def whole(parts=parts) -> None:
            for name, part in parts.items():
                if name not in APART:
                    part()

        times = clock.graphs_in_turn({**parts, "whole": whole})
        yield {"decoder": decoder.name, **case._asdict(), "microseconds": times}


def decision_parts(prefill: Prefill, policy: rk.Policy, case: Case) -> dict[str, Callable[[], object]]:
    """The parts of a policy's last decision, in their order.

    The write-back of the stage before, the norm of all tokens by its module, both in one launch, their key projection,
    the query of the last token, ranking, selection, and the compaction of the tokens that run.
    """
    layer = prefill.layers[policy.schedule[-1].layer]
    routed = prefill.routed(policy)
    routed()
    hidden, (cos, sin), _ = prefill.begin()
    index, prompt, attention = routed.kept[-1], prefill.prompt, layer.self_attn
    keep = torch.tensor([policy.selected_counts(case.visual_tokens)[-1]] * case.batch, device=hidden.device)
    (compact,) = rk.ops.gather_tokens(index, hidden)
    states = layer.input_layernorm(hidden)
    weight, eps, one_plus = prefill.adapter.norm(layer, hidden)
    ranking = prefill.adapter.ranking(layer, hidden, cos, sin, None, None)
    scores = ranking.scores()
    return {
        "scatter": lambda: rk.ops.scatter_tokens_(hidden, index, compact),
        "norm": lambda: layer.input_layernorm(hidden),
        "scatter and norm": lambda: rk.ops.scatter_norm_tokens_(hidden, index, compact, weight, eps, one_plus=one_plus),
        "key projection": lambda: attention.k_proj(states),
        "query": lambda: attention.q_proj(states[:, -1:]),
        "rank": ranking.scores,
        "select": lambda: rk.ops.select_tokens(scores, prompt.pool, prompt.pinned, keep, index.shape[1]),
        "gather": lambda: rk.ops.gather_tokens(index, hidden, cos, sin),
    }


class SlotCache:
    """Keys and values of fixed size, with a slot at the end into which every call writes the new token's.

    Args:
        layers: (keys, values) of each layer, (B, Hkv, P, D).
    """

    def __init__(self, layers: list[tuple[Tensor, Tensor]]):
        self.layers = [tuple(torch.cat([held, held[:, :, -1:]], dim=2) for held in layer) for layer in layers]

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_, **__) -> tuple[Tensor, Tensor]:
        keys, values = self.layers[layer_idx]
        keys[:, :, -1:] = key
        values[:, :, -1:] = value
        return keys, values

    @property
    def bytes(self) -> int:
        return sum(held.numel() * held.element_size() for layer in self.layers for held in layer)


@torch.no_grad()
def measure_decoding(clock: Clock, models: Models, decoder: Decoder, case: Case) -> dict[str, object]:
    """Milliseconds of one decode step in a CUDA graph behind a prompt, and the bytes of its cache.

    The caches have a fixed size in each layer: the tokens that ran there, and one more.
    """
    model = models.get(decoder, case.visual_tokens)
    caches: list[NoCopyCache] = []

    def make_cache() -> NoCopyCache:
        caches.append(NoCopyCache())
        return caches[-1]

    prefill = Prefill(model, make_inputs(model, case.visual_tokens, case.batch), make_cache)
    prefills = {"unrouted": prefill.unrouted, "reroute": prefill.routed(decoder.policies(case.tier)["reroute"])}
    steps, held = {}, {}
    for name, call in prefills.items():
        call()
        cache = SlotCache(caches.pop().layers)
        held[name] = cache.bytes
        steps[name] = clock.graph(prefill.decode_step(cache))
    times = _milliseconds(clock.in_turn(steps))
    return {
        "decoder": decoder.name,
        **case._asdict(),
        "milliseconds": times,
        "cache_bytes": held,
        "unrouted_over_reroute": times["unrouted"]["median"] / times["reroute"]["median"],
    }
