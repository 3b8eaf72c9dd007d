"""Memory accesses of the kernels, in Triton's interpreter: every mask is one, and no address lies outside a tensor."""

import numpy as np
import pytest
import torch

import reroute_kernels as rk
from reroute_kernels.memory import Memory
from tests.conftest import HAS_GPU

pytestmark = pytest.mark.skipif(HAS_GPU, reason="looks into Triton's interpreter")


def addresses(tensor):
    """Addresses of all elements, in order."""
    offsets = np.zeros(1, np.int64)
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        offsets = np.unique(offsets[:, None] + np.arange(size)[None] * stride)
    return tensor.data_ptr() + offsets * tensor.element_size()


class Accesses:
    """Loads and stores of the kernels that ran."""

    def __init__(self):
        self.known = np.zeros(0, np.int64)
        self.masks: set[np.dtype] = set()
        self.count = self.outside = 0

    def launched(self, arguments):
        tensors = [x for each in arguments for x in (each if isinstance(each, tuple) else (each,))]
        ranges = [addresses(x) for x in tensors if isinstance(x, torch.Tensor)]
        self.known = np.unique(np.concatenate(ranges))

    def seen(self, pointers, mask):
        """Whether all of them may be touched."""
        self.masks.add(mask.data.dtype)
        admitted = np.broadcast_to(mask.data, pointers.data.shape).astype(bool)
        touched = pointers.data.astype(np.int64)[admitted]
        outside = self.known[np.searchsorted(self.known, touched).clip(max=len(self.known) - 1)] != touched
        self.count += admitted.sum()
        self.outside += outside.sum()
        return not outside.any()


@pytest.fixture
def accesses(monkeypatch):
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    record = Accesses()
    call = GridExecutor.__call__

    def launch(grid, *args, **kwargs):
        record.launched((*args, *kwargs.values()))
        return call(grid, *args, **kwargs)

    def watched(access, mask_place):
        def watching(builder, pointers, *rest):
            assert record.seen(pointers, rest[mask_place]), "outside every tensor"
            return access(builder, pointers, *rest)

        return watching

    monkeypatch.setattr(GridExecutor, "__call__", launch)
    # (pointers, mask, other, ...) and (pointers, values, mask, ...)
    for name, mask_place in (("create_masked_load", 0), ("create_masked_store", 1)):
        monkeypatch.setattr(InterpreterBuilder, name, watched(getattr(InterpreterBuilder, name), mask_place))
    return record


def decision(device, length, masked):
    """Arguments of `route_tokens`, with counts and places that name no token."""
    flags = (torch.arange(length, device=device) % 3 == 0).expand(2, length)
    table = torch.randn(1, length, 8, device=device)
    arguments = {
        "query": torch.randn(2, 3, 2, 10, device=device),
        "key": torch.randn(2, length, 1, 10, device=device),
        "cos": table,
        "sin": table,
        "pool": ~flags,
        "pinned": flags,
        "keep": torch.tensor([2**40, -5], device=device),
        "length": length // 2,
        "tensors": (torch.randn(2, length, 33, device=device), torch.arange(2 * length, device=device).view(2, -1)),
    }
    if masked:
        arguments |= {
            "key_mask": flags,
            "query_index": torch.tensor([[-1, length - 1, length], [-(2**63), 2**40, 2**63 - 1]], device=device),
            "past_key": torch.randn(2, 5, 1, 10, device=device),
            "past_mask": torch.tensor([[True, False, True, False, True]] * 2, device=device),
        }
    return arguments


@pytest.mark.parametrize("masked", [False, True], ids=["no-mask", "masks"])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_decision_touches_its_tensors_alone(device, accesses, masked):
    rk.triton.route_tokens(**decision(device, 30, masked))
    assert accesses.count > 0
    assert accesses.masks == {np.dtype(bool)}


@pytest.mark.parametrize("length", [4100, 65_600])
def test_a_long_selection_touches_its_tensors_alone(device, accesses, length):
    arguments = decision(device, length, masked=False)
    selection = {name: arguments[name] for name in ("pool", "pinned", "keep", "length")}
    rk.triton.select_tokens(torch.randn(2, length, device=device), **selection)
    assert accesses.count > 0
    assert accesses.masks == {np.dtype(bool)}


@pytest.mark.parametrize("length", [30, 4100, 65_600])
def test_a_selection_with_a_memory_touches_its_tensors_alone(device, accesses, length):
    arguments = decision(device, length, masked=False)
    selection = {name: arguments[name][:1] for name in ("pool", "pinned", "keep")}
    places = torch.arange(-5, length - 5, device=device)[None] * 2
    places[0, 0], places[0, -1] = -(2**63), 2**63 - 1
    memory = Memory(0.3, torch.rand(1, 20, device=device), places)
    rk.triton.select_tokens(torch.rand(1, length, device=device), **selection, length=9, memory=memory)
    assert accesses.count > 0
    assert accesses.masks == {np.dtype(bool)}


@pytest.mark.parametrize("width", [(), (3,), (2050,)], ids=str)
def test_positions_outside_a_sample_touch_nothing(device, accesses, width):
    index = torch.tensor([[0, -1, 19, 20, -2], [2**31, 2**63 - 1, -(2**63), 5, 2**40]], device=device)
    full = torch.randn(2, 20, *width, device=device)
    (compact,) = rk.triton.gather_tokens(index, full)
    rk.triton.scatter_tokens_(full, index, compact)
    assert accesses.count > 0
    assert accesses.masks == {np.dtype(bool)}


@pytest.mark.parametrize("writes", [True, False], ids=["write", "no-write"])
@pytest.mark.parametrize("fan", [512, 2])
def test_a_norm_touches_its_tensors_alone(device, accesses, monkeypatch, fan, writes):
    monkeypatch.setattr(rk.triton.scatter_norm, "FAN", fan)
    index = torch.tensor([[0, 19, 20, -2, 2**40], [-(2**63), -1, 3, 5, 2**63 - 1]], device=device)
    full, compact, weight = (torch.randn(*shape, 33, device=device) for shape in ((2, 20), (2, 5), ()))
    rk.triton.scatter_norm_tokens_(full, *((index, compact) if writes else (None, None)), weight, 1e-6)
    assert accesses.count > 0
    assert accesses.masks == {np.dtype(bool)}


@pytest.mark.parametrize("fan", [512, 2])
def test_an_alignment_touches_its_tensors_alone(device, accesses, monkeypatch, fan):
    for module in (rk.triton.scatter_norm, rk.triton.align):
        monkeypatch.setattr(module, "FAN", fan)
    index = torch.tensor([[0, 19, 20, -2, 2**40], [-(2**63), -1, 3, 5, 2**63 - 1]], device=device)
    full, compact = (torch.randn(2, rows, 33, device=device) for rows in (20, 5))
    rk.triton.align_tokens_(full, index, compact, torch.arange(20, device=device).expand(2, -1) % 3 > 0)
    assert accesses.count > 0
    assert accesses.masks == {np.dtype(bool)}


@pytest.mark.parametrize("bounds", [None, [0, 7, 7, 30], [-(2**63), 3, 2**40]])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_saliency_touches_its_tensors_alone(device, accesses, bounds):
    query, key = torch.randn(2, 30, 4, 10, device=device), torch.randn(2, 30, 2, 10, device=device)
    bounds = None if bounds is None else torch.tensor(bounds, device=device)
    rk.triton.column_saliency(query, key, bounds)
    assert accesses.count > 0
    assert accesses.masks == {np.dtype(bool)}


def test_a_merge_touches_its_tensors_alone(device, accesses):
    assignment = torch.tensor([[0, 2, 3, -2, 2**40], [-(2**63), -1, 1, 1, 2**63 - 1]], device=device)
    rk.triton.merge_tokens(torch.randn(2, 5, 33, device=device), assignment, 3)
    assert accesses.count > 0
    assert accesses.masks == {np.dtype(bool)}


def test_the_check_sees_what_lies_outside(device, accesses):
    inside = torch.zeros(8, device=device)
    accesses.launched((inside[:4],))

    class Handle:
        def __init__(self, data):
            self.data = data

    pointers = Handle(inside.data_ptr() + 4 * np.arange(8, dtype=np.uint64))
    assert not accesses.seen(pointers, Handle(np.ones(8, dtype=bool)))
    assert accesses.seen(pointers, Handle(np.arange(8) < 4))
    assert accesses.outside == 4
