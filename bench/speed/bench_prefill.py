"""A prefill through the adapter against the unrouted model and against the oracle, in turn and in one process."""

import copy
from functools import partial

import pytest
import torch
from transformers import DynamicCache

import reroute_kernels as rk
from bench.speed.device import Clock, Timing
from bench.speed.prefill import Decoder, Prefill, make_inputs, make_model

DECODER = Decoder("16 layers, d = 512", "llava", 16, 512, 8, 8, 1376)
POLICY = rk.Policy([rk.Stage(layer, 0.0835) for layer in (3, 7, 11, 14)])
ROUNDS = {576: 25, 4096: 9}


@pytest.mark.parametrize("visual_tokens", ROUNDS)
def bench_prefill(benchmark, visual_tokens, device, dtype):
    model = make_model(DECODER, visual_tokens, device, dtype)
    inputs = make_inputs(model, visual_tokens)
    prefill = Prefill(model, inputs, partial(DynamicCache, config=model.model.language_model.config))
    routed_model = copy.deepcopy(model)
    with rk.apply(routed_model, POLICY):
        layers = prefill.routed(POLICY)
        layers()
        oracle = prefill.oracle(POLICY, layers.kept)
        torch.testing.assert_close(oracle(), routed_model(**inputs).logits, atol=1e-4, rtol=0)
        calls = {
            "unrouted": lambda: model(**inputs),
            "routed": lambda: routed_model(**inputs),
            "oracle": oracle,
        }
        clock = Clock(device)
        times = {name: [] for name in calls}
        turns = list(calls)

        def in_turn():
            for name in turns:
                times[name].append(clock.once(calls[name]))
            turns.append(turns.pop(0))

        benchmark.group = "prefill"
        benchmark.pedantic(in_turn, rounds=ROUNDS[visual_tokens], warmup_rounds=1)

    for values in times.values():
        del values[0]  # the warm-up
    medians = {name: Timing.of(values) for name, values in times.items()}
    benchmark.extra_info["visual_tokens"] = visual_tokens
    benchmark.extra_info["schedule"] = [[stage.layer, stage.keep] for stage in POLICY.schedule]
    benchmark.extra_info["milliseconds"] = {name: timing.milliseconds() for name, timing in medians.items()}
    benchmark.extra_info["unrouted_over_routed"] = medians["unrouted"].median / medians["routed"].median
    benchmark.extra_info["routed_over_oracle"] = medians["routed"].median / medians["oracle"].median
