"""Column sums of an attention: both backends against whole matrices in float64."""

import math
from itertools import pairwise

import pytest
import torch

import reroute_kernels as rk

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

HALVES = [torch.float16, torch.bfloat16]


def by_matrices(query, key, cu_seqlens=None, scale=None, query_reduction="mean"):
    """The contract, block by block, with the matrix of every head."""
    length, group = key.shape[1], query.shape[2] // key.shape[2]
    key = key.double().repeat_interleave(group, dim=2)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    blocks = [(slice(0, query.shape[1]), slice(0, length))]
    if cu_seqlens is not None:
        blocks = [(slice(*block),) * 2 for block in pairwise(cu_seqlens.tolist()) if block[0] < block[1]]
    saliency = torch.zeros(key.shape[:2], dtype=torch.float64, device=key.device)
    for queries, keys in blocks:
        logits = torch.einsum("bqhd,bkhd->bhqk", query[:, queries].double(), key[:, keys]) * scale
        weights = logits.softmax(dim=-1).masked_fill(logits == -math.inf, 0.0).mean(dim=1)
        saliency[:, keys] = weights.mean(dim=1) if query_reduction == "mean" else weights.sum(dim=1)
    return saliency.float()


def check(operations, query, key, cu_seqlens=None, **options):
    actual = operations.column_saliency(query, key, cu_seqlens, **options)
    assert (actual.dtype, actual.shape) == (torch.float32, key.shape[:2])
    expected = by_matrices(query, key, cu_seqlens, **options)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-6, equal_nan=True)
    return actual


@pytest.fixture
def attention(random_tensor):
    """Makes queries and keys."""

    def make(batch=2, queries=40, length=40, heads=2, kv_heads=2, head_dim=16, dtype=torch.float32):
        query = 2 * random_tensor(batch, queries, heads, head_dim, dtype=dtype)
        return query, random_tensor(batch, length, kv_heads, head_dim, dtype=dtype)

    return make


@pytest.mark.parametrize(
    ("queries", "length", "heads", "kv_heads", "head_dim"),
    [(1, 1, 1, 1, 1), (1, 37, 2, 2, 16), (5, 33, 4, 2, 8), (40, 40, 3, 1, 40), (33, 3, 1, 1, 64), (32, 64, 1, 1, 80)],
)
@pytest.mark.parametrize("query_reduction", ["mean", "sum"])
def test_shapes(operations, attention, queries, length, heads, kv_heads, head_dim, query_reduction):
    given = attention(2, queries, length, heads, kv_heads, head_dim)
    received = check(operations, *given, query_reduction=query_reduction)
    # Keys receive as much as queries pay.
    total = torch.full_like(received[:, 0], 1.0 if query_reduction == "mean" else queries)
    torch.testing.assert_close(received.sum(dim=1), total)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("head_dim", [24, 64])
def test_halves(operations, attention, dtype, head_dim):
    check(operations, *attention(1, 20, 40, head_dim=head_dim, dtype=dtype))


BOUNDS = {
    "one": [0, 40],
    "even": [0, 10, 20, 30, 40],
    "ragged": [0, 1, 33, 40],
    "many": list(range(41)),
    "empty-blocks": [0, 0, 7, 7, 7, 40, 40],
    "part": [3, 20, 35],
    "nothing": [9, 9],
}


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("bounds", BOUNDS.values(), ids=BOUNDS)
@pytest.mark.parametrize("query_reduction", ["mean", "sum"])
def test_blocks(device, operations, attention, bounds, dtype, query_reduction):
    cu_seqlens = torch.tensor(bounds, dtype=dtype, device=device)
    check(operations, *attention(heads=2, kv_heads=1), cu_seqlens, query_reduction=query_reduction)


def test_blocks_equal_calls_of_their_own(device, operations, attention):
    """Of the same bits, wherever the block lies in the sequence."""
    query, key = attention(1, 70, 70)
    packed = operations.column_saliency(query, key, torch.tensor([0, 32, 64, 70], device=device))
    alone = [operations.column_saliency(query[:, part], key[:, part]) for part in map(slice, (0, 32, 64), (32, 64, 70))]
    assert torch.equal(packed, torch.cat(alone, dim=1))


@pytest.mark.parametrize("bounds", [[-5, 10, 100], [0, 2**40], [50, 60], [-9, -3]])
def test_bounds_outside_the_sequence(device, operations, attention, bounds):
    """They are cut to it."""
    query, key = attention()
    bounds = torch.tensor(bounds, device=device)
    expected = by_matrices(query, key, bounds.clamp(0, 40))
    torch.testing.assert_close(operations.column_saliency(query, key, bounds), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("scale", [0.0, -0.3, 30.0])
def test_scale(operations, attention, scale):
    check(operations, *attention(1, 20, 20), scale=scale)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["query", "key"])
def test_infinities_and_nan_stay_in_its_block(device, operations, attention, value, where):
    query, key = attention()
    (query if where == "query" else key)[0, 5, 0, 3] = value
    bounds = torch.tensor([0, 8, 40], device=device)
    received = operations.column_saliency(query, key, bounds)
    assert received[0, 8:].isfinite().all()
    assert received[1].isfinite().all()
    if math.isnan(value):
        assert received[0, :8].isnan().all()
    torch.testing.assert_close(received, rk.ref.column_saliency(query, key, bounds), atol=1e-5, rtol=0, equal_nan=True)


def test_logits_of_minus_infinity_receive_nothing(device, operations):
    query, key = torch.ones(1, 3, 1, 16, device=device), torch.ones(1, 4, 1, 16, device=device)
    key[0, 1, 0, 0] = -math.inf
    received = operations.column_saliency(query, key)
    torch.testing.assert_close(received, torch.tensor([[1 / 3, 0, 1 / 3, 1 / 3]], device=device))
    key[0, :, 0, 0] = -math.inf
    assert operations.column_saliency(query, key).eq(0).all()


@pytest.mark.parametrize(("batch", "length"), [(0, 4), (2, 0)])
def test_empty(device, operations, batch, length):
    query, key = torch.ones(batch, 3, 2, 16, device=device), torch.ones(batch, length, 2, 16, device=device)
    assert operations.column_saliency(query, key).shape == (batch, length)


def test_layouts(operations, attention, layout):
    query, key = attention()
    check(operations, layout(query), layout(key))


def test_layouts_of_bounds(device, operations, attention):
    bounds = torch.tensor([0, 77, 10, 77, 40, 77], device=device)[::2]
    check(operations, *attention(), bounds)


def test_negated_views(operations, attention):
    query, key = attention()
    check(operations, torch._neg_view(query), torch._neg_view(key))


def test_launches(attention, launches):
    rk.triton.column_saliency(*attention(2, 40, 70, heads=3, kv_heads=3))
    assert launches == [("softmax_statistics", (6, 2)), ("sum_columns", (3, 2))]


def test_memory_grows_with_the_length_alone(device, monkeypatch):
    """For 64 times as many logits 8 times as much."""
    from reroute_kernels.triton.plan import Plan

    made = []
    monkeypatch.setattr(Plan, "run", lambda plan, inputs: made.append(plan._scratch_bytes) or [None])
    for length in (1024, 8192):
        states = torch.empty(1, length, 2, 16, device=device)
        rk.triton.column_saliency(states, states)
    assert made[1] == 8 * made[0] == 8192 * 2 * 2 * 4


def test_the_reference_holds_a_part_of_the_matrix(attention, monkeypatch):
    """In parts of few queries the result is the same."""
    query, key = attention()
    expected = rk.ref.column_saliency(query, key)
    monkeypatch.setattr(rk.ref.saliency, "WEIGHTS", 3 * 2 * 2 * 40)
    torch.testing.assert_close(rk.ref.column_saliency(query, key), expected)


def test_same_bits_twice_and_in_any_order(device, operations, attention):
    query, key = attention(3, 37, 37)
    received = operations.column_saliency(query, key)
    order = torch.tensor([2, 0, 1], device=device)
    assert torch.equal(operations.column_saliency(query[order], key[order]), received[order])


def test_no_gradient(attention):
    query, key = attention()
    assert not rk.ops.column_saliency(query.requires_grad_(), key).requires_grad


def test_autocast_changes_nothing(device, attention):
    query, key = attention()
    expected = rk.ops.column_saliency(query, key)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert torch.equal(rk.ops.column_saliency(query, key), expected)
