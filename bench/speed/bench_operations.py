"""Each operation on the shapes of two 7B models: plain eager code, the reference, and Triton if there is a GPU."""

import pytest
import torch

import reroute_kernels as rk
from bench.speed.conftest import HAS_GPU
from bench.speed.decisions import TEXT, Decision, Shape

BACKENDS = ("eager", "ref", "triton") if HAS_GPU else ("eager", "ref")
OPERATIONS = ("rank_tokens", "select_tokens", "gather_tokens", "scatter_tokens_", "route_tokens")
SHAPES = {
    "llava-1.5-7b": Shape("LLaVA-1.5-7B", 32, 32, 128, 4096, 576 + TEXT),
    "qwen2.5-vl-7b": Shape("Qwen2.5-VL-7B", 28, 4, 128, 3584, 576 + TEXT),
    "qwen2.5-vl-7b, 2048 visual tokens": Shape("Qwen2.5-VL-7B", 28, 4, 128, 3584, 2048 + TEXT),
}


@pytest.fixture(params=SHAPES, scope="module")
def shape_name(request):
    return request.param


@pytest.fixture(scope="module")
def decision(shape_name, device, dtype):
    torch.manual_seed(0)
    with torch.no_grad():
        return Decision(SHAPES[shape_name], 1, device, dtype)


def flat(result):
    """The tensors of a result, however they are nested."""
    if isinstance(result, torch.Tensor):
        return [result]
    return [tensor for part in result for tensor in flat(part)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("operation", OPERATIONS)
def bench_operation(benchmark, decision, shape_name, operation, backend, device):
    benchmark.group = f"{operation}, {shape_name}"
    benchmark.extra_info.update(operation=operation, shape=shape_name, backend=backend)
    call = (decision.eager_calls() if backend == "eager" else decision.calls())[operation]
    with rk.backend("ref"):
        expected = flat(decision.calls()[operation]())
    with rk.backend(None if backend == "eager" else backend):
        result = flat(call())
        if operation == "rank_tokens":
            # The eager code rotates in the precision of the model, the operations in float32.
            torch.testing.assert_close(result, expected, atol=1e-5 if device.type == "cpu" else 1e-2, rtol=0)
        elif operation == "route_tokens" and device.type != "cpu":
            assert [tensor.shape for tensor in result] == [tensor.shape for tensor in expected]
        else:
            assert all(map(torch.equal, result, expected))
        wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None

        def run():
            call()
            wait()

        benchmark(run)
