"""Prefill and decoding of whole decoders with random weights: unrouted, removed, rerouted, and the oracle."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import reroute_kernels as rk
from bench.device import Clock, Timing
from bench.prefill import Decoder, Prefill, make_inputs, make_model
from reroute_kernels.models.adapter import cache_name, cache_of

VISUAL_TOKENS = 576
DECODE_VISUAL_TOKENS = 4096
DECODE_TIER = 128


def attention_flops(query_shape, key_shape, *_, **__) -> int:
    """Both products of attention; key heads may be fewer, which PyTorch's own formula long did not accept."""
    batch, heads, queries, head_dim = query_shape
    return 2 * 2 * batch * heads * queries * key_shape[2] * head_dim


ATTENTION_FLOPS = {
    getattr(torch.ops.aten, f"_scaled_dot_product_{name}"): attention_flops
    for name in (
        "flash_attention",
        "flash_attention_for_cpu",
        "efficient_attention",
        "cudnn_attention",
        "fused_attention_overrideable",
    )
}


def measure_prefill(clock: Clock, decoder: Decoder, visual_tokens: int, tiers, batches, dtype) -> Iterator[dict]:
    """A row for every batch and tier: milliseconds through the adapter, and of the layers alone in a CUDA graph."""
    model = make_model(decoder, visual_tokens, clock.device, dtype)
    for batch in batches:
        inputs = make_inputs(model, visual_tokens, batch)
        prefill = Prefill(model, inputs)
        for tier in tiers:
            policies = decoder.policies(tier)
            layers = {"unrouted": prefill.unrouted, **{name: prefill.routed(each) for name, each in policies.items()}}
            layers["reroute"]()
            layers["oracle"] = prefill.oracle(policies["reroute"], layers["reroute"].kept)
            _check(model, inputs, policies, layers)
            row = {"decoder": decoder.name, "visual_tokens": visual_tokens, "batch": batch, "tier": tier}
            with ExitStack() as routings, torch.no_grad():
                models = {"unrouted": model, **{name: twin(model) for name in policies}}
                for name, policy in policies.items():
                    routings.enter_context(rk.apply(models[name], policy))
                adapters = {name: partial(each, **inputs) for name, each in models.items()}
                row["eager"] = _milliseconds(clock.in_turn(adapters))
            row["layers"] = _milliseconds(clock.in_turn(layers))
            row["graph"] = _milliseconds(_in_graphs(clock, layers))
            row["flops"] = {name: _flops(call) for name, call in layers.items()}
            row["peak_bytes"] = {name: _peak(clock.device, call) for name, call in layers.items()}
            yield row | _ratios(row)


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


def _in_graphs(clock: Clock, calls: dict[str, Callable]) -> dict[str, dict[str, float]]:
    return clock.in_turn({name: clock.graph(call) for name, call in calls.items()})


def _milliseconds(times: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    return {name: Timing(**timing).milliseconds() for name, timing in times.items()}


def _flops(call: Callable) -> int:
    with FlopCounterMode(display=False, custom_mapping=ATTENTION_FLOPS) as counter:
        call()
    return counter.get_total_flops()


def _peak(device: torch.device, call: Callable) -> int | None:
    """Bytes allocated at the highest, beyond what was before."""
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


def measure_decoding(clock: Clock, decoder: Decoder, visual_tokens: int, steps: int, dtype) -> dict[str, object]:
    """Milliseconds of one greedy step on the cache of a prompt, and the bytes of that cache."""
    model = make_model(decoder, visual_tokens, clock.device, dtype)
    inputs = make_inputs(model, visual_tokens)
    policies = {"unrouted": None, **decoder.policies(DECODE_TIER)}
    row: dict[str, object] = {"decoder": decoder.name, "visual_tokens": visual_tokens, "tier": DECODE_TIER}
    for name, policy in policies.items():
        routing = rk.apply(model, policy) if policy else None
        try:
            with torch.no_grad():
                row[name] = _decode(clock, model, inputs, steps)
        finally:
            if routing:
                routing.remove()
    return row


def _decode(clock: Clock, model, inputs: dict, steps: int) -> dict[str, float]:
    cache = cache_of(model(**inputs))
    held = sum(
        tensor.numel() * tensor.element_size() for layer in cache.layers for tensor in (layer.keys, layer.values)
    )
    positions = inputs["position_ids"][..., -1:]
    token = inputs["input_ids"][:, -1:]
    times = []
    for _ in range(steps):
        positions = positions + 1
        step = {"input_ids": token, "position_ids": positions, "use_cache": True, cache_name(model): cache}
        output = []
        times.append(clock.once(lambda step=step, output=output: output.append(model(**step))))
        token = output[0].logits[:, -1:].argmax(dim=-1)
    return Timing.of(times[1:]).milliseconds() | {"cache_bytes": held}
