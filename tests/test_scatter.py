"""Rows written back: both backends against a Python loop, and nothing else touched."""

import pytest
import torch

import reroute_kernels as rk
from tests.test_gather import INDICES

DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
]


def looped_scatter(full, index, compact):
    """The contract as a loop, on a copy."""
    full = full.clone(memory_format=torch.contiguous_format)
    for sample, row in enumerate(index.tolist()):
        for place, position in enumerate(row):
            if 0 <= position < full.shape[1]:
                full[sample, position] = compact[sample, place]
    return full


@pytest.mark.parametrize("shape", [(), (1,), (3,), (63,), (100,), (2048,), (5000,), (4, 16), (3, 5, 7)], ids=str)
@pytest.mark.parametrize("length", [1, 63, 100, 2000])
def test_scatters_as_a_loop_does(operations, random_tensor, random_index, length, shape):
    full = random_tensor(3, length, *shape)
    index = random_index(3, length, min(length, 9))
    compact = random_tensor(*index.shape, *shape)
    expected = looped_scatter(full, index, compact)
    assert not torch.equal(full, expected)
    assert operations.scatter_tokens_(full, index, compact) is full
    assert torch.equal(full, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(operations, random_tensor, random_index, dtype):
    full = random_tensor(2, 63, 33, dtype=dtype)
    index = random_index(2, 63, 9)
    compact = random_tensor(2, 9, 33, dtype=dtype)
    expected = looped_scatter(full, index, compact)
    operations.scatter_tokens_(full, index, compact)
    assert torch.equal(full, expected)


@pytest.mark.parametrize("index", [index for name, index in INDICES.items() if name != "repeated"], ids=str)
@pytest.mark.parametrize("shape", [(), (6,)], ids=str)
def test_indices(device, operations, random_tensor, index, shape):
    index = torch.tensor(index, dtype=torch.int64, device=device)
    full, compact = random_tensor(2, 5, *shape), random_tensor(*index.shape, *shape)
    expected = looped_scatter(full, index, compact)
    operations.scatter_tokens_(full, index, compact)
    assert torch.equal(full, expected)


def test_positions_outside_a_sample_touch_no_other(device, operations):
    storage = torch.zeros(4, 5, 6, device=device)
    index = torch.tensor([[-1, 5, -5], [5, -1, 9]], device=device)
    operations.scatter_tokens_(storage[1:3], index, torch.ones(2, 3, 6, device=device))
    assert (storage == 0).all()


def test_bits_of_special_values_survive(device, operations):
    bits = torch.tensor([-1, 0x7F800001, -0x80000000, 1, 0x7F800000], dtype=torch.int32)
    values = bits.view(torch.float32).view(1, 1, 5).to(device)
    full = values.repeat(1, 3, 1)
    full[:, 1] = 0
    operations.scatter_tokens_(full, torch.tensor([[1]], device=device), values)
    assert torch.equal(full.view(torch.int32).cpu(), bits.expand(1, 3, 5))


@pytest.mark.parametrize("shape", [(24,), (4, 6)], ids=str)
def test_writes_into_a_view_and_nowhere_else(operations, random_tensor, random_index, writable_layout, shape):
    full = writable_layout(random_tensor(2, 20, *shape))
    index = random_index(2, 20, 9)
    compact = random_tensor(2, 9, *shape)
    expected_base = full._base.clone(memory_format=torch.preserve_format)
    expected_base.as_strided(full.shape, full.stride(), full.storage_offset()).copy_(
        looped_scatter(full, index, compact)
    )
    assert operations.scatter_tokens_(full, index, compact) is full
    torch.testing.assert_close(full._base, expected_base, atol=0, rtol=0, equal_nan=True)


@pytest.mark.parametrize("shape", [(24,), (4, 6)], ids=str)
def test_layouts_of_compact(operations, random_tensor, random_index, layout, shape):
    full, compact = random_tensor(2, 20, *shape), layout(random_tensor(2, 9, *shape))
    index = random_index(2, 20, 9)
    expected = looped_scatter(full, index, compact)
    operations.scatter_tokens_(full, index, compact)
    assert torch.equal(full, expected)


def test_layouts_of_flat_tensors_and_index(device, operations, random_tensor, writable_layout):
    full = writable_layout(random_tensor(2, 20, dtype=torch.int64))
    index = writable_layout(torch.tensor([[0, 3, 19], [7, 12, -1]], device=device))
    compact = writable_layout(random_tensor(2, 3, dtype=torch.int64))
    expected = looped_scatter(full, index, compact)
    operations.scatter_tokens_(full, index, compact)
    assert torch.equal(full, expected)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=str)
def test_rows_far_apart(device, random_tensor, far_apart, dtype):
    full, compact = far_apart(40, dtype), random_tensor(1, 3, 40, dtype=dtype)
    rk.triton.scatter_tokens_(full, torch.tensor([[3, -1, 1]], device=device), compact)
    expected = torch.zeros(1, 4, 40, dtype=dtype, device=device)
    expected[0, 3], expected[0, 1] = compact[0, 0], compact[0, 2]
    assert torch.equal(full, expected)
    # The same memory as samples far apart.
    rk.triton.scatter_tokens_(
        full.transpose(0, 1), torch.tensor([[-1], [-1], [0], [0]], device=device), compact[0, 0].expand(4, 1, 40)
    )
    expected[0, 2:] = compact[0, 0]
    assert torch.equal(full, expected)


def test_gather_reads_what_scatter_wrote(operations, random_tensor, random_index):
    full, compact = random_tensor(2, 63, 33), random_tensor(2, 9, 33)
    index = random_index(2, 63, 9)
    operations.scatter_tokens_(full, index, compact)
    (read,) = operations.gather_tokens(index, full)
    assert torch.equal(read, compact.masked_fill(index[:, :, None] < 0, 0))


@pytest.mark.parametrize(
    ("batch", "length", "width", "shape"),
    [(0, 5, 3, (4,)), (2, 0, 3, (4,)), (2, 5, 0, (4,)), (2, 5, 3, (0,)), (0, 0, 0, (0, 2)), (2, 0, 3, ())],
)
def test_empty(device, operations, launches, batch, length, width, shape):
    full = torch.ones(batch, length, *shape, device=device)
    compact = torch.zeros(batch, width, *shape, device=device)
    index = torch.zeros(batch, width, dtype=torch.int64, device=device)
    assert operations.scatter_tokens_(full, index, compact) is full
    assert torch.equal(full, torch.ones(batch, length, *shape, device=device))
    assert launches == []


def test_one_launch(random_tensor, random_index, launches):
    index = random_index(2, 20, 3)
    rk.triton.scatter_tokens_(random_tensor(2, 20, 3000), index, random_tensor(2, 3, 3000))
    assert launches == [("copy_rows_to_full", (6, 2))]


def test_an_empty_view_holds_nothing_twice(device):
    full = torch.ones(1, 1, 4, device=device).expand(2, 1, 4)[:, :0]
    index = torch.full((2, 3), -1, device=device)
    assert rk.ops.scatter_tokens_(full, index, torch.zeros(2, 3, 4, device=device)) is full


def test_same_bits_twice_and_in_any_order(device, random_tensor, random_index):
    full, compact = random_tensor(3, 63, 100), random_tensor(3, 9, 100)
    index = random_index(3, 63, 9)
    written = rk.triton.scatter_tokens_(full.clone(), index, compact)
    assert torch.equal(rk.triton.scatter_tokens_(full.clone(), index, compact), written)
    order = torch.tensor([2, 0, 1], device=device)
    assert torch.equal(rk.triton.scatter_tokens_(full[order], index[order], compact[order]), written[order])


def test_inputs_stay_as_they_were(operations, random_tensor, random_index):
    compact, index = random_tensor(2, 9, 16), random_index(2, 20, 9)
    before = compact.clone(), index.clone()
    operations.scatter_tokens_(random_tensor(2, 20, 16), index, compact)
    assert torch.equal(compact, before[0])
    assert torch.equal(index, before[1])


@pytest.mark.parametrize("first", [0, 1, 2], ids=["before", "at", "behind"])
def test_rows_of_the_same_tensor(device, operations, first):
    """Every row is read before any is written."""
    full = torch.arange(30.0, device=device).view(1, 10, 3)
    index = torch.tensor([[1, 2, 3, 4, 5, 7]], device=device)
    expected = full.clone()
    expected[0, index[0]] = full[0, first : first + 6]
    assert torch.equal(operations.scatter_tokens_(full, index, full[:, first : first + 6]), expected)
