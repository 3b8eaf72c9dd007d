"""Each operation on the shapes of two 7B models: plain eager code, the reference, and Triton where there is a GPU."""

from dataclasses import dataclass
from functools import partial

import pytest
import torch

import reroute_kernels as rk
from bench import eager
from bench.conftest import HAS_GPU

TEXT = 64
BACKENDS = ("eager", "ref", "triton") if HAS_GPU else ("eager", "ref")


@dataclass
class Shape:
    """One sample: query heads, key heads, channels of a head, hidden size, visual tokens."""

    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    visual: int


SHAPES = {
    "llava-1.5-7b": Shape(32, 32, 128, 4096, 576),
    "qwen2.5-vl-7b": Shape(28, 4, 128, 3584, 576),
    "qwen2.5-vl-7b, 2048 visual tokens": Shape(28, 4, 128, 3584, 2048),
}


@pytest.fixture(params=SHAPES, scope="module")
def shape_name(request):
    return request.param


@pytest.fixture(scope="module")
def decision(shape_name, device, dtype):
    """Random tensors of one decision at keep 26%, and what the operations give for them."""
    torch.manual_seed(0)
    with torch.no_grad():
        return Decision(SHAPES[shape_name], device, dtype)


class Decision:
    def __init__(self, shape, device, dtype):
        length = shape.visual + TEXT
        self.length = length

        def random(*size):
            return torch.randn(1, length, *size, device=device, dtype=dtype)

        self.queries = random(shape.heads, shape.head_dim)
        self.key = random(shape.kv_heads, shape.head_dim)
        angles = torch.rand(1, length, shape.head_dim // 2, device=device).repeat(1, 1, 2) * 6
        self.cos, self.sin = angles.cos().to(dtype), angles.sin().to(dtype)
        self.hidden = random(shape.hidden)
        self.pinned = torch.ones(1, length, dtype=torch.bool, device=device)
        self.pinned[:, 16 : 16 + shape.visual] = False
        self.pool = ~self.pinned
        self.keep = int(shape.visual * 0.2644)
        self.keep_tensor = torch.tensor([self.keep], device=device)
        self.scores = rk.ref.rank_tokens(self.queries[:, -1:], self.key, self.cos, self.sin)
        self.index = rk.ref.select_tokens(self.scores, self.pool, self.pinned, self.keep_tensor, TEXT + self.keep)
        (self.compact,) = rk.ref.gather_tokens(self.index, self.hidden)

    def calls(self, operation, backend):
        """The operation as one call without arguments; it gives the same on every backend."""
        rows = (self.hidden, self.cos, self.sin)
        if backend == "eager":
            kept = self.index[0]
            arguments = {
                "rank_tokens": (self.queries, self.key, self.cos, self.sin),
                "select_tokens": (self.scores, self.pool, self.pinned, self.keep),
                "gather_tokens": (kept, *rows),
                "scatter_tokens_": (self.hidden, kept, self.compact),
            }
        else:
            arguments = {
                "rank_tokens": (self.queries[:, -1:], self.key, self.cos, self.sin),
                "select_tokens": (self.scores, self.pool, self.pinned, self.keep_tensor, TEXT + self.keep),
                "gather_tokens": (self.index, *rows),
                "scatter_tokens_": (self.hidden, self.index, self.compact),
            }
        function = getattr(eager if backend == "eager" else rk.ops, operation)
        return partial(function, *arguments[operation])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("operation", ["rank_tokens", "select_tokens", "gather_tokens", "scatter_tokens_"])
def bench_operation(benchmark, decision, shape_name, operation, backend, device):
    benchmark.group = f"{operation}, {shape_name}"
    benchmark.extra_info.update(operation=operation, shape=shape_name, backend=backend)
    call = decision.calls(operation, backend)
    with rk.backend("ref"):
        expected = decision.calls(operation, "ref")()
    with rk.backend(None if backend == "eager" else backend):
        result = call()
        if operation == "rank_tokens":
            # The eager code rotates in the precision of the model, the operations in float32.
            torch.testing.assert_close(result, expected, atol=1e-5 if device.type == "cpu" else 1e-2, rtol=0)
        else:
            assert all(map(torch.equal, result, expected))
        wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None

        def run():
            call()
            wait()

        benchmark(run)
