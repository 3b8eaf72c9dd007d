"""Each operation on the shapes of two 7B models: plain eager code, the reference, and Triton if there is a GPU."""

from functools import partial
from itertools import pairwise

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


def tower(device, dtype, tokens, heads, head_dim, blocks=1):
    """Queries, keys and bounds of a layer of a vision tower."""
    query, key = (torch.randn(1, tokens, heads, head_dim, device=device, dtype=dtype) for _ in range(2))
    return query, key, torch.linspace(0, tokens, blocks + 1, device=device).long()


def eager_saliency(query, key, bounds):
    """The whole matrix of every block."""
    received = []
    for start, end in pairwise(bounds.tolist()):
        queries, keys = (states[0, start:end].transpose(0, 1) for states in (query, key))
        weights = (queries @ keys.transpose(1, 2) * query.shape[-1] ** -0.5).float().softmax(dim=-1)
        received.append(weights.mean(dim=(0, 1)))
    return torch.cat(received)[None]


def eager_merge(features, assignment, groups):
    """Group by group."""
    counts = [[int((row == group).sum()) for group in range(groups)] for row in assignment]
    means = [
        torch.stack([rows[row == group].float().mean(dim=0) for group in range(groups)])
        for rows, row in zip(features, assignment, strict=True)
    ]
    return torch.stack(means).to(features.dtype), torch.tensor(counts, device=features.device)


TOWERS = {
    "CLIP, 577 patches": (577, 16, 64),
    "Qwen2.5-VL, 4 frames of 1024 patches": (4096, 16, 80, 4),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape_name", TOWERS, scope="function")
def bench_saliency(benchmark, shape_name, backend, device, dtype):
    given = tower(device, dtype, *TOWERS[shape_name])
    call = partial(eager_saliency if backend == "eager" else rk.ops.column_saliency, *given)
    run_call(benchmark, "column_saliency", shape_name, backend, call, rk.ref.column_saliency(*given))


@pytest.mark.parametrize("backend", BACKENDS)
def bench_merge(benchmark, backend, device, dtype):
    features = torch.randn(32, 196, 3584, device=device, dtype=dtype)
    given = features, torch.arange(196, device=device).repeat(32, 1) % 18, 18
    call = partial(eager_merge if backend == "eager" else rk.ops.merge_tokens, *given)
    run_call(benchmark, "merge_tokens", "32 frames of 196, 18 groups", backend, call, rk.ref.merge_tokens(*given))


def run_call(benchmark, operation, shape, backend, call, expected):
    benchmark.group = f"{operation}, {shape}"
    benchmark.extra_info.update(operation=operation, shape=shape, backend=backend)
    with rk.backend(None if backend == "eager" else backend):
        tolerance = 1e-5 if flat(expected)[0].dtype == torch.float32 else 1e-2
        torch.testing.assert_close(flat(call()), flat(expected), atol=tolerance, rtol=tolerance)
        wait = torch.cuda.synchronize if flat(expected)[0].is_cuda else lambda: None
        benchmark(lambda: (call(), wait()))
