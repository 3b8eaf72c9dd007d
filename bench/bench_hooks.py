"""Cost of the hooks in Python: with 32 layers so small that nothing else counts, and beside a forward of 7B size."""

import copy
import operator
import statistics
from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import DynamicCache

import reroute_kernels as rk
from bench.device import Clock, Timing
from bench.prefill import LLAVA_7B, TEXT_AFTER, TEXT_BEFORE, Decoder, make_inputs, make_model
from reroute_kernels.models.adapter import cache_name, cache_of

TRIVIAL = Decoder("32 layers, d = 32", "llava", 32, 32, 2, 2, 32)
VISUAL_TOKENS = 16
ROUNDS = 300

# All tokens run, so that routed layers do what unrouted ones do.
POLICIES = {
    "one_decision": rk.Policy([rk.Stage(3, 1.0)]),
    "routed": rk.Policy([rk.Stage(layer, 1.0) for layer in (3, 7, 15, 23)]),
}

CACHED_TOKENS = 576 + TEXT_BEFORE + TEXT_AFTER
FORWARDS = 5
LONGEST = 60.0  # seconds for all prefills of 7B size; one layer stands for 32 where they would take longer


@pytest.fixture(scope="module")
def models(device):
    """The unrouted model, and a copy for each policy, on one thread: what threads cost is not the hooks'."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model = make_model(TRIVIAL, VISUAL_TOKENS, device, torch.float32)
    copies = {name: copy.deepcopy(model) for name in POLICIES}
    routings = [rk.apply(copies[name], policy) for name, policy in POLICIES.items()]
    yield {"unrouted": model, **copies}
    for routing in routings:
        routing.remove()
    torch.set_num_threads(threads)


def text_only(model: nn.Module) -> Callable[[], object]:
    ids = make_inputs(model, 0)["input_ids"]
    mask = torch.ones_like(ids)
    return lambda: model(input_ids=ids, attention_mask=mask, use_cache=True)


def prefill(model: nn.Module) -> Callable[[], object]:
    inputs = make_inputs(model, VISUAL_TOKENS)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    return lambda: model(**inputs)


def decode_step(model: nn.Module) -> Callable[[], object]:
    """One more token on the cache of a prompt; all models have as many."""
    cache = cache_of(prefill(model)())
    ids = make_inputs(model, 0)["input_ids"][:, :1]
    mask = torch.ones(1, cache.get_seq_length() + ROUNDS + 2, dtype=torch.int64, device=ids.device)
    return lambda: model(
        input_ids=ids,
        attention_mask=mask[:, : cache.get_seq_length() + 1],
        logits_to_keep=1,
        **{cache_name(model): cache},
    )


CALLS = {"text-only prompt": text_only, "decode step": decode_step, "prefill": prefill}


@pytest.mark.parametrize("call", CALLS)
def bench_python(benchmark, call, models, device):
    calls = {name: CALLS[call](model) for name, model in models.items()}
    clock, times, turns = Clock(device), {name: [] for name in calls}, list(calls)

    def in_turn():
        for name in turns:
            times[name].append(clock.once(calls[name]))
        turns.append(turns.pop(0))

    benchmark.group = "hooks"
    benchmark.pedantic(in_turn, rounds=ROUNDS, warmup_rounds=1)
    for values in times.values():
        del values[0]  # the warm-up
    added = {
        name: 1e6 * statistics.median(map(operator.sub, times[name], times["unrouted"]))  # round by round
        for name in POLICIES
    }
    benchmark.extra_info["call"] = call
    benchmark.extra_info["layers"] = TRIVIAL.layers
    benchmark.extra_info["schedules"] = {
        name: [[stage.layer, stage.keep] for stage in policy.schedule] for name, policy in POLICIES.items()
    }
    benchmark.extra_info["microseconds"] = {name: Timing.of(values).median for name, values in times.items()}
    benchmark.extra_info["added_microseconds"] = added
    if call == "prefill":
        # The layers from 3 on have the same hooks under both policies; what differs is three decisions.
        benchmark.extra_info["microseconds_of_a_decision"] = (added["routed"] - added["one_decision"]) / 3


@pytest.fixture(scope="module")
def large(device, dtype):
    """The decoder of LLaVA-1.5-7B with random weights, whose layers share those of one."""
    torch.manual_seed(0)
    model = make_model(Decoder(**{**vars(LLAVA_7B), "layers": 1}), 576, device, dtype)
    decoder = model.model.language_model
    (layer,) = decoder.layers
    for number in range(1, LLAVA_7B.layers):
        same = copy.deepcopy(layer, {id(weight): weight for weight in layer.parameters()})
        same.self_attn.layer_idx = number
        decoder.layers.append(same)
    decoder.config.num_hidden_layers = LLAVA_7B.layers
    return model


@pytest.mark.parametrize("call", ["decode step", "prefill"])
def bench_forward_of_7b_size(benchmark, call, large, device):
    decoder, clock = large.model.language_model, Clock(device)
    measured, scale = f"{LLAVA_7B.layers} layers", 1
    if call == "decode step":
        size = (1, LLAVA_7B.kv_heads, CACHED_TOKENS, LLAVA_7B.hidden // LLAVA_7B.heads)
        cache = DynamicCache(config=decoder.config)
        for number in range(LLAVA_7B.layers):
            cache.update(*torch.randn(2, *size, dtype=large.dtype, device=device), number)
        ids = make_inputs(large, 0)["input_ids"][:, :1]

        def forward():
            large(input_ids=ids, **{cache_name(large): cache})
    else:
        inputs = make_inputs(large, 576)
        hidden = torch.randn(1, CACHED_TOKENS, LLAVA_7B.hidden, dtype=large.dtype, device=device)
        tables = decoder.rotary_emb(hidden, inputs["position_ids"])

        def one_layer():
            decoder.layers[0](hidden, position_embeddings=tables, position_ids=inputs["position_ids"])

        def forward():
            large(**inputs)

        one_layer()
        if LLAVA_7B.layers * (FORWARDS + 1) * clock.once(one_layer) > LONGEST:
            forward, measured, scale = one_layer, f"one layer, times {LLAVA_7B.layers}", LLAVA_7B.layers

    times = []
    benchmark.group = "hooks"
    benchmark.pedantic(lambda: times.append(clock.once(forward)), rounds=FORWARDS, warmup_rounds=1)
    timing = Timing.of([scale * seconds for seconds in times[1:]])
    benchmark.extra_info["forward_of_7b_size"] = call
    benchmark.extra_info["tokens"] = CACHED_TOKENS
    benchmark.extra_info["measured"] = measured
    benchmark.extra_info["dtype"] = str(large.dtype)
    benchmark.extra_info["milliseconds"] = timing.milliseconds()
