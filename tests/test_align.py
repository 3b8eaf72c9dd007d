"""Waiting candidates follow those that ran: both backends against a loop, and nothing else touched."""

import pytest
import torch

import reroute_kernels as rk
from reroute_kernels.triton import align, scatter_norm
from tests.test_scatter import looped_scatter

HALVES = [torch.float16, torch.bfloat16]


def looped(full, index, compact, pool):
    """The contract, row by row in float64."""
    result = looped_scatter(full, index, compact)
    for sample, entries in enumerate(index.tolist()):
        places = {place: row for row, place in enumerate(entries) if 0 <= place < full.shape[1]}
        ran = [place for place in places if pool[sample, place]]
        if not ran:
            continue
        changes = [compact[sample, places[place]].double() - full[sample, place].double() for place in ran]
        mean = torch.stack(changes).mean(dim=0)
        for place in range(full.shape[1]):
            if pool[sample, place] and place not in places:
                result[sample, place] = (full[sample, place].double() + mean).to(full.dtype)
    return result


def check(operations, full, index, compact, pool, atol=1e-5, rtol=0):
    """The result against the contract: what is written or stays is exact."""
    expected, written = looped(full, index, compact, pool), looped_scatter(full, index, compact)
    assert operations.align_tokens_(full, index, compact, pool) is full
    torch.testing.assert_close(full, expected, atol=atol, rtol=rtol)
    waits = pool.clone()
    for sample, entries in enumerate(index.tolist()):
        waits[sample, [place for place in entries if 0 <= place < full.shape[1]]] = False
    assert torch.equal(full[~waits], written[~waits])


@pytest.fixture
def case(device, random_tensor, random_index):
    """Makes (full, index, compact, pool)."""

    def make(batch=2, length=20, kept=9, width=24, dtype=torch.float32):
        full, compact = (random_tensor(batch, rows, width, dtype=dtype) for rows in (length, kept))
        return full, random_index(batch, length, kept), compact, torch.rand(batch, length, device=device) < 0.7

    return make


@pytest.mark.parametrize(("length", "width"), [(1, 1), (1, 129), (9, 2100), (80, 129)])
def test_waiting_candidates_follow(operations, case, length, width):
    check(operations, *case(2, length, min(length, 70), width))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_halves(operations, case, dtype, interpreter_rounds_to_nearest):
    """The mean is one of float32, and the sum is rounded once."""
    # A step of the dtype, where the sum lies between two numbers.
    check(operations, *case(2, 60, 40, 33, dtype), atol=1e-6, rtol=torch.finfo(dtype).eps)


INDICES = {
    "whole": [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4]],
    "none": [[-1, -1], [-1, -1]],
    "no-columns": [[], []],
    "one": [[4], [0]],
    "right": [[1, 4, -1, -1], [0, 2, 3, -1]],
    "left": [[-1, -1, 1, 4], [-1, 0, 2, 3]],
    "outside": [[0, 4, 5, -7, 2**40], [3, -1, -1, 2**62, 5]],
}


@pytest.mark.parametrize("fan", [512, 2], ids="parts-of-{}".format)
@pytest.mark.parametrize("index", INDICES.values(), ids=INDICES)
def test_indices(device, operations, random_tensor, index, fan, monkeypatch):
    for module in (align, scatter_norm):
        monkeypatch.setattr(module, "FAN", fan)
    index = torch.tensor(index, dtype=torch.int64, device=device)
    pool = torch.tensor([[True, True, False, True, True], [False, True, True, False, True]], device=device)
    check(operations, random_tensor(2, 5, 6), index, random_tensor(*index.shape, 6), pool)


@pytest.mark.parametrize("ran", ["text", "all", "none"])
def test_a_sample_in_which_no_candidate_ran_or_waits(device, operations, random_tensor, ran):
    """Nothing is added there, whatever the others do."""
    index = torch.tensor([[0, 1], [2, 3]], device=device)
    flags = {"text": [True, True, False, False], "all": [False, False, True, True], "none": [False] * 4}
    pool = torch.tensor([[True] * 4, flags[ran]])
    check(operations, random_tensor(2, 4, 6), index, random_tensor(2, 2, 6), pool.to(device))


def test_what_is_not_finite_stays_in_its_sample(device, operations):
    full, compact = torch.zeros(2, 4, 3, device=device), torch.ones(2, 2, 3, device=device)
    compact[0, 0, 1] = torch.inf  # of a text token, which takes no part
    compact[1, 0, 1] = torch.inf
    pool = torch.tensor([[False, True, True, True], [True, True, True, True]], device=device)
    operations.align_tokens_(full, torch.tensor([[0, 1], [0, 1]], device=device), compact, pool)
    assert full[0, 1:].eq(1).all()
    assert full[1, 2:].tolist() == [[1, torch.inf, 1]] * 2


def test_layouts_of_compact(operations, case, layout):
    full, index, compact, pool = case()
    check(operations, full, index, layout(compact), pool)


def test_layouts_of_the_others(operations, case, writable_layout):
    full, index, compact, pool = case()
    check(operations, writable_layout(full), writable_layout(index), compact, writable_layout(pool))


def test_writes_into_a_view_and_nowhere_else(operations, case, writable_layout):
    full, index, compact, pool = case()
    full = writable_layout(full)
    base = full._base.clone(memory_format=torch.preserve_format)
    own = base.as_strided(full.shape, full.stride(), full.storage_offset())
    operations.align_tokens_(full, index, compact, pool)
    own.copy_(full)
    torch.testing.assert_close(full._base, base, atol=0, rtol=0, equal_nan=True)


@pytest.mark.parametrize(("batch", "length", "kept", "width"), [(0, 5, 3, 4), (2, 0, 3, 4), (2, 5, 0, 4), (2, 5, 3, 0)])
def test_empty(device, operations, batch, length, kept, width):
    full, compact = torch.ones(batch, length, width, device=device), torch.ones(batch, kept, width, device=device)
    index, pool = torch.full((batch, kept), -1, device=device), torch.ones(batch, length, dtype=bool, device=device)
    assert torch.equal(operations.align_tokens_(full.clone(), index, compact, pool), full)


def test_launches(case, launches):
    rk.triton.align_tokens_(*case(3, 40, width=300))
    assert launches == [("sum_changes", (12, 3)), ("follow_changes", (120, 1))]


def test_same_bits_twice_and_in_any_order(device, operations, case):
    full, index, compact, pool = case(3, 21, 17, 100)
    aligned = operations.align_tokens_(full.clone(), index, compact, pool)
    order = torch.tensor([2, 0, 1], device=device)
    again = operations.align_tokens_(full[order], index[order], compact[order], pool[order])
    assert torch.equal(again, aligned[order])


def test_inputs_stay_as_they_were(operations, case):
    full, *others = case()
    before = [each.clone() for each in others]
    operations.align_tokens_(full, *others)
    assert all(map(torch.equal, others, before))


@pytest.mark.parametrize("first", [0, 1, 2], ids=["before", "at", "behind"])
def test_rows_in_the_memory_that_is_written(device, operations, first):
    index = torch.tensor([[1, 2, 3, 4, 5, 7]], device=device)
    full, pool = torch.arange(30.0, device=device).view(1, 10, 3), torch.ones(1, 10, dtype=torch.bool, device=device)
    expected = looped(full.clone(), index, full[:, first : first + 6].clone(), pool)
    operations.align_tokens_(full, index, full[:, first : first + 6], pool)
    torch.testing.assert_close(full, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("needed", [[0], [1], [0, 1]], ids=["full", "compact", "both"])
def test_gradients(case, needed):
    full, index, compact, pool = case(2, 6, 3, 4)
    given = [full.double(), compact.double()]

    def by_torch(full, compact):
        rows = []
        for sample in range(2):
            places = [place for place in index[sample].tolist() if place >= 0]
            ran = [(place, row) for row, place in enumerate(places) if pool[sample, place]]
            change = [compact[sample, row] - full[sample, place] for place, row in ran]
            mean = torch.stack(change).mean(dim=0) if change else 0
            rows += [
                compact[sample, places.index(place)]
                if place in places
                else full[sample, place] + (mean if pool[sample, place] else 0)
                for place in range(6)
            ]
        return torch.stack(rows).view(2, 6, 4)

    def gradients(function, dtype):
        inputs = [tensor.to(dtype).clone() for tensor in given]
        for number in needed:
            inputs[number].requires_grad_()
        result = function(inputs[0] * 1, inputs[1])
        weights = torch.arange(48, device=result.device).view_as(result)
        return torch.autograd.grad((result * weights).sum(), [inputs[number] for number in needed])

    actual = gradients(lambda full, compact: rk.ops.align_tokens_(full, index, compact, pool), torch.float32)
    for one, other in zip(actual, gradients(by_torch, torch.float64), strict=True):
        torch.testing.assert_close(one, other.float())


def test_forward_mode(case):
    full, index, compact, pool = case()
    tangents = torch.ones_like(full), torch.full_like(compact, 3.0)

    def operation(full, compact):
        return rk.ops.align_tokens_(full * 1, index, compact, pool)

    _, tangent = torch.func.jvp(operation, (full, compact), tangents)
    torch.testing.assert_close(tangent, looped(tangents[0], index, tangents[1], pool))


@pytest.mark.parametrize("backend", ["ref", "triton"])
def test_tells_autograd_that_it_wrote(device, case, backend):
    full, index, compact, pool = case()
    product = (full * torch.randn_like(full).requires_grad_()).sum()
    with rk.backend(backend):
        rk.ops.align_tokens_(full, index, compact, pool)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@pytest.mark.parametrize("backend", ["ref", "triton"])
def test_inference_tensors(device, case, backend):
    _, index, compact, pool = case()
    with rk.backend(backend):
        with torch.inference_mode():
            full = torch.zeros(2, 20, 24, device=device)
            rk.ops.align_tokens_(full, index, compact, pool)
        torch.testing.assert_close(full, looped(torch.zeros(2, 20, 24, device=device), index, compact, pool))
        with pytest.raises(RuntimeError, match="inference"):
            rk.ops.align_tokens_(full, index, compact, pool)
