"""Cost of the hooks in Python, with 32 layers so small that nothing else counts."""

import copy
import operator
import statistics
from collections.abc import Callable

import pytest
import torch
from torch import nn

import reroute_kernels as rk
from bench.speed.device import Clock, Timing
from bench.speed.prefill import Decoder, make_inputs, make_model
from reroute_kernels.models.adapter import cache_name, cache_of

TRIVIAL = Decoder("32 layers, d = 32", "llava", 32, 32, 2, 2, 32)
VISUAL_TOKENS = 16
ROUNDS = 300

# All tokens run, so that routed layers do the same work as unrouted ones.
POLICIES = {
    "one_decision": rk.Policy([rk.Stage(3, 1.0)]),
    "routed": rk.Policy([rk.Stage(layer, 1.0) for layer in (3, 7, 15, 23)]),
}


@pytest.fixture(scope="module")
def models(device):
    """The unrouted model, and a copy for each policy, on one thread: the cost of threads is not that of hooks."""
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
        # The layers from 3 on have the same hooks under both policies, which differ by three decisions.
        benchmark.extra_info["microseconds_of_a_decision"] = (added["routed"] - added["one_decision"]) / 3
