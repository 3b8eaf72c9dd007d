"""Rows written back and all rows normalized: both backends against plain PyTorch, and nothing else touched."""

import pytest
import torch

import reroute_kernels as rk
from reroute_kernels.triton import scatter_norm
from tests.test_scatter import looped_scatter

EPS = 1e-6
STYLES = pytest.mark.parametrize("one_plus", [False, True], ids=["plain", "zero-centered"])
HALVES = [torch.float16, torch.bfloat16]


def plain_norm(rows, weight, one_plus):
    """As decoder layers of transformers compute it."""
    wide = rows.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    if one_plus:
        return (wide * (1.0 + weight.float())).type_as(rows)
    return weight * wide.to(rows.dtype)


def steps_apart(one, other):
    """How many numbers of a 16-bit dtype lie between two tensors, element by element."""

    def order(tensor):
        bits = tensor.view(torch.int16).int()
        return torch.where(bits < 0, -0x8000 - bits, bits)

    return (order(one) - order(other)).abs()


def assert_normed(normed, full, weight, one_plus=False):
    expected = plain_norm(full, weight, one_plus)
    assert (normed.dtype, normed.shape, normed.device) == (full.dtype, full.shape, full.device)
    assert normed.is_contiguous()
    if full.dtype == torch.float32:
        torch.testing.assert_close(normed, expected, atol=1e-5, rtol=0)
    else:
        # Sums in another order differ in their last bits of float32, which now and then decides how a number is
        # rounded; twice in a plain norm, where the second rounding may add a step.
        apart = steps_apart(normed, expected)
        assert apart.max() <= (1 if one_plus else 2)
        assert (apart > 0).float().mean() <= 0.01


def check(operations, full, index, compact, weight, one_plus=False):
    """Both results against the contract."""
    written = looped_scatter(full, index, compact)
    normed = operations.scatter_norm_tokens_(full, index, compact, weight, EPS, one_plus=one_plus)
    assert torch.equal(full, written)
    assert_normed(normed, written, weight, one_plus)
    return normed


@pytest.fixture
def case(random_tensor, random_index):
    """Makes (full, index, compact, weight)."""

    def make(batch=2, length=20, kept=9, width=24, dtype=torch.float32):
        rows = random_tensor(batch, length, width, dtype=dtype), random_tensor(batch, kept, width, dtype=dtype)
        return rows[0], random_index(batch, length, kept), rows[1], random_tensor(width, dtype=dtype)

    return make


@STYLES
@pytest.mark.parametrize("width", [1, 3, 63, 100, 1024, 2500])
@pytest.mark.parametrize("length", [1, 63])
def test_writes_and_normalizes(operations, case, length, width, one_plus):
    check(operations, *case(3, length, min(length, 9), width), one_plus)


@STYLES
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_halves(operations, case, dtype, one_plus, interpreter_rounds_to_nearest):
    check(operations, *case(2, 40, 9, 500, dtype), one_plus)


@STYLES
def test_nothing_to_write(operations, random_tensor, one_plus):
    full, weight = random_tensor(2, 20, 24), random_tensor(24)
    before = full.clone()
    assert_normed(
        operations.scatter_norm_tokens_(full, None, None, weight, EPS, one_plus=one_plus),
        before,
        weight,
        one_plus,
    )
    assert torch.equal(full, before)


@pytest.mark.parametrize("module", [rk.ref, rk.triton, rk.ops], ids=["ref", "triton", "ops"])
def test_rows_that_share_memory_are_read_if_nothing_is_written(module, random_tensor):
    full, weight = random_tensor(1, 20, 24).expand(3, -1, -1), random_tensor(24)
    assert_normed(module.scatter_norm_tokens_(full, None, None, weight, EPS), full, weight)


INDICES = {
    "whole": [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4]],
    "none": [[-1, -1], [-1, -1]],
    "no-columns": [[], []],
    "one": [[4], [0]],
    "right": [[1, 4, -1, -1], [0, 2, 3, -1]],
    "left": [[-1, -1, 1, 4], [-1, 0, 2, 3]],
    "mixed": [[-1, -1, -1, 4], [0, 1, -1, -1]],
    "outside, right": [[0, 4, 5, -7, 2**40], [3, 5, -1, 2**62, 5]],
    "outside, left": [[-9, -1, -(2**40), 0, 4], [-2, 0, 1, 2, 5]],
    "longer": [[0, 1, 2, 3, 4, -1, -1, -1], [-1, -1, -1, 0, 1, 2, 3, 4]],
}


@pytest.mark.parametrize("fan", [512, 4, 2], ids="parts-of-{}".format)
@pytest.mark.parametrize("index", INDICES.values(), ids=INDICES)
def test_indices(device, operations, random_tensor, index, fan, monkeypatch):
    """Fewer entries at a time are searched in more levels."""
    monkeypatch.setattr(scatter_norm, "FAN", fan)
    index = torch.tensor(index, dtype=torch.int64, device=device)
    check(operations, random_tensor(2, 5, 6), index, random_tensor(*index.shape, 6), random_tensor(6))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kept", [7, 8, 9, 63, 64, 65, 200])
def test_search(device, random_tensor, monkeypatch, kept, side):
    """Every position is found, and none besides, whatever the parts that a row is divided into."""
    monkeypatch.setattr(scatter_norm, "FAN", 8)
    length = kept + 16
    rows = [torch.randperm(length)[: kept - padding].sort().values.tolist() for padding in (0, 1, kept // 2)]
    filler = [[-1] * (kept - len(row)) for row in rows]
    rows = [padding + row if side == "left" else row + padding for row, padding in zip(rows, filler, strict=True)]
    index = torch.tensor(rows, device=device)
    check(rk.triton, random_tensor(3, length, 4), index, random_tensor(3, kept, 4), random_tensor(4))


def test_a_long_index_is_searched_twice(device, launches, random_tensor):
    index = torch.arange(0, 1200, 2, device=device)[None]
    check(rk.triton, random_tensor(1, 1201, 2), index, random_tensor(1, 600, 2), random_tensor(2))
    assert launches == [("normalize_rows", (1201,))]
    assert [scatter_norm._levels(entries) for entries in (1, 512, 513, 512**2, 512**2 + 1)] == [1, 1, 2, 2, 3]


@pytest.mark.parametrize("fan", [512, 2])
def test_an_index_without_order_reads_its_tensors_alone(device, random_tensor, monkeypatch, fan):
    """It is not accepted, and cannot be refused without a transfer: which rows are written is left open."""
    monkeypatch.setattr(scatter_norm, "FAN", fan)
    full, index = random_tensor(1, 5, 6), torch.tensor([[4, 4, 4, 0, -1, 2, 2**40, 1, 1]], device=device)
    values = torch.full((1, 9, 6), 7.0, device=device)
    before, weight = full.clone(), torch.ones(6, device=device)
    normed = rk.triton.scatter_norm_tokens_(full, index, values, weight, EPS)
    assert ((full == before) | (full == 7)).all()
    assert_normed(normed, full, weight)


def test_positions_outside_a_sample_touch_no_other(device, operations):
    storage = torch.zeros(4, 5, 6, device=device)
    index = torch.tensor([[-5, -1, 5], [5, -1, 9]], device=device)
    ones = torch.ones(2, 3, 6, device=device)
    normed = operations.scatter_norm_tokens_(storage[1:3], index, ones, torch.ones(6, device=device), EPS)
    assert (storage == 0).all()
    assert (normed == 0).all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_special_values(device, operations):
    """Bits are written as they are, and what is not finite stays in its row."""
    values = torch.tensor([[torch.nan, 1.0, 2.0], [torch.inf, 1.0, 2.0], [0.0, -0.0, 0.0], [3e38, 3e38, 1.0]])
    compact = values[None].to(device)
    full, weight = torch.ones(1, 6, 3, device=device), torch.ones(3, device=device)
    index = torch.tensor([[0, 2, 3, 5]], device=device)
    normed = operations.scatter_norm_tokens_(full, index, compact, weight, EPS)
    assert torch.equal(full[:, index[0]].view(torch.int32), compact.view(torch.int32))
    torch.testing.assert_close(normed, plain_norm(full, weight, False), equal_nan=True)
    assert normed[0, [1, 4]].isfinite().all()


def test_writes_into_a_view_and_nowhere_else(operations, case, writable_layout):
    full, index, compact, weight = case()
    full = writable_layout(full)
    expected_base = full._base.clone(memory_format=torch.preserve_format)
    expected_base.as_strided(full.shape, full.stride(), full.storage_offset()).copy_(
        looped_scatter(full, index, compact)
    )
    check(operations, full, index, compact, weight)
    torch.testing.assert_close(full._base, expected_base, atol=0, rtol=0, equal_nan=True)


def test_layouts_of_compact(operations, case, layout):
    full, index, compact, weight = case()
    check(operations, full, index, layout(compact), weight)


def test_layouts_of_what_is_read_alone(operations, random_tensor, layout):
    full, weight = layout(random_tensor(2, 20, 24)), random_tensor(24)
    assert_normed(operations.scatter_norm_tokens_(full, None, None, weight, EPS), full, weight)


def test_layouts_of_index_and_weight(operations, case, writable_layout):
    full, index, compact, weight = case()
    weight = torch.stack((weight, torch.full_like(weight, torch.nan)), dim=1)[:, 0]
    check(operations, full, writable_layout(index), compact, weight)


def test_rows_far_apart(device, random_tensor, far_apart):
    full, compact, weight = far_apart(40, torch.float32), random_tensor(1, 3, 40), random_tensor(40)
    index = torch.tensor([[1, 3, -1]], device=device)
    normed = rk.triton.scatter_norm_tokens_(full, index, compact, weight, EPS)
    expected = torch.zeros(1, 4, 40, device=device)
    expected[0, 1], expected[0, 3] = compact[0, 0], compact[0, 1]
    assert torch.equal(full, expected)
    assert_normed(normed, expected, weight)


@pytest.mark.parametrize(
    ("batch", "length", "kept", "width"), [(0, 5, 3, 4), (2, 0, 3, 4), (2, 5, 0, 4), (2, 5, 3, 0), (0, 0, 0, 0)]
)
def test_empty(device, operations, batch, length, kept, width):
    full, compact = torch.ones(batch, length, width, device=device), torch.ones(batch, kept, width, device=device)
    index, weight = torch.full((batch, kept), -1, device=device), torch.ones(width, device=device)
    normed = operations.scatter_norm_tokens_(full, index, compact, weight, EPS)
    assert normed.shape == full.shape
    torch.testing.assert_close(normed, full)


def test_wide_rows(device, operations, case, launches):
    """Rows that a program does not hold are written by the one kernel, and normalized by PyTorch."""
    check(operations, *case(1, 3, 2, scatter_norm.MAX_WIDTH))
    check(operations, *case(1, 3, 2, scatter_norm.MAX_WIDTH + 1))
    names = [name for name, _ in launches]
    assert names == (["normalize_rows", "copy_rows_to_full"] if operations is rk.triton else [])


def test_one_program_a_row(case, launches):
    rk.triton.scatter_norm_tokens_(*case(3, 40), EPS)
    assert launches == [("normalize_rows", (120,))]


def test_same_bits_twice_and_in_any_order(device, case):
    full, index, compact, weight = case(3, 63, 9, 100)
    normed = rk.triton.scatter_norm_tokens_(full.clone(), index, compact, weight, EPS)
    assert torch.equal(rk.triton.scatter_norm_tokens_(full.clone(), index, compact, weight, EPS), normed)
    order = torch.tensor([2, 0, 1], device=device)
    again = rk.triton.scatter_norm_tokens_(full[order], index[order], compact[order], weight, EPS)
    assert torch.equal(again, normed[order])
    assert torch.equal(rk.triton.scatter_norm_tokens_(full, index, compact, weight, EPS), normed)
    assert torch.equal(rk.triton.scatter_norm_tokens_(full, None, None, weight, EPS), normed)


def test_inputs_stay_as_they_were(operations, case):
    full, *others = case()
    before = [each.clone() for each in others]
    operations.scatter_norm_tokens_(full, *others, EPS)
    assert all(map(torch.equal, others, before))


@pytest.mark.parametrize("first", [0, 1, 2], ids=["before", "at", "behind"])
def test_inputs_in_the_memory_that_is_written(device, operations, first):
    """Every row, entry and weight is read before any row is written."""
    index = torch.tensor([[1, 2, 3, 4, 5, 7]], device=device)
    full = torch.arange(30.0, device=device).view(1, 10, 3)
    weight = full[0, 4]
    expected, factor = looped_scatter(full, index, full[:, first : first + 6].clone()), weight.clone()
    normed = operations.scatter_norm_tokens_(full, index, full[:, first : first + 6], weight, EPS)
    assert torch.equal(full, expected)
    assert_normed(normed, expected, factor)


def weighted(tensor):
    return (tensor * torch.arange(tensor.numel(), device=tensor.device).view_as(tensor)).sum()


@STYLES
@pytest.mark.parametrize("writes", [True, False], ids=["write", "no-write"])
@pytest.mark.parametrize("needed", [[0], [1], [2], [0, 1, 2]], ids=["full", "compact", "weight", "all"])
def test_gradients_are_those_of_torch(case, needed, writes, one_plus):
    full, index, compact, weight = case()
    sample = torch.arange(2, device=full.device)[:, None].expand_as(index)[index >= 0]
    if not writes and needed == [1]:
        pytest.skip("nothing is written")

    def gradients(function):
        inputs = [tensor.clone() for tensor in (full, compact, weight)]
        for number in needed:
            inputs[number].requires_grad_()
        whole, normed = function(inputs[0] * 1, *inputs[1:])
        return torch.autograd.grad(weighted(whole) + weighted(normed), [inputs[n] for n in needed], allow_unused=True)

    def operation(full, compact, weight):
        given = (index, compact) if writes else (None, None)
        normed = rk.ops.scatter_norm_tokens_(full, *given, weight, EPS, one_plus=one_plus)
        return full, normed

    def by_torch(full, compact, weight):
        if writes:
            full = full.index_put((sample, index[index >= 0]), compact[index >= 0])
        return full, plain_norm(full, weight, one_plus)

    for actual, expected in zip(gradients(operation), gradients(by_torch), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("backend", ["ref", "triton"])
def test_no_gradient_where_none_is_wanted(case, launches, backend):
    full, index, compact, weight = case()
    weight.requires_grad_()
    with rk.backend(backend), torch.no_grad():
        assert not rk.ops.scatter_norm_tokens_(full, index, compact, weight, EPS).requires_grad
    assert [name for name, _ in launches] == (["normalize_rows"] if backend == "triton" else [])


@pytest.mark.parametrize("writes", [True, False], ids=["write", "no-write"])
def test_forward_mode(case, writes):
    full, index, compact, weight = case()

    def operation(full, compact, weight):
        full = full * 1
        given = (index, compact) if writes else (None, None)
        return rk.ops.scatter_norm_tokens_(full, *given, weight, EPS), full

    def by_reference(full, compact, weight):
        full = rk.ref.scatter_tokens_(full * 1, index, compact) if writes else full * 1
        return plain_norm(full, weight, False), full

    tangents = tuple(map(torch.ones_like, (full, compact, weight)))
    results = [torch.func.jvp(each, (full, compact, weight), tangents) for each in (operation, by_reference)]
    torch.testing.assert_close(*results)
    assert results[0][1][0].abs().sum() > 0


@pytest.mark.parametrize("backend", ["ref", "triton"])
def test_tells_autograd_that_it_wrote(device, case, backend):
    full, index, compact, weight = case()
    factor = torch.randn_like(full).requires_grad_()
    product = (full * factor).sum()
    with rk.backend(backend):
        version = full._version
        rk.ops.scatter_norm_tokens_(full, None, None, weight, EPS)
        assert full._version == version
        rk.ops.scatter_norm_tokens_(full, index, compact, weight, EPS)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@pytest.mark.parametrize("backend", ["ref", "triton"])
def test_inference_tensors(case, backend):
    _, index, compact, weight = case()
    with rk.backend(backend):
        with torch.inference_mode():
            full = torch.zeros(2, 20, 24, device=compact.device)
            rk.ops.scatter_norm_tokens_(full, index, compact, weight, EPS)
        written = looped_scatter(torch.zeros_like(full), index, compact)
        assert torch.equal(full, written)
        assert_normed(rk.ops.scatter_norm_tokens_(full, None, None, weight, EPS), written, weight)
        with pytest.raises(RuntimeError, match="inference"):
            rk.ops.scatter_norm_tokens_(full, index, compact, weight, EPS)


@pytest.mark.parametrize("backend", ["ref", "triton"])
def test_registered_operations(case, backend):
    full, index, compact, weight = case()
    operations = torch.ops.reroute_kernels
    with rk.backend(backend):
        torch.library.opcheck(operations.norm_tokens.default, (full, weight, EPS, True))
        torch.library.opcheck(operations.norm_tokens.default, (full[:1].expand(3, -1, -1), weight, EPS, False))
        torch.library.opcheck(operations.norm_tokens.default, (full[:, :0], weight, EPS, False))
        few = index[:, :0], compact[:, :0]
        torch.library.opcheck(operations.scatter_norm_tokens_.default, (full, *few, weight, EPS, False))


def test_a_compiled_norm_writes_nothing(case):
    """A schema tells the compiler that the one with an index writes, and the other does not."""
    full, index, compact, weight = case()
    torch.compiler.reset()
    function = torch.compile(rk.ops.scatter_norm_tokens_, fullgraph=True, backend="aot_eager")
    version = full._version
    assert_normed(function(full, None, None, weight, EPS), full, weight)
    assert full._version == version
    check(rk.ref, full.clone(), index, compact, weight)
    written = looped_scatter(full, index, compact)
    assert_normed(function(full, index, compact, weight, EPS), written, weight)
    assert torch.equal(full, written)


def test_same_under_autocast(case, device):
    full, index, compact, weight = case()
    expected = rk.ref.scatter_norm_tokens_(full.clone(), index, compact, weight, EPS)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        for module in (rk.ops, rk.ref, rk.triton):
            normed = module.scatter_norm_tokens_(full.clone(), index, compact, weight, EPS)
            torch.testing.assert_close(normed, expected, atol=1e-5, rtol=0)


def test_lazily_negated_views(device, operations):
    """Their memory holds the other sign."""
    values = torch.view_as_complex(torch.randn(2, 20, 16, 2, device=device)).conj().imag
    weight = torch.view_as_complex(torch.randn(16, 2, device=device)).conj().imag
    assert values.is_neg()
    assert weight.is_neg()
    index = torch.tensor([[0, 4, 19], [2, 3, -1]], device=device)
    full = torch.zeros(2, 20, 16, device=device)
    check(operations, full, index, values[:, :3], weight.resolve_neg())
    normed = operations.scatter_norm_tokens_(values, None, None, weight, EPS)
    assert_normed(normed, values.resolve_neg(), weight.resolve_neg())


def test_more_rows_than_a_grid_has_programs(case, launches, monkeypatch):
    monkeypatch.setattr(scatter_norm, "MAX_FIRST_PROGRAMS", 39)
    with pytest.raises(ValueError, match="full must have at most 39 rows for this backend, got 40 rows"):
        rk.triton.scatter_norm_tokens_(*case(2, 20), EPS)
    assert launches == []
