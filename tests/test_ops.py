"""The registered operations: accepted and refused arguments, gradients, and behaviour under the compiler."""

import shutil
from functools import partial

import pytest
import torch

import reroute_kernels as rk

NAMES = [
    "rank_tokens",
    "select_tokens",
    "gather_tokens",
    "scatter_tokens_",
    "route_tokens",
    "scatter_norm_tokens_",
    "align_tokens_",
    "select_diverse",
    "select_dpp",
    "column_saliency",
    "merge_tokens",
]


@pytest.fixture(params=["ref", "triton"])
def backend(request):
    with rk.backend(request.param):
        yield request.param


@pytest.fixture
def arguments(device):
    """Arguments that each operation accepts, by name."""
    flags = torch.arange(20, device=device) % 3 == 0
    ranking = {
        "query": torch.randn(2, 1, 4, 16, device=device),
        "key": torch.randn(2, 20, 2, 16, device=device),
        "cos": torch.randn(2, 20, 8, device=device),
        "sin": torch.randn(2, 20, 8, device=device),
        "key_mask": (torch.arange(20, device=device) > 2).expand(2, 20),
        "query_index": torch.tensor([[19], [7]], device=device),
        "past_key": torch.randn(2, 7, 2, 16, device=device),
        "past_mask": (torch.arange(7, device=device) > 1).expand(2, 7),
    }
    selection = {
        "pool": ~flags.expand(2, 20),
        "pinned": flags.expand(2, 20),
        "keep": torch.tensor([3, 5], device=device),
        "length": 12,
    }
    tokens = {"features": torch.randn(2, 20, 16, device=device)}
    count = {"keep": 6, "lengths": torch.tensor([20, 4], device=device)}
    rows = [torch.randn(2, 20, 16, device=device), torch.arange(40, device=device).view(2, 20)]
    return {
        "rank_tokens": ranking,
        "select_tokens": {"scores": torch.randn(2, 20, device=device), **selection},
        "gather_tokens": {"index": torch.tensor([[0, 4, 19], [2, 3, -1]], device=device), "tensors": rows},
        "route_tokens": {**ranking, **selection, "tensors": rows},
        "scatter_tokens_": {
            "full": torch.randn(2, 20, 16, device=device),
            "index": torch.tensor([[0, 4, 19], [2, 3, -1]], device=device),
            "compact": torch.randn(2, 3, 16, device=device),
        },
        "align_tokens_": {
            "full": torch.randn(2, 20, 16, device=device),
            "index": torch.tensor([[0, 4, 19], [2, 3, -1]], device=device),
            "compact": torch.randn(2, 3, 16, device=device),
            "pool": (~flags).expand(2, 20),
        },
        "column_saliency": {
            "query": torch.randn(2, 20, 4, 16, device=device),
            "key": torch.randn(2, 20, 2, 16, device=device),
            "cu_seqlens": torch.tensor([0, 7, 20], device=device),
        },
        "merge_tokens": {
            "features": torch.randn(2, 20, 16, device=device),
            "assignment": torch.arange(-3, 37, device=device).view(2, 20) % 7,
            "groups": 5,
        },
        "scatter_norm_tokens_": {
            "full": torch.randn(2, 20, 16, device=device),
            "index": torch.tensor([[0, 4, 19], [2, 3, -1]], device=device),
            "compact": torch.randn(2, 3, 16, device=device),
            "weight": torch.randn(16, device=device),
            "eps": 1e-6,
            "one_plus": True,
        },
        "select_diverse": {**tokens, "weights": torch.rand(2, 20, device=device), **count},
        "select_dpp": {**tokens, "relevance": torch.rand(2, 20, device=device), **count},
    }


def call(operations, name, arguments):
    """Results as a tuple, on copies of the arguments."""

    def copied(value):
        if isinstance(value, list):
            return [copied(element) for element in value]
        return value.clone() if isinstance(value, torch.Tensor) else value

    arguments = {key: copied(value) for key, value in arguments.items()}
    operation = getattr(operations, name)
    if name == "gather_tokens":
        return operation(arguments["index"], *arguments["tensors"])
    result = operation(**arguments)
    if name == "route_tokens":
        index, compact = result
        return (index, *compact)
    if name == "merge_tokens":
        return result
    return (result, arguments["full"]) if name == "scatter_norm_tokens_" else (result,)


@pytest.mark.parametrize("name", NAMES)
def test_wrapper_equals_every_backend(arguments, backend, name):
    results = call(rk.ops, name, arguments[name])
    for module in (getattr(rk, backend), rk.ref):
        for actual, expected in zip(results, call(module, name, arguments[name]), strict=True):
            exact = name in ("select_tokens", "gather_tokens", "scatter_tokens_")
            torch.testing.assert_close(actual, expected, atol=0 if exact else 1e-5, rtol=0)


@pytest.mark.parametrize(
    ("option", "value"),
    [("scale", 0.9), ("query_reduction", "max"), ("head_reduction", "max"), ("rotary_style", "interleaved")],
)
def test_options_of_ranking(device, arguments, backend, option, value):
    values = arguments["rank_tokens"] | {"query": torch.randn(2, 2, 4, 16, device=device), "query_index": None}
    scores = rk.ops.rank_tokens(**values, **{option: value})
    torch.testing.assert_close(scores, rk.ref.rank_tokens(**values, **{option: value}), atol=1e-5, rtol=0)
    assert not torch.allclose(scores, rk.ops.rank_tokens(**values), atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_is_registered(name):
    assert getattr(torch.ops.reroute_kernels, name).default.namespace == "reroute_kernels"


def registered_arguments(name, arguments, optional):
    """As `torch.ops.reroute_kernels` takes them, which has no defaults."""
    values = arguments[name]
    if name == "column_saliency":
        query, key, cu_seqlens = values.values()
        return query, key, cu_seqlens if optional else None, 0.25, "sum" if optional else "mean"
    if name not in ("rank_tokens", "route_tokens"):
        return tuple(values.values())
    query, key, *rest = [values[each] for each in arguments["rank_tokens"]]
    selection = [values[each] for each in values if each not in arguments["rank_tokens"]]
    if not optional:
        return (
            query,
            key,
            *[None] * 6,
            0.25,
            "mean",
            "mean",
            "rotate_half",
            *selection[:4],
            *([[]] if selection else []),
        )
    rest[4] = rest[4].half()
    return (query.half(), key.half(), *rest, 0.25, "mean", "max", "interleaved", *selection)


@pytest.mark.parametrize("optional", [False, True], ids=["least-arguments", "all-arguments"])
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(arguments, backend, name, optional):
    operation = getattr(torch.ops.reroute_kernels, name).default
    torch.library.opcheck(operation, registered_arguments(name, arguments, optional))


def permuted(tensor):
    dims = tuple(reversed(range(tensor.ndim)))
    return tensor.permute(dims).contiguous().permute(dims)


def sliced(tensor):
    return torch.cat([tensor, tensor, tensor], dim=-1)[..., 1::3][..., : tensor.shape[-1]]


@pytest.mark.parametrize("view", [permuted, sliced])
@pytest.mark.parametrize("name", NAMES)
def test_opcheck_of_views(arguments, backend, name, view):
    def viewed(value):
        if isinstance(value, list):
            return [viewed(each) for each in value]
        return view(value) if isinstance(value, torch.Tensor) and value.ndim > 1 else value

    values = [viewed(value) for value in registered_arguments(name, arguments, optional=True)]
    assert not all(value.is_contiguous() for value in values if isinstance(value, torch.Tensor))
    torch.library.opcheck(getattr(torch.ops.reroute_kernels, name).default, tuple(values))


@pytest.mark.parametrize("name", ["select_tokens", "gather_tokens", "scatter_tokens_"])
@pytest.mark.parametrize("width", [0, 1])
def test_opcheck_of_few_columns(device, name, width):
    full, index = torch.randn(2, 4, 8, device=device), torch.zeros(2, width, dtype=torch.int64, device=device)
    flags = torch.ones(2, 4, dtype=torch.bool, device=device)
    keep = torch.ones(2, dtype=torch.int64, device=device)
    operation = getattr(torch.ops.reroute_kernels, name).default
    torch.library.opcheck(
        operation,
        {
            "select_tokens": (full[..., 0].contiguous(), flags, ~flags, keep, width),
            "gather_tokens": (index, [full, full[..., 0].contiguous()]),
            "scatter_tokens_": (full, index, torch.randn(2, width, 8, device=device)),
        }[name],
    )


@pytest.mark.parametrize("dynamic", [False, True], ids=["static-shapes", "dynamic-shapes"])
@pytest.mark.parametrize("name", NAMES)
def test_compiled_equals_eager(arguments, backend, name, dynamic):
    expected = call(rk.ops, name, arguments[name])
    torch.compiler.reset()
    compiled = torch.compile(
        lambda values: call(rk.ops, name, values), fullgraph=True, backend="aot_eager", dynamic=dynamic
    )
    for actual, eager in zip(compiled(arguments[name]), expected, strict=True):
        assert torch.equal(actual, eager)


@pytest.mark.skipif(shutil.which("g++") is None, reason="PyTorch's default compiler needs one of C++")
@pytest.mark.parametrize("name", NAMES)
def test_compiled_by_default_equals_eager(arguments, name):
    expected = call(rk.ops, name, arguments[name])
    torch.compiler.reset()
    compiled = torch.compile(lambda values: call(rk.ops, name, values), fullgraph=True)
    for actual, eager in zip(compiled(arguments[name]), expected, strict=True):
        assert torch.equal(actual, eager)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static-shapes", "dynamic-shapes"])
@pytest.mark.parametrize(
    "name", ["gather_tokens", "scatter_tokens_", "route_tokens", "scatter_norm_tokens_", "align_tokens_"]
)
def test_compiled_gradients_equal_eager(arguments, backend, name, dynamic):
    """In one graph, the backward pass included."""

    def gradients(function):
        values = {
            each: tuple(t.detach().requires_grad_(t.is_floating_point()) for t in value) if each == "tensors" else value
            for each, value in arguments[name].items()
        }
        inputs = [t for t in values.get("tensors", ()) if t.requires_grad]
        if name.startswith(("scatter", "align")):
            inputs = [values["full"].detach().requires_grad_(), values["compact"].detach().requires_grad_()]
            values |= {"full": inputs[0] * 1, "compact": inputs[1]}
        outputs = [t for t in function(values) if t.requires_grad]
        weighted = sum((output * torch.arange(output.numel()).view_as(output).to(output)).sum() for output in outputs)
        return torch.autograd.grad(weighted, inputs)

    expected = gradients(lambda values: call(rk.ops, name, values))
    torch.compiler.reset()
    compiled = torch.compile(
        lambda values: call(rk.ops, name, values), fullgraph=True, backend="aot_eager", dynamic=dynamic
    )
    for actual, eager in zip(gradients(compiled), expected, strict=True):
        assert torch.equal(actual, eager)


@pytest.mark.parametrize("keep", [4, [4, 4], (4, 4), torch.tensor([4, 4]), torch.tensor([4, 4], dtype=torch.int32)])
def test_keep_in_every_form(device, arguments, keep):
    values = arguments["select_tokens"]
    expected = rk.ref.select_tokens(**values | {"keep": torch.tensor([4, 4], device=device)})
    keep = keep.to(device) if isinstance(keep, torch.Tensor) else keep
    assert torch.equal(rk.ops.select_tokens(**values | {"keep": keep}), expected)


def test_keep_per_sample_as_a_list(arguments):
    values = arguments["select_tokens"]
    index = rk.ops.select_tokens(**values | {"keep": [3, 5]})
    assert torch.equal(index, rk.ops.select_tokens(**values))
    assert not torch.equal(index, rk.ops.select_tokens(**values | {"keep": [5, 3]}))


RANK, SELECT, GATHER, SCATTER, ROUTE, NORM, ALIGN, DIVERSE, DPP, SALIENCY, MERGE = NAMES
ones = partial(torch.ones, device="cuda" if torch.cuda.is_available() else "cpu")
REFUSED = [
    # operation, arguments in place of good ones, error, its message
    (RANK, {"query": [1.0]}, TypeError, ["query", "tensor", "list"]),
    (RANK, {"query": ones(2, 4, 16)}, ValueError, ["query", "(2, 4, 16)", "(B, Q, Hq, D)"]),
    (RANK, {"query": ones(2, 1, 4, 16).double()}, ValueError, ["query", "float64", "float32, float16 or bfloat16"]),
    (RANK, {"query": ones(2, 1, 3, 16)}, ValueError, ["query", "(2, 1, 3, 16)", "multiple of Hkv = 2"]),
    (RANK, {"query": ones(2, 0, 4, 16)}, ValueError, ["query", "(2, 0, 4, 16)", "above 0"]),
    (RANK, {"query": ones(2, 1, 4, 0), "key": ones(2, 20, 2, 0)}, ValueError, ["query", "(2, 1, 4, 0)", "above 0"]),
    (RANK, {"key": ones(2, 20, 0, 16)}, ValueError, ["query", "(2, 1, 4, 16)", "multiple of Hkv = 0"]),
    (RANK, {"key": None}, TypeError, ["key", "tensor", "NoneType"]),
    (RANK, {"key": ones(2, 20, 16)}, ValueError, ["key", "(2, 20, 16)", "(B, L, Hkv, D)"]),
    (RANK, {"key": ones(2, 20, 2, 16).half()}, ValueError, ["key", "float16", "float32"]),
    (RANK, {"key": ones(3, 20, 2, 16)}, ValueError, ["key", "(3, 20, 2, 16)", "B = 2"]),
    (RANK, {"key": ones(2, 20, 2, 8)}, ValueError, ["key", "(2, 20, 2, 8)", "D = 16"]),
    (RANK, {"key": ones(2, 20, 2, 16, device="meta")}, ValueError, ["key", "meta", "on "]),
    (RANK, {"cos": None}, ValueError, ["cos", "sin", "only one"]),
    (RANK, {"sin": None}, ValueError, ["cos", "sin", "only one"]),
    (RANK, {"cos": 1.0}, TypeError, ["cos", "tensor", "float"]),
    (RANK, {"cos": ones(20, 8)}, ValueError, ["cos", "(20, 8)", "(2 or 1, 20, R)"]),
    (RANK, {"cos": ones(3, 20, 8)}, ValueError, ["cos", "(3, 20, 8)", "(2 or 1, 20, R)"]),
    (RANK, {"cos": ones(2, 19, 8)}, ValueError, ["cos", "(2, 19, 8)", "(2 or 1, 20, R)"]),
    (RANK, {"cos": ones(2, 20, 7)}, ValueError, ["cos", "(2, 20, 7)", "R even"]),
    (RANK, {"cos": ones(2, 20, 18)}, ValueError, ["cos", "(2, 20, 18)", "at most 16"]),
    (RANK, {"cos": ones(2, 20, 0)}, ValueError, ["cos", "(2, 20, 0)", "even"]),
    (RANK, {"cos": ones(2, 20, 8).long()}, ValueError, ["cos", "int64", "float32, float16 or bfloat16"]),
    (RANK, {"cos": ones(2, 20, 8).double()}, ValueError, ["cos", "float64", "float32, float16 or bfloat16"]),
    (RANK, {"cos": ones(2, 20, 8, device="meta")}, ValueError, ["cos", "meta", "on "]),
    (RANK, {"sin": ones(1, 20, 8)}, ValueError, ["sin", "(1, 20, 8)", "(2, 20, 8), as cos is"]),
    (RANK, {"sin": ones(2, 20, 6)}, ValueError, ["sin", "(2, 20, 6)", "(2, 20, 8), as cos is"]),
    (RANK, {"sin": ones(2, 20, 8).bool()}, ValueError, ["sin", "bool", "float32, float16 or bfloat16"]),
    (RANK, {"key": ones(2, 20, 2, 16).to_sparse()}, ValueError, ["key", "sparse", "dense"]),
    (RANK, {"scale": "a"}, TypeError, ["scale", "'a'", "real number"]),
    (RANK, {"scale": 1j}, TypeError, ["scale", "1j", "real number"]),
    (RANK, {"scale": ones(2)}, TypeError, ["scale", "tensor", "real number"]),
    (RANK, {"key_mask": [True]}, TypeError, ["key_mask", "tensor", "list"]),
    (RANK, {"key_mask": ones(2, 20)}, ValueError, ["key_mask", "float32", "(2, 20) bool"]),
    (RANK, {"key_mask": ones(1, 20).bool()}, ValueError, ["key_mask", "(1, 20)", "(2, 20) bool"]),
    (RANK, {"key_mask": ones(2, 20, device="meta").bool()}, ValueError, ["key_mask", "meta", "(2, 20) bool"]),
    (RANK, {"query_index": 19}, TypeError, ["query_index", "tensor", "int"]),
    (RANK, {"query_index": ones(2, 2).long()}, ValueError, ["query_index", "(2, 2)", "(2, 1) int64"]),
    (RANK, {"query_index": ones(2, 1).int()}, ValueError, ["query_index", "int32", "(2, 1) int64"]),
    (RANK, {"query_index": ones(2, 1, device="meta").long()}, ValueError, ["query_index", "meta", "(2, 1) int64"]),
    (RANK, {"query": ones(2, 21, 4, 16), "query_index": None}, ValueError, ["query", "21", "at most L = 20"]),
    (RANK, {"past_key": 1}, TypeError, ["past_key", "tensor", "int"]),
    (RANK, {"past_key": ones(2, 7, 16)}, ValueError, ["past_key", "(2, 7, 16)", "(2, P, 2, 16)"]),
    (RANK, {"past_key": ones(1, 7, 2, 16)}, ValueError, ["past_key", "(1, 7, 2, 16)", "(2, P, 2, 16)"]),
    (RANK, {"past_key": ones(2, 2, 7, 16)}, ValueError, ["past_key", "(2, 2, 7, 16)", "(2, P, 2, 16)"]),
    (RANK, {"past_key": ones(2, 7, 2, 8)}, ValueError, ["past_key", "(2, 7, 2, 8)", "(2, P, 2, 16)"]),
    (RANK, {"past_key": ones(2, 7, 2, 16).half()}, ValueError, ["past_key", "float16", "as key is"]),
    (RANK, {"past_key": ones(2, 7, 2, 16, device="meta")}, ValueError, ["past_key", "meta", "as key is"]),
    (RANK, {"past_key": None}, ValueError, ["past_mask", "past_key", "alone"]),
    (RANK, {"past_mask": 1}, TypeError, ["past_mask", "tensor", "int"]),
    (RANK, {"past_mask": ones(2, 6).bool()}, ValueError, ["past_mask", "(2, 6)", "(2, 7) bool"]),
    (RANK, {"past_mask": ones(2, 7)}, ValueError, ["past_mask", "float32", "(2, 7) bool"]),
    (RANK, {"rotary_style": "neox"}, ValueError, ["rotary_style", "'neox'", "'rotate_half', 'interleaved'"]),
    (RANK, {"query_reduction": "sum"}, ValueError, ["query_reduction", "'sum'", "'mean', 'max'"]),
    (RANK, {"head_reduction": None}, ValueError, ["head_reduction", "None", "'mean', 'max'"]),
    (SELECT, {"scores": [0.5]}, TypeError, ["scores", "tensor", "list"]),
    (SELECT, {"scores": ones(20)}, ValueError, ["scores", "(20,)", "(B, L) float32"]),
    (SELECT, {"scores": ones(2, 20).half()}, ValueError, ["scores", "float16", "(B, L) float32"]),
    (SELECT, {"pool": None}, TypeError, ["pool", "tensor", "NoneType"]),
    (SELECT, {"pool": ones(2, 20)}, ValueError, ["pool", "float32", "(2, 20) bool"]),
    (SELECT, {"pool": ones(2, 19).bool()}, ValueError, ["pool", "(2, 19)", "(2, 20) bool"]),
    (SELECT, {"pinned": None}, TypeError, ["pinned", "tensor", "NoneType"]),
    (SELECT, {"pinned": ones(2, 20).long()}, ValueError, ["pinned", "int64", "(2, 20) bool"]),
    (SELECT, {"pinned": ones(1, 20).bool()}, ValueError, ["pinned", "(1, 20)", "(2, 20) bool"]),
    (SELECT, {"pinned": ones(2, 20, device="meta").bool()}, ValueError, ["pinned", "meta", "(2, 20) bool"]),
    (SELECT, {"keep": -1}, ValueError, ["keep", "-1", "0 or more"]),
    (SELECT, {"keep": [3, -1]}, ValueError, ["keep", "[3, -1]", "0 or more"]),
    (SELECT, {"keep": [3, 4, 5]}, ValueError, ["keep", "[3, 4, 5]", "2 of them"]),
    (SELECT, {"keep": [3, 0.5]}, TypeError, ["keep", "[3, 0.5]", "integer"]),
    (SELECT, {"keep": True}, TypeError, ["keep", "True", "integer"]),
    (SELECT, {"keep": 0.5}, TypeError, ["keep", "0.5", "integer"]),
    (SELECT, {"keep": {3: 1, 4: 1}}, TypeError, ["keep", "{3: 1, 4: 1}", "integer"]),
    (SELECT, {"keep": None}, TypeError, ["keep", "None", "integer"]),
    (SELECT, {"keep": ones(2)}, ValueError, ["keep", "float32", "(2,) int32 or int64"]),
    (SELECT, {"keep": ones(3).long()}, ValueError, ["keep", "(3,)", "(2,) int32 or int64"]),
    (SELECT, {"keep": ones(2, device="meta").long()}, ValueError, ["keep", "meta", "(2,) int32 or int64"]),
    (SELECT, {"length": -1}, ValueError, ["length", "-1", "0 or more"]),
    (SELECT, {"length": 2**63}, ValueError, ["length", "9223372036854775808", "below 2**63"]),
    (SELECT, {"length": 3.0}, TypeError, ["length", "3.0", "integer"]),
    (SELECT, {"length": True}, TypeError, ["length", "True", "integer"]),
    (SALIENCY, {"query": [1.0]}, TypeError, ["query", "tensor", "list"]),
    (SALIENCY, {"key": ones(2, 20, 3, 16)}, ValueError, ["query", "multiple", "3"]),
    (SALIENCY, {"cu_seqlens": [0, 20]}, TypeError, ["cu_seqlens", "tensor", "list"]),
    (SALIENCY, {"cu_seqlens": ones(3)}, ValueError, ["cu_seqlens", "int32 or int64", "torch.float32"]),
    (SALIENCY, {"scale": "small"}, TypeError, ["scale", "number", "'small'"]),
    (SALIENCY, {"query_reduction": "max"}, ValueError, ["query_reduction", "'mean', 'sum'", "'max'"]),
    (MERGE, {"features": None}, TypeError, ["features", "tensor", "NoneType"]),
    (MERGE, {"assignment": ones(2, 20)}, ValueError, ["assignment", "(2, 20) int64", "torch.float32"]),
    (MERGE, {"groups": 2.0}, TypeError, ["groups", "integer", "2.0"]),
    (MERGE, {"groups": True}, TypeError, ["groups", "integer", "True"]),
    (MERGE, {"groups": -1}, ValueError, ["groups", "0 or more", "-1"]),
    (GATHER, {"tensors": []}, ValueError, ["tensors", "at least one", "none"]),
    (GATHER, {"tensors": [None]}, TypeError, ["tensors[0]", "tensor", "NoneType"]),
    (GATHER, {"tensors": [ones(2, 20), 3]}, TypeError, ["tensors[1]", "tensor", "int"]),
    (GATHER, {"tensors": [ones(20)]}, ValueError, ["tensors[0]", "(20,)", "(B, L, ...)"]),
    (GATHER, {"tensors": [ones(3, 20)]}, ValueError, ["tensors[0]", "(3, 20)", "B = 2"]),
    (GATHER, {"tensors": [ones(2, 20), ones(2, 19)]}, ValueError, ["tensors[1]", "(2, 19)", "one L"]),
    (GATHER, {"tensors": [ones(2, 20).cfloat()]}, ValueError, ["tensors[0]", "complex64", "float32, float16"]),
    (GATHER, {"tensors": [ones(2, 20, device="meta")]}, ValueError, ["tensors[0]", "meta", "on "]),
    (GATHER, {"index": [[0]]}, TypeError, ["index", "tensor", "list"]),
    (GATHER, {"index": ones(2).long()}, ValueError, ["index", "(2,)", "(B, M) int64"]),
    (GATHER, {"index": ones(2, 3).int()}, ValueError, ["index", "int32", "(B, M) int64"]),
    (ROUTE, {"key": None}, TypeError, ["key", "tensor", "NoneType"]),
    (ROUTE, {"query": ones(2, 1, 3, 16)}, ValueError, ["query", "(2, 1, 3, 16)", "multiple of Hkv = 2"]),
    (ROUTE, {"past_key": ones(1, 7, 2, 16)}, ValueError, ["past_key", "(1, 7, 2, 16)", "(2, P, 2, 16)"]),
    (ROUTE, {"pool": ones(2, 19).bool()}, ValueError, ["pool", "(2, 19)", "(2, 20) bool"]),
    (ROUTE, {"pinned": ones(2, 20)}, ValueError, ["pinned", "float32", "(2, 20) bool"]),
    (ROUTE, {"keep": [3, -1]}, ValueError, ["keep", "[3, -1]", "0 or more"]),
    (ROUTE, {"length": -1}, ValueError, ["length", "-1", "0 or more"]),
    (ROUTE, {"tensors": ones(2, 20)}, TypeError, ["tensors", "sequence", "Tensor"]),
    (ROUTE, {"tensors": 3}, TypeError, ["tensors", "sequence", "int"]),
    (ROUTE, {"tensors": [None]}, TypeError, ["tensors[0]", "tensor", "NoneType"]),
    (ROUTE, {"tensors": [ones(2, 20), ones(2, 19)]}, ValueError, ["tensors[1]", "(2, 19)", "one L"]),
    (ROUTE, {"tensors": [ones(2, 19)]}, ValueError, ["tensors[0]", "(2, 19)", "one L"]),
    (ROUTE, {"tensors": [ones(2, 20).cfloat()]}, ValueError, ["tensors[0]", "complex64", "float32, float16"]),
    (SCATTER, {"full": None}, TypeError, ["full", "tensor", "NoneType"]),
    (SCATTER, {"full": ones(20)}, ValueError, ["full", "(20,)", "(B, L, ...)"]),
    (SCATTER, {"full": ones(2, 20, 16).cfloat()}, ValueError, ["full", "complex64", "float32, float16"]),
    (SCATTER, {"full": ones(1, 20, 16).expand(2, 20, 16)}, ValueError, ["full", "(0, 16, 1)", "expanded"]),
    (SCATTER, {"full": ones(2, 1, 16).expand(2, 20, 16)}, ValueError, ["full", "(16, 0, 1)", "expanded"]),
    (SCATTER, {"full": ones(2, 20, 1).expand(2, 20, 16)}, ValueError, ["full", "(20, 1, 0)", "expanded"]),
    (SCATTER, {"full": ones(2, 40).unfold(1, 16, 1)[:, :20]}, ValueError, ["full", "(40, 1, 1)", "unfolded"]),
    (
        SCATTER,
        {"full": torch.view_as_complex(ones(2, 20, 16, 2)).conj().imag},
        ValueError,
        ["full", "negated", "copy"],
    ),
    (SCATTER, {"index": 3}, TypeError, ["index", "tensor", "int"]),
    (SCATTER, {"index": ones(3, 3).long()}, ValueError, ["index", "(3, 3)", "(2, M) int64"]),
    (SCATTER, {"index": ones(2, 3)}, ValueError, ["index", "float32", "(2, M) int64"]),
    (SCATTER, {"index": ones(2, 3, device="meta").long()}, ValueError, ["index", "meta", "(2, M) int64"]),
    (SCATTER, {"compact": None}, TypeError, ["compact", "tensor", "NoneType"]),
    (SCATTER, {"compact": ones(2, 4, 16)}, ValueError, ["compact", "(2, 4, 16)", "(2, 3, 16) torch.float32"]),
    (SCATTER, {"compact": ones(2, 3, 1)}, ValueError, ["compact", "(2, 3, 1)", "(2, 3, 16) torch.float32"]),
    (SCATTER, {"compact": ones(2, 3, 16).half()}, ValueError, ["compact", "float16", "(2, 3, 16) torch.float32"]),
    (SCATTER, {"compact": ones(2, 3, 16, device="meta")}, ValueError, ["compact", "meta", "(2, 3, 16) torch.float32"]),
    (NORM, {"full": None}, TypeError, ["full", "tensor", "NoneType"]),
    (NORM, {"full": ones(2, 20)}, ValueError, ["full", "(2, 20)", "(B, L, d)"]),
    (NORM, {"full": ones(2, 20, 4, 4)}, ValueError, ["full", "(2, 20, 4, 4)", "(B, L, d)"]),
    (NORM, {"full": ones(2, 20, 16).double()}, ValueError, ["full", "float64", "float32, float16 or bfloat16"]),
    (NORM, {"full": ones(2, 20, 16).long()}, ValueError, ["full", "int64", "float32, float16 or bfloat16"]),
    (NORM, {"full": ones(1, 20, 16).expand(2, 20, 16)}, ValueError, ["full", "(0, 16, 1)", "expanded"]),
    (NORM, {"full": torch.view_as_complex(ones(2, 20, 16, 2)).conj().imag}, ValueError, ["full", "negated", "copy"]),
    (NORM, {"index": None}, ValueError, ["index", "compact", "only one"]),
    (NORM, {"index": 3}, TypeError, ["index", "tensor", "int"]),
    (NORM, {"index": ones(3, 3).long()}, ValueError, ["index", "(3, 3)", "(2, M) int64"]),
    (NORM, {"index": ones(2, 3)}, ValueError, ["index", "float32", "(2, M) int64"]),
    (NORM, {"compact": None}, ValueError, ["index", "compact", "only one"]),
    (NORM, {"compact": ones(2, 3, 16).half()}, ValueError, ["compact", "float16", "(2, 3, 16) torch.float32"]),
    (NORM, {"compact": ones(2, 4, 16)}, ValueError, ["compact", "(2, 4, 16)", "(2, 3, 16) torch.float32"]),
    (NORM, {"weight": None}, TypeError, ["weight", "tensor", "NoneType"]),
    (NORM, {"weight": ones(15)}, ValueError, ["weight", "(15,)", "(16,) torch.float32"]),
    (NORM, {"weight": ones(1, 16)}, ValueError, ["weight", "(1, 16)", "(16,) torch.float32"]),
    (NORM, {"weight": ones(16).bfloat16()}, ValueError, ["weight", "bfloat16", "as full is"]),
    (NORM, {"weight": ones(16, device="meta")}, ValueError, ["weight", "meta", "as full is"]),
    (NORM, {"eps": None}, TypeError, ["eps", "None", "real number"]),
    (NORM, {"eps": ones(1)}, TypeError, ["eps", "tensor", "real number"]),
    (ALIGN, {"full": None}, TypeError, ["full", "tensor", "NoneType"]),
    (ALIGN, {"full": ones(2, 20)}, ValueError, ["full", "(2, 20)", "(B, L, d)"]),
    (ALIGN, {"full": ones(2, 20, 16).long()}, ValueError, ["full", "int64", "float32, float16 or bfloat16"]),
    (ALIGN, {"full": ones(1, 20, 16).expand(2, 20, 16)}, ValueError, ["full", "(0, 16, 1)", "expanded"]),
    (ALIGN, {"full": torch.view_as_complex(ones(2, 20, 16, 2)).conj().imag}, ValueError, ["full", "negated", "copy"]),
    (ALIGN, {"index": ones(2, 3)}, ValueError, ["index", "float32", "(2, M) int64"]),
    (ALIGN, {"compact": ones(2, 4, 16)}, ValueError, ["compact", "(2, 4, 16)", "(2, 3, 16) torch.float32"]),
    (ALIGN, {"pool": None}, TypeError, ["pool", "tensor", "NoneType"]),
    (ALIGN, {"pool": ones(2, 20)}, ValueError, ["pool", "float32", "(2, 20) bool"]),
    (ALIGN, {"pool": ones(1, 20).bool()}, ValueError, ["pool", "(1, 20)", "(2, 20) bool"]),
]


@pytest.mark.parametrize(
    ("name", "changes", "error", "said"),
    [pytest.param(*case, id=f"{case[0]}-{'-'.join(case[3][:2])}") for case in REFUSED],
)
def test_refuses_and_says_why(arguments, name, changes, error, said):
    values = arguments[name] | changes
    operation = getattr(rk.ops, name)
    with pytest.raises(error) as refusal:
        operation(values["index"], *values["tensors"]) if name == GATHER else operation(**values)
    message = str(refusal.value)
    assert message.startswith(said[0])
    assert all(part in message for part in said), message


def test_counts_beyond_any_pool(device, backend):
    scores = torch.randn(2, 20, device=device)
    flags = torch.ones(2, 20, dtype=torch.bool, device=device)
    index = rk.ops.select_tokens(scores, flags, ~flags, [2**70, 2**40], 20)
    assert torch.equal(index, torch.arange(20, device=device).expand(2, 20))


def test_scatter_tells_autograd_that_it_wrote(device, backend):
    weight = torch.randn(1, 4, 3, device=device, requires_grad=True)
    full = torch.randn(1, 4, 3, device=device)
    product = (full * weight).sum()
    rk.ops.scatter_tokens_(full, torch.tensor([[0, 1]], device=device), torch.zeros(1, 2, 3, device=device))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_scatter_into_an_inference_tensor(device, backend):
    index, compact = torch.tensor([[0]], device=device), torch.ones(1, 1, 2, device=device)
    with torch.inference_mode():
        full = torch.zeros(1, 4, 2, device=device)
        rk.ops.scatter_tokens_(full, index, compact)
    assert full[0, 0, 0] == 1
    with pytest.raises(RuntimeError, match="inference"):
        rk.ops.scatter_tokens_(full, index, compact)


def test_refusals_leave_full_untouched(device):
    full = torch.zeros(1, 20, 16, device=device)
    index = torch.tensor([[0, 1]], device=device)
    with pytest.raises(ValueError, match="compact"):
        rk.ops.scatter_tokens_(full, index, torch.ones(1, 3, 16, device=device))
    assert (full == 0).all()


def test_accepts_its_own_defaults(arguments):
    values = arguments["rank_tokens"]
    scores = rk.ops.rank_tokens(values["query"], values["key"])
    explicit = rk.ops.rank_tokens(
        values["query"],
        values["key"],
        None,
        None,
        torch.ones_like(values["key_mask"]),
        torch.full_like(values["query_index"], 19),
        scale=0.25,
        query_reduction="mean",
        head_reduction="mean",
    )
    torch.testing.assert_close(scores, explicit, atol=1e-7, rtol=0)


@pytest.fixture
def doubles(device):
    generator = torch.Generator().manual_seed(1)

    def make(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device).requires_grad_()

    return make


INDEX = [[0, 3, 4], [2, -1, 5]]


def test_gather_gradient(device, doubles, backend):
    index = torch.tensor(INDEX, device=device)

    def gather(*tensors):
        return rk.ops.gather_tokens(index, *tensors)

    assert torch.autograd.gradcheck(gather, (doubles(2, 5, 3), doubles(2, 5), doubles(2, 5, 2, 2)))
    assert torch.autograd.gradgradcheck(gather, (doubles(2, 5, 3),))


def test_scatter_gradient(device, doubles, backend):
    index = torch.tensor(INDEX, device=device)

    def scatter(full, compact):
        return rk.ops.scatter_tokens_(full.clone(), index, compact)

    def scatter_into_part(full, compact):
        whole = full.clone()
        rk.ops.scatter_tokens_(whole[:, 1:], index, compact)
        return whole

    assert torch.autograd.gradcheck(scatter, (doubles(2, 5, 3), doubles(2, 3, 3)))
    assert torch.autograd.gradgradcheck(scatter, (doubles(2, 5, 2), doubles(2, 3, 2)))
    assert torch.autograd.gradcheck(scatter, (doubles(2, 5, 3), doubles(2, 3, 3).detach()))
    assert torch.autograd.gradcheck(scatter, (doubles(2, 5, 3).detach(), doubles(2, 3, 3)))
    assert torch.autograd.gradcheck(scatter_into_part, (doubles(2, 6, 3), doubles(2, 3, 3)))


def test_forward_mode(device, doubles, backend):
    """Dual tensors, against finite differences; a tangent that vanished would be 0."""
    index = torch.tensor(INDEX, device=device)

    def scatter(full, compact):
        return rk.ops.scatter_tokens_(full.clone(), index, compact)

    check = partial(torch.autograd.gradcheck, check_forward_ad=True, check_backward_ad=False)
    assert check(lambda *tensors: rk.ops.gather_tokens(index, *tensors), (doubles(2, 5, 3), doubles(2, 5, 2, 2)))
    assert check(scatter, (doubles(2, 5, 3), doubles(2, 3, 3)))
    assert check(scatter, (doubles(2, 5, 3), doubles(2, 3, 3).detach()))
    assert check(scatter, (doubles(2, 5, 3).detach(), doubles(2, 3, 3)))


TRANSFORMS = {
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),))[1],
    "linearize": lambda f, x: torch.func.linearize(f, x)[1](torch.ones_like(x)),
    "vjp": lambda f, x: torch.func.vjp(f, x)[1](torch.ones_like(f(x)))[0],
    "grad": lambda f, x: torch.func.grad(lambda x: (f(x) ** 3).sum())(x),
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "hessian": lambda f, x: torch.func.hessian(lambda x: (f(x) ** 3).sum())(x),
}


@pytest.mark.filterwarnings("ignore::UserWarning:torch")
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", ["gather", "scatter", "scatter into a constant", "route"])
def test_transforms(device, doubles, arguments, backend, transform, name):
    """Each gives the same as for the function in PyTorch's own operators."""
    index = torch.tensor(INDEX, device=device)
    sample = torch.tensor([[0], [1]], device=device)
    real = (index >= 0) & (index < 5)
    route = {key: value for key, value in arguments["route_tokens"].items() if key != "tensors"}

    def written(x):
        rows = torch.zeros(2, 7, 3, dtype=x.dtype, device=device)  # two rows, cut off, take places of no token
        whole = torch.cat([x[:, :5], rows[:, :2]], dim=1)
        return whole.index_put((sample, torch.where(real, index, 6)), x[:, :3] * 2)[:, :5]

    calls = {
        "gather": (
            lambda x: rk.ops.gather_tokens(index, x)[0],
            lambda x: x[sample, index.clamp(0, 4)] * real[:, :, None],
        ),
        "scatter": (lambda x: rk.ops.scatter_tokens_(x[:, :5].clone(), index, x[:, :3] * 2), written),
        "scatter into a constant": (
            lambda x: rk.ops.scatter_tokens_(torch.zeros_like(x), index, x[:, :3]),
            lambda x: (
                written(torch.cat([x[:, :3] / 2, x[:, 3:] * 0], dim=1))
                * real.any(dim=1)[:, None, None]
                * torch.zeros(2, 5, device=device).index_put((sample, index.clamp(0, 4)), real.float())[:, :, None]
            ),
        ),
        "route": (
            lambda x: rk.ops.route_tokens(**route, tensors=(x.repeat(1, 4, 1),))[1][0],
            lambda x: x.repeat(1, 4, 1)[sample, chosen.clamp(min=0)] * (chosen >= 0)[:, :, None],
        ),
    }
    chosen = rk.ops.route_tokens(**route)[0]
    function, expected = calls[name]
    x = doubles(2, 5, 3).detach()
    actual, wanted = (TRANSFORMS[transform](each, x) for each in (function, expected))
    assert wanted.abs().sum() > 0
    torch.testing.assert_close(actual, wanted, atol=1e-12, rtol=0)


def test_gather_and_scatter_are_each_others_gradient(device, doubles, backend):
    index = torch.tensor(INDEX, device=device)
    full, compact = doubles(2, 5, 3), doubles(2, 3, 3)
    full_gradient, compact_gradient = torch.randn_like(full), torch.randn_like(compact)

    (gathered,) = rk.ops.gather_tokens(index, full)
    (gradient,) = torch.autograd.grad(gathered, full, compact_gradient)
    assert torch.equal(gradient, rk.ref.scatter_tokens_(torch.zeros_like(full), index, compact_gradient))

    scattered = rk.ops.scatter_tokens_(full.clone(), index, compact)
    gradients = torch.autograd.grad(scattered, (full, compact), full_gradient)
    zeros = torch.zeros_like(compact)
    assert torch.equal(gradients[0], rk.ref.scatter_tokens_(full_gradient.clone(), index, zeros))
    assert torch.equal(gradients[1], rk.ref.gather_tokens(index, full_gradient)[0])


def test_gradient_through_an_expanded_gradient(device, doubles, backend):
    """`sum` hands back a gradient whose elements share memory."""
    index = torch.tensor(INDEX, device=device)
    full, compact = doubles(2, 5, 3), doubles(2, 3, 3)
    rk.ops.scatter_tokens_(full.clone(), index, compact).sum().backward()
    assert torch.equal(compact.grad, (index[:, :, None] % 6 < 5).double().expand(2, 3, 3))
    assert full.grad.sum() == 3 * (10 - 4)
    full.grad = None
    rk.ops.gather_tokens(index, full)[0].sum().backward()
    assert full.grad.sum() == 3 * 4


def test_gradient_past_tensors_without_one(device, doubles):
    """Positions travel with the hidden states, and have no gradient."""
    index = torch.tensor(INDEX, device=device)
    hidden, fixed = doubles(2, 5, 3), torch.randn(2, 5, 4, device=device)
    positions = torch.arange(5, device=device).expand(2, 5)
    compact_hidden, compact_fixed, compact_positions = rk.ops.gather_tokens(index, hidden, fixed, positions)
    assert compact_hidden.requires_grad
    assert not compact_positions.requires_grad
    torch.autograd.backward(compact_hidden.sum() + compact_fixed.sum())
    assert hidden.grad.sum() == 3 * 4


def test_only_gather_and_scatter_have_gradients(arguments):
    values = arguments["rank_tokens"]
    values |= {name: values[name].requires_grad_() for name in ("query", "key", "cos", "sin")}
    assert not rk.ops.rank_tokens(**values).requires_grad
    values = arguments["select_tokens"]
    values["scores"].requires_grad_()
    assert not rk.ops.select_tokens(**values).requires_grad


def test_no_gradient_where_none_is_wanted(device, doubles):
    index = torch.tensor(INDEX, device=device)
    full, compact = doubles(2, 5, 3), doubles(2, 3, 3)
    with torch.no_grad():
        assert not rk.ops.gather_tokens(index, full)[0].requires_grad
        assert rk.ops.scatter_tokens_(full, index, compact) is full
    with torch.inference_mode():
        assert not rk.ops.gather_tokens(index, full)[0].requires_grad


def test_scatter_into_a_leaf_that_needs_its_gradient_is_refused(device, doubles):
    with pytest.raises(RuntimeError, match="leaf"):
        rk.ops.scatter_tokens_(doubles(2, 5, 3), torch.tensor(INDEX, device=device), doubles(2, 3, 3))


@pytest.mark.parametrize("module", [rk.ops, rk.ref, rk.triton], ids=["ops", "ref", "triton"])
def test_scores_are_float32_under_autocast(arguments, device, module):
    expected = module.rank_tokens(**arguments["rank_tokens"])
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert torch.equal(module.rank_tokens(**arguments["rank_tokens"]), expected)


def test_lazily_negated_views_are_read_as_they_are(device, operations):
    """Their memory holds the other sign."""
    values = torch.view_as_complex(torch.randn(2, 20, 16, 2, device=device)).conj().imag
    assert values.is_neg()
    index = torch.tensor([[0, 4, 19], [2, 3, -1]], device=device)
    (compact,) = operations.gather_tokens(index, values)
    assert torch.equal(compact, rk.ref.gather_tokens(index, values.resolve_neg())[0])
    full = torch.zeros(2, 20, 16, device=device)
    operations.scatter_tokens_(full, index, values[:, :3])
    assert torch.equal(full, rk.ref.scatter_tokens_(torch.zeros_like(full), index, values[:, :3].resolve_neg()))
    scores, flags = values[..., 0], torch.ones(2, 20, dtype=torch.bool, device=device)
    selection = {"pool": flags, "pinned": ~flags, "keep": torch.tensor([3, 4], device=device), "length": 4}
    expected = rk.ref.select_tokens(scores.resolve_neg(), **selection)
    assert torch.equal(operations.select_tokens(scores, **selection), expected)
    query, key = values[:, None, :2], torch.randn(2, 20, 2, 16, device=device)
    scores = operations.rank_tokens(query, key)
    torch.testing.assert_close(scores, rk.ref.rank_tokens(query.resolve_neg(), key), atol=1e-5, rtol=0)
