"""A whole decision against the operations that it stands for, one after the other."""

import pytest
import torch

import reroute_kernels as rk
from tests.conftest import LAYOUTS

# Under the interpreter NumPy warns of an infinity or a NaN, which a GPU computes in silence.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

RANKING = ("query", "key", "cos", "sin", "key_mask", "query_index", "past_key", "past_mask")
OPTIONS = ("scale", "query_reduction", "head_reduction", "rotary_style")

# batch, length, queries, heads, kv heads, head_dim, launches before the gather
SHAPES = {
    "one-token": (1, 1, 1, 1, 1, 16, 3),
    "length-63": (3, 63, 1, 4, 2, 16, 3),
    "length-200-nine-heads": (2, 200, 2, 9, 3, 24, 3),
    "length-1025": (1, 1025, 1, 2, 2, 16, 3),
    "sixty-four-heads": (1, 1025, 1, 64, 1, 8, 3),
    "length-4096": (1, 4096, 1, 1, 1, 4, 3),
    "length-4097": (2, 4097, 1, 1, 1, 4, 3),
    "length-65537": (1, 65_537, 1, 1, 1, 4, 7),
}


of_every_shape = pytest.mark.parametrize(
    ("batch", "length", "queries", "heads", "kv_heads", "head_dim", "launched"),
    [
        pytest.param(*shape, id=name, marks=pytest.mark.rest if name == "length-65537" else ())
        for name, shape in SHAPES.items()
    ],
)


def decision(device, batch, length, queries=1, heads=4, kv_heads=2, head_dim=16, *, padded=False, past=0):
    """Arguments of `route_tokens` at keep 1/4, or 50 tokens of a long sequence, for random tensors."""
    positions = torch.arange(length, device=device)
    pinned = (positions % max(5, length // 20) == 0).expand(batch, length)
    count = min(50, length // 4)
    valid = positions >= torch.arange(batch, device=device)[:, None] * (length // 8)
    arguments = {
        "query": 3 * torch.randn(batch, queries, heads, head_dim, device=device),
        "key": torch.randn(batch, length, kv_heads, head_dim, device=device),
        "cos": torch.randn(batch, length, head_dim, device=device),
        "sin": torch.randn(batch, length, head_dim, device=device),
        "key_mask": valid if padded else None,
        "query_index": torch.randint(length, (batch, queries), device=device) if padded else None,
        "past_key": torch.randn(batch, past, kv_heads, head_dim, device=device) if past else None,
        "past_mask": torch.rand(batch, past, device=device) < 0.5 if past else None,
        "pool": valid & ~pinned if padded else ~pinned,
        "pinned": valid & pinned if padded else pinned,
        "keep": torch.tensor([max(1, count - sample) for sample in range(batch)], device=device),
        "length": count + int(pinned[0].sum()),
        "tensors": (
            torch.randn(batch, length, 12, device=device),
            torch.randn(batch, length, 2, 3, device=device).half(),
            positions.expand(batch, length),
        ),
    }
    return arguments


def one_after_the_other(operations, arguments):
    ranking = {name: arguments[name] for name in (*RANKING, *OPTIONS) if name in arguments}
    scores = operations.rank_tokens(**ranking)
    index = operations.select_tokens(*(scores, *(arguments[name] for name in ("pool", "pinned", "keep", "length"))))
    return index, operations.gather_tokens(index, *arguments["tensors"])


def assert_same(actual, expected):
    assert torch.equal(actual[0], expected[0])
    assert len(actual[1]) == len(expected[1])
    for one, other in zip(actual[1], expected[1], strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


@pytest.mark.everyday(20)
@pytest.mark.parametrize("padded", [False, True], ids=["no-mask", "padding"])
@of_every_shape
def test_equals_the_single_operations(
    device, operations, launches, batch, length, queries, heads, kv_heads, head_dim, launched, padded
):
    arguments = decision(device, batch, length, queries, heads, kv_heads, head_dim, padded=padded)
    result = operations.route_tokens(**arguments)
    names = [name for name, _ in launches]
    assert_same(result, one_after_the_other(operations, arguments))
    assert isinstance(result[1], tuple)
    if operations is rk.triton:
        assert len(names) == launched + 1
        assert names[0] == "attention_logits"
        assert names[-1] == "copy_rows_to_compact"
        assert all(min(grid) > 0 for _, grid in launches)


@pytest.mark.parametrize("changes", [{}, {"scale": 0.0}], ids=["scores", "ties"])
@pytest.mark.parametrize(
    ("past", "rotary_style", "reduction"),
    [(0, "rotate_half", "max"), (1, "interleaved", "mean"), (90, "rotate_half", "mean")],
)
def test_options(device, operations, reduction, rotary_style, past, changes):
    arguments = decision(device, 2, 90, 2, padded=True, past=past)
    arguments |= {"query_reduction": reduction, "head_reduction": reduction, "rotary_style": rotary_style, **changes}
    assert_same(operations.route_tokens(**arguments), one_after_the_other(operations, arguments))
    assert_same(rk.triton.route_tokens(**arguments), rk.ref.route_tokens(**arguments))


@pytest.mark.parametrize("name", ["query", "key", "cos", "sin", "past_key", "pool", "pinned", "key_mask", "past_mask"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts(device, layout, name):
    arguments = decision(device, 3, 40, padded=True, past=9)
    arguments[name] = layout(arguments[name])
    dense = arguments | {name: arguments[name].clone(memory_format=torch.contiguous_format)}
    assert_same(rk.triton.route_tokens(**arguments), rk.ref.route_tokens(**dense))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts_of_what_is_compacted(device, layout):
    arguments = decision(device, 3, 70)
    arguments["tensors"] = [layout(tensor) for tensor in arguments["tensors"]]
    assert_same(rk.triton.route_tokens(**arguments), rk.ref.route_tokens(**arguments))


def test_nothing_to_compact(device, operations):
    arguments = decision(device, 2, 70)
    index, compact = operations.route_tokens(**arguments | {"tensors": ()})
    assert compact == ()
    assert torch.equal(index, one_after_the_other(rk.ref, arguments)[0])


@pytest.mark.everyday(8)
@of_every_shape
def test_scores_are_those_of_ranking_at_no_cost(
    device, operations, launches, batch, length, queries, heads, kv_heads, head_dim, launched
):
    arguments = decision(device, batch, length, queries, heads, kv_heads, head_dim)
    *result, scores = operations.route_tokens(**arguments, return_scores=True)
    if operations is rk.triton:
        assert len(launches) == launched + 1
    assert_same(result, operations.route_tokens(**arguments))
    ranking = {name: arguments[name] for name in RANKING}
    assert torch.equal(scores, operations.rank_tokens(**ranking))
    with rk.backend(operations.__name__.rpartition(".")[2]):
        assert torch.equal(rk.ops.route_tokens(**arguments, return_scores=True)[2], scores)


@pytest.mark.parametrize(("batch", "length", "width"), [(0, 5, 3), (2, 0, 3), (2, 5, 0)])
def test_scores_where_nothing_is_selected(device, operations, batch, length, width):
    query, key = torch.randn(batch, 1, 2, 16, device=device), torch.randn(batch, length, 2, 16, device=device)
    flags, index = torch.ones(batch, length, dtype=torch.bool, device=device), torch.zeros(batch, 1, device=device)
    selection = {"pool": flags, "pinned": ~flags, "keep": index[:, 0].long(), "length": width, "tensors": ()}
    *_, scores = operations.route_tokens(query, key, query_index=index.long(), **selection, return_scores=True)
    assert torch.equal(scores, operations.rank_tokens(query, key, query_index=index.long()))


@pytest.mark.parametrize(("batch", "length", "width"), [(0, 5, 3), (2, 0, 3), (2, 5, 0), (0, 0, 0)])
def test_empty(device, operations, launches, batch, length, width):
    flags = torch.ones(batch, length, dtype=torch.bool, device=device)
    index, (compact,) = operations.route_tokens(
        torch.ones(batch, 1, 2, 16, device=device),
        torch.ones(batch, length, 2, 16, device=device),
        query_index=torch.full((batch, 1), length - 1, device=device),
        pool=flags,
        pinned=~flags,
        keep=torch.full((batch,), width, device=device),
        length=width,
        tensors=[torch.ones(batch, length, 4, device=device)],
    )
    assert index.shape == (batch, width)
    assert compact.shape == (batch, width, 4)
    if length == 0:
        assert (index == -1).all()
        assert (compact == 0).all()
    assert all(min(grid) > 0 for _, grid in launches)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 0.0], ids=str)
def test_special_values(device, operations, value):
    arguments = decision(device, 2, 100)
    arguments["key"][0, 20:60] = value
    assert_same(operations.route_tokens(**arguments), one_after_the_other(operations, arguments))


def test_same_bits_twice_and_in_any_order(device):
    arguments = decision(device, 3, 140, padded=True)
    index, compact = rk.triton.route_tokens(**arguments)
    assert_same(rk.triton.route_tokens(**arguments), (index, compact))
    order = torch.tensor([2, 0, 1], device=device)
    shuffled = {name: value[order] if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}
    shuffled["tensors"] = [tensor[order] for tensor in arguments["tensors"]]
    assert_same(rk.triton.route_tokens(**shuffled), (index[order], [tensor[order] for tensor in compact]))


@pytest.mark.parametrize("backend", ["ref", "triton"])
def test_gradient(device, backend):
    arguments = decision(device, 2, 8)
    hidden = torch.randn(2, 8, 2, dtype=torch.float64, device=device, requires_grad=True)
    fixed = torch.randn(2, 8, 2, device=device)

    def compact(hidden):
        return rk.ops.route_tokens(**arguments | {"tensors": [hidden, fixed]})[1][0]

    with rk.backend(backend):
        assert torch.autograd.gradcheck(compact, (hidden,))
        arguments["query"].requires_grad_()
        index, (rows,) = rk.ops.route_tokens(**arguments | {"tensors": [hidden]})
        assert not index.requires_grad
        rows.sum().backward()
    assert arguments["query"].grad is None
    kept = torch.zeros(2, 9, device=device).scatter_(1, index.where(index >= 0, 8), 1.0)[:, :8]
    assert torch.equal(hidden.grad, kept.double()[:, :, None].expand(2, 8, 2))


def test_gradient_takes_no_more_launches(device, launches):
    arguments = decision(device, 2, 20)
    with rk.backend("triton"):
        rk.ops.route_tokens(**arguments)
        without = len(launches)
        launches.clear()
        arguments["tensors"][0].requires_grad_()
        rk.ops.route_tokens(**arguments)
    assert len(launches) == without == 4


def test_counts_in_every_form(device):
    arguments = decision(device, 2, 40)
    expected = rk.ops.route_tokens(**arguments | {"keep": torch.tensor([4, 4], device=device)})
    for keep in (4, [4, 4], torch.tensor([4, 4], dtype=torch.int32, device=device)):
        assert_same(rk.ops.route_tokens(**arguments | {"keep": keep}), expected)


def test_scores_are_float32_under_autocast(device):
    arguments = decision(device, 2, 40)
    expected = rk.ops.route_tokens(**arguments)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert_same(rk.ops.route_tokens(**arguments), expected)


def test_inputs_stay_as_they_were(device, operations):
    arguments = decision(device, 2, 70, padded=True, past=9)

    def tensors():
        return [value for value in (*arguments.values(), *arguments["tensors"]) if isinstance(value, torch.Tensor)]

    before = [tensor.clone() for tensor in tensors()]
    operations.route_tokens(**arguments)
    assert all(map(torch.equal, tensors(), before))
