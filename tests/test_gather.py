"""Compact rows: both backends against a Python loop, and against each other."""

import pytest
import torch
from triton.runtime.jit import KernelInterface

import reroute_kernels as rk

DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
]


def looped_gather(index, tensor):
    """The contract as a loop."""
    compact = torch.zeros(*index.shape, *tensor.shape[2:], dtype=tensor.dtype, device=tensor.device)
    for sample, row in enumerate(index.tolist()):
        for place, position in enumerate(row):
            if 0 <= position < tensor.shape[1]:
                compact[sample, place] = tensor[sample, position]
    return compact


def assert_compact(outputs, index, tensors):
    """Equal to the loop bit for bit, contiguous, and in memory of its own."""
    assert isinstance(outputs, tuple)
    for output, tensor in zip(outputs, tensors, strict=True):
        expected = looped_gather(index, tensor)
        assert (output.dtype, output.device) == (expected.dtype, expected.device)
        assert torch.equal(output, expected)
        assert output.is_contiguous()
        assert output.numel() == 0 or output.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr()


@pytest.mark.parametrize("shape", [(), (1,), (3,), (63,), (100,), (2048,), (5000,), (4, 16), (3, 5, 7)], ids=str)
@pytest.mark.parametrize("length", [1, 63, 100, 2000])
def test_gathers_as_a_loop_does(operations, random_tensor, random_index, length, shape):
    tensor = random_tensor(3, length, *shape)
    index = random_index(3, length, min(length, 9))
    assert_compact(operations.gather_tokens(index, tensor), index, [tensor])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(operations, random_tensor, random_index, dtype):
    tensor = random_tensor(2, 63, 33, dtype=dtype)
    index = random_index(2, 63, 9)
    assert_compact(operations.gather_tokens(index, tensor), index, [tensor])


def test_many_tensors_of_different_widths_and_dtypes(operations, random_tensor, random_index):
    tensors = [random_tensor(2, 63, 40, dtype=dtype) for dtype in DTYPES]
    tensors += [random_tensor(2, 63, *shape) for shape in [(), (1,), (3000,), (0,), (4, 8), (2, 0, 3)]]
    index = random_index(2, 63, 5)
    assert_compact(operations.gather_tokens(index, *tensors), index, tensors)


INDICES = {
    "every-row": [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4]],
    "no-row": [[-1, -1, -1], [-1, -1, -1]],
    "filler-between-rows": [[-1, 2, -1, 0], [3, -1, 4, -1]],
    "positions-past-the-end": [[5, 4, 6], [1, 1000, 2]],
    "positions-past-int32": [[2**31, 2**40, 1], [-(2**31), -(2**63), 2**63 - 1]],
    "descending": [[4, 0, 3], [1, 3, 2]],
    "repeated": [[1, 1, 1], [4, 0, 4]],
    "no-columns": [[], []],
    "more-columns-than-rows": [[0, 1, 2, 3, 4, -1, -1], [4, -1, -1, -1, -1, -1, -1]],
}


@pytest.mark.parametrize("index", INDICES.values(), ids=INDICES)
def test_indices(device, operations, random_tensor, index):
    index = torch.tensor(index, dtype=torch.int64, device=device)
    tensors = [random_tensor(2, 5, 6), random_tensor(2, 5, dtype=torch.int64)]
    assert_compact(operations.gather_tokens(index, *tensors), index, tensors)


def test_filler_hides_values_that_zero_times_would_not(device, operations):
    tensor = torch.full((1, 4, 8), torch.nan, device=device)
    (compact,) = operations.gather_tokens(torch.tensor([[-1, 4]], device=device), tensor)
    assert torch.equal(compact, torch.zeros(1, 2, 8, device=device))


def test_bits_of_special_values_survive(device, operations):
    bits = torch.tensor([-1, 0x7F800001, -0x80000000, 1, 0x7F800000], dtype=torch.int32)
    tensor = bits.view(torch.float32).view(1, 1, 5).repeat(1, 3, 1).to(device)
    (compact,) = operations.gather_tokens(torch.tensor([[2]], device=device), tensor)
    assert torch.equal(compact.view(torch.int32).cpu().flatten(), bits)


@pytest.mark.parametrize("shape", [(24,), (4, 6)], ids=str)
def test_layouts(operations, random_tensor, random_index, layout, shape):
    tensor = layout(random_tensor(2, 20, *shape))
    other = random_tensor(2, 20, 7)
    index = random_index(2, 20, 9)
    assert_compact(operations.gather_tokens(index, tensor, other, tensor), index, [tensor, other, tensor])


def test_layouts_of_flat_tensors_and_index(device, operations, random_tensor, layout):
    tensor = layout(random_tensor(2, 20, dtype=torch.int64))
    index = layout(torch.tensor([[0, 3, 19], [7, 12, -1]], device=device))
    assert_compact(operations.gather_tokens(index, tensor), index, [tensor])


def test_tables_shared_by_all_samples(operations, random_tensor, random_index):
    hidden = random_tensor(3, 20, 16)
    table = random_tensor(1, 20, 8).expand(3, -1, -1)
    index = random_index(3, 20, 9)
    assert_compact(operations.gather_tokens(index, hidden, table), index, [hidden, table])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=str)
def test_rows_far_apart(device, random_tensor, far_apart, dtype):
    values = random_tensor(1, 4, 40, dtype=dtype)
    tensor = far_apart(40, dtype)
    tensor.copy_(values)
    index = torch.tensor([[3, 2, -1, 0]], device=device)
    assert_compact(rk.triton.gather_tokens(index, tensor), index, [values])
    # The same memory as samples far apart.
    tensor, index = tensor.transpose(0, 1), torch.tensor([[0], [-1], [0], [0]], device=device)
    assert_compact(rk.triton.gather_tokens(index, tensor), index, [values.transpose(0, 1)])


@pytest.mark.parametrize(
    ("batch", "length", "width", "shape"),
    [(0, 5, 3, (4,)), (2, 0, 3, (4,)), (2, 5, 0, (4,)), (2, 5, 3, (0,)), (0, 0, 0, (0, 2)), (2, 0, 3, ())],
)
def test_empty(device, operations, launches, batch, length, width, shape):
    tensor = torch.ones(batch, length, *shape, device=device)
    index = torch.full((batch, width), -1, device=device)
    assert_compact(operations.gather_tokens(index, tensor, tensor), index, [tensor, tensor])
    assert launches == []


def test_one_launch_for_all_tensors(random_tensor, random_index, launches):
    tensors = [random_tensor(2, 20, width, dtype=dtype) for width in (1, 33, 3000) for dtype in DTYPES]
    rk.triton.gather_tokens(random_index(2, 20, 3), *tensors)
    assert launches == [("copy_rows_to_compact", (6, 2))]


def test_memory_is_dirty_before_a_kernel_writes_it(device, monkeypatch):
    """Every other test relies on this: without its kernel, the library returns no plausible numbers."""
    monkeypatch.setattr(KernelInterface, "__getitem__", lambda kernel, grid: lambda *args, **kwargs: None)
    floats, integers = torch.zeros(1, 4, 8, device=device), torch.zeros(1, 4, dtype=torch.int64, device=device)
    index = torch.tensor([[0, 2]], device=device)
    compact_floats, compact_integers = rk.triton.gather_tokens(index, floats, integers)
    assert compact_floats.isnan().all()
    assert (compact_integers == torch.iinfo(torch.int64).max).all()


def test_same_bits_twice_and_in_any_order(device, random_tensor, random_index):
    tensors = [random_tensor(3, 63, 100), random_tensor(3, 63, 7, dtype=torch.bfloat16)]
    index = random_index(3, 63, 9)
    compact = rk.triton.gather_tokens(index, *tensors)
    again = rk.triton.gather_tokens(index, *tensors)
    order = torch.tensor([2, 0, 1], device=device)
    shuffled = rk.triton.gather_tokens(index[order], *(tensor[order] for tensor in tensors))
    for first, second, third in zip(compact, again, shuffled, strict=True):
        assert torch.equal(first, second)
        assert torch.equal(first[order], third)


def test_inputs_stay_as_they_were(operations, random_tensor, random_index):
    tensor, index = random_tensor(2, 20, 16), random_index(2, 20, 9)
    before = tensor.clone(), index.clone()
    (compact,) = operations.gather_tokens(index, tensor)
    compact.zero_()
    assert torch.equal(tensor, before[0])
    assert torch.equal(index, before[1])
