"""Greedy selections at the sizes of their papers: a loop of torch calls, the reference, and Triton on a GPU."""

import pytest
import torch

import reroute_kernels as rk
from bench.speed.conftest import HAS_GPU
from bench.speed.greedy import SHAPES, same_picks

BACKENDS = ("eager", "ref", "triton") if HAS_GPU else ("eager", "ref")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def bench_greedy(benchmark, shape, backend, device, dtype):
    benchmark.group = f"{shape.operation}, {shape.name}"
    benchmark.extra_info.update(**vars(shape), backend=backend)
    calls = shape.calls(device, dtype)
    call = calls["eager" if backend == "eager" else "operation"]
    with rk.backend(None if backend == "eager" else backend):
        # Of picks that rounding decides between, each way may take another.
        assert same_picks(call(), calls["eager"]()) > 0.95
        wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None

        def run():
            call()
            wait()

        benchmark.pedantic(run, rounds=7, warmup_rounds=1)
