"""Tests that need a device: CUDA graphs, streams, and a device that is not the current one."""

import pytest
import torch

import reroute_kernels as rk
from tests.test_rank import assert_scores_equal
from tests.test_route import assert_same, decision

pytestmark = pytest.mark.gpu


def capture(call):
    """The call as a graph, with its results."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph, result


def refill(arguments, fresh):
    """Write other data into the tensors of a decision."""
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor):
            value.copy_(fresh[name])
    for tensor, other in zip(arguments["tensors"], fresh["tensors"], strict=True):
        tensor.copy_(other)


def owned(arguments):
    """The arguments with memory of their own, so that they can be written to."""
    copied = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}
    return copied | {"tensors": tuple(tensor.clone() for tensor in arguments["tensors"])}


@pytest.mark.parametrize("length", [640, 5000, 66_000])
@pytest.mark.parametrize("padded", [False, True], ids=["no-mask", "padding"])
def test_a_decision_in_a_graph_follows_its_data(device, length, padded):
    arguments = owned(decision(device, 2, length, padded=padded))
    full = torch.zeros_like(arguments["tensors"][0])

    def decide():
        index, compact = rk.ops.route_tokens(**arguments)
        return index, compact, rk.ops.scatter_tokens_(full, index, compact[0])

    graph, (index, compact, _) = capture(decide)
    for _ in range(3):
        refill(arguments, decision(device, 2, length, padded=padded))
        full.zero_()
        graph.replay()
        expected = rk.triton.route_tokens(**arguments)
        assert_same((index, compact), expected)
        assert torch.equal(full, rk.ref.scatter_tokens_(torch.zeros_like(full), expected[0], expected[1][0]))


@pytest.mark.parametrize("name", ["rank_tokens", "select_tokens", "gather_tokens"])
def test_single_operations_in_a_graph(device, name):
    arguments = owned(decision(device, 2, 640))
    scores = torch.rand(2, 640, device=device)
    index = torch.arange(0, 600, 3, device=device).expand(2, -1).contiguous()

    def call(operations):
        if name == "rank_tokens":
            return operations.rank_tokens(arguments["query"], arguments["key"], arguments["cos"], arguments["sin"])
        if name == "select_tokens":
            chosen = (arguments[each] for each in ("pool", "pinned", "keep", "length"))
            return operations.select_tokens(scores, *chosen)
        return operations.gather_tokens(index, *arguments["tensors"])[0]

    graph, result = capture(lambda: call(rk.ops))
    refill(arguments, decision(device, 2, 640))
    scores.uniform_()
    index.add_(2)
    graph.replay()
    if name == "rank_tokens":
        assert_scores_equal(result, call(rk.ref))
    else:
        assert torch.equal(result, call(rk.ref))


def test_memory_of_a_long_decision(device):
    """Logits, a few times the scores, and the results; nothing grows with the square of the sequence."""
    arguments = decision(device, 1, 131072, 1, 28, 4, 64)
    rk.triton.route_tokens(**arguments)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    rk.triton.route_tokens(**arguments)
    used = torch.cuda.max_memory_allocated(device) - before
    assert used <= 131072 * 4 * (28 + 4) + 2**22


def test_two_streams_at_once(device):
    cases = [decision(device, 2, length) for length in (640, 1500)]
    expected = [rk.triton.route_tokens(**case) for case in cases]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in cases]
    results = [[] for _ in cases]
    for _ in range(20):
        for case, stream, found in zip(cases, streams, results, strict=True):
            with torch.cuda.stream(stream):
                found.append(rk.triton.route_tokens(**case))
    torch.cuda.synchronize()
    for found, wanted in zip(results, expected, strict=True):
        for result in found:
            assert_same(result, wanted)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_a_device_that_is_not_the_current_one():
    other = torch.device("cuda", 1)
    with torch.cuda.device(0):
        arguments = decision(other, 2, 640)
        full = torch.zeros(2, 640, 12, device=other)
        index, compact = rk.ops.route_tokens(**arguments)
        rk.ops.scatter_tokens_(full, index, compact[0])
        assert torch.cuda.current_device() == 0
    assert index.device == full.device == other
    assert_same((index, compact), rk.ref.route_tokens(**arguments))


def test_the_same_bits_in_every_run(device):
    arguments = decision(device, 8, 4096)
    first = rk.triton.route_tokens(**arguments)
    for _ in range(20):
        assert_same(rk.triton.route_tokens(**arguments), first)


@pytest.mark.parametrize("length", [640, 1500, 2048, 16384])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_fused_decision_equals_the_single_operations(device, length, dtype):
    """On shapes of real models: the interpreter sums in one order only."""
    arguments = decision(device, 2, length, 1, 28, 4, 128)
    for name in ("query", "key", "cos", "sin"):
        arguments[name] = arguments[name].to(dtype)
    index, _compact = rk.triton.route_tokens(**arguments)
    scores = rk.triton.rank_tokens(*(arguments[name] for name in ("query", "key", "cos", "sin")))
    assert_scores_equal(scores, rk.ref.rank_tokens(*(arguments[name] for name in ("query", "key", "cos", "sin"))))
    alone = rk.triton.select_tokens(scores, *(arguments[name] for name in ("pool", "pinned", "keep", "length")))
    assert torch.equal(index, alone)


@pytest.mark.parametrize(
    ("batch", "length", "heads", "kv_heads", "head_dim"),
    [(1, 131072, 28, 4, 128), (64, 2048, 28, 4, 128), (1, 1000, 128, 1, 64), (2, 640, 128, 128, 256)],
)
def test_scale(device, batch, length, heads, kv_heads, head_dim):
    arguments = decision(device, batch, length, 1, heads, kv_heads, head_dim)
    for name in ("query", "key", "cos", "sin"):
        arguments[name] = arguments[name].bfloat16()
    index, compact = rk.triton.route_tokens(**arguments)
    scores = rk.triton.rank_tokens(*(arguments[name] for name in ("query", "key", "cos", "sin")))
    assert_scores_equal(scores, rk.ref.rank_tokens(*(arguments[name] for name in ("query", "key", "cos", "sin"))))
    selection = (arguments[name] for name in ("pool", "pinned", "keep", "length"))
    assert torch.equal(index, rk.ref.select_tokens(scores, *selection))
    for actual, expected in zip(compact, rk.ref.gather_tokens(index, *arguments["tensors"]), strict=True):
        assert torch.equal(actual, expected)
