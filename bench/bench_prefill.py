"""A routed prefill against the unrouted model and against the oracle, in turn and in one process."""

import copy
import statistics
import time

import pytest
import torch

import reroute_kernels as rk
from bench.prefill import POLICY, make_inputs, make_model, oracle

ROUNDS = {576: 25, 4096: 9}


@pytest.mark.parametrize("visual_tokens", ROUNDS)
def bench_prefill(benchmark, visual_tokens, device, dtype):
    model = make_model(visual_tokens, device, dtype)
    inputs = make_inputs(visual_tokens, device)
    routed_model = copy.deepcopy(model)
    with rk.apply(routed_model, POLICY) as routing:
        logits = routed_model(**inputs, use_cache=True).logits
        kept = [stage.selected[0].to(device) for stage in routing.trace.stages]
        text = (inputs["input_ids"][0] != model.config.image_token_id).nonzero().flatten()
        kept = [torch.cat([text, visual]).sort().values for visual in kept]
        torch.testing.assert_close(oracle(model, inputs["input_ids"], kept), logits, atol=1e-4, rtol=0)

        calls = {
            "unrouted": lambda: model(**inputs, use_cache=True),
            "routed": lambda: routed_model(**inputs, use_cache=True),
            "oracle": lambda: oracle(model, inputs["input_ids"], kept),
        }
        times = {name: [] for name in calls}
        turns = list(calls)
        wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None

        def in_turn():
            for name in turns:
                wait()
                start = time.perf_counter()
                calls[name]()
                wait()
                times[name].append(time.perf_counter() - start)
            turns.append(turns.pop(0))

        benchmark.group = "prefill"
        benchmark.pedantic(in_turn, rounds=ROUNDS[visual_tokens], warmup_rounds=1)

    for values in times.values():
        del values[0]  # the warm-up
    benchmark.extra_info["visual_tokens"] = visual_tokens
    benchmark.extra_info["schedule"] = [[stage.layer, stage.keep] for stage in POLICY.schedule]
    benchmark.extra_info["milliseconds"] = {name: summary(values) for name, values in times.items()}
    benchmark.extra_info["unrouted_over_routed"] = ratio(times["unrouted"], times["routed"])
    benchmark.extra_info["routed_over_oracle"] = ratio(times["routed"], times["oracle"])


def summary(seconds):
    deciles = statistics.quantiles(seconds, n=10)
    return {"median": statistics.median(seconds) * 1e3, "p20": deciles[1] * 1e3, "p80": deciles[7] * 1e3}


def ratio(numerator, denominator):
    """Ratio of the medians."""
    return statistics.median(numerator) / statistics.median(denominator)
