"""The kept index: both backends against Python's own sort, and against each other."""

import math

import pytest
import torch

import reroute_kernels as rk


def sorted_selection(scores, pool, pinned, keep, length):
    """The contract in plain Python, one sample at a time."""
    rows = []
    for sample_scores, sample_pool, sample_pinned, count in zip(
        *(tensor.tolist() for tensor in (scores, pool, pinned, keep)), strict=True
    ):
        candidates = [i for i, flag in enumerate(sample_pool) if flag and not sample_pinned[i]]
        # Python's sort is stable, and compares -0.0 equal to 0.0.
        numbers = [i for i in candidates if not math.isnan(sample_scores[i])]
        others = [i for i in candidates if math.isnan(sample_scores[i])]
        ranked = sorted(numbers, key=lambda i: sample_scores[i], reverse=True) + others
        kept = sorted(ranked[:count] + [i for i, flag in enumerate(sample_pinned) if flag])
        rows.append((kept + [-1] * length)[:length])
    return torch.tensor(rows, dtype=torch.int64, device=scores.device).view(len(rows), length)


def normal_scores(*shape):
    return torch.randn(*shape)


def few_values(*shape):
    return torch.randint(-2, 2, shape) / 4


def neighbouring_floats(*shape):
    """Scores that differ in their last bits only, some of them negative."""
    bits = torch.randint(0, 1000, shape, dtype=torch.int32) + torch.tensor(0.37).view(torch.int32)
    return bits.view(torch.float32) * (torch.randint(0, 2, shape) * 2 - 1)


def special_values(*shape):
    smallest = torch.finfo(torch.float32).smallest_normal
    largest = torch.finfo(torch.float32).max
    negative_nan = torch.tensor(-1, dtype=torch.int32).view(torch.float32).item()
    values = [0.0, smallest, 1e-45, 1e-40, 1.0, largest, torch.inf]
    values = torch.tensor([*values, *(-value for value in values), torch.nan, negative_nan])
    assert values.signbit().sum() == 8
    return values[torch.randint(0, len(values), shape)]


def constant(value):
    return lambda *shape: torch.full(shape, value)


SCORES = {
    "normal": normal_scores,
    "few-values": few_values,
    "neighbouring-floats": neighbouring_floats,
    "special-values": special_values,
    "all-equal": constant(0.25),
    "all-zero": constant(0.0),
    "all-minus-infinity": constant(-torch.inf),
    "all-plus-infinity": constant(torch.inf),
    "all-nan": constant(torch.nan),
}


def random_flags(device, batch, length, pooled=0.8, pinned=0.2):
    """Pool and pinned tokens, which overlap."""
    return (torch.rand(batch, length) < pooled).to(device), (torch.rand(batch, length) < pinned).to(device)


@pytest.mark.parametrize("length", [1, 63, 100, 255, 256, 257, 2000, 2049, 5000])
@pytest.mark.parametrize("make_scores", SCORES.values(), ids=SCORES)
def test_selects_as_sorting_does(device, operations, make_scores, length):
    scores = make_scores(4, length).to(device)
    pool, pinned = random_flags(device, 4, length)
    candidates = (pool & ~pinned).sum(1)
    keep = torch.stack([candidates[0] // 2, candidates[1] // 10, candidates[2] - 1, candidates[3] // 3]).clamp(min=1)
    width = int((keep + pinned.sum(1)).max())
    index = operations.select_tokens(scores, pool, pinned, keep, width)
    assert torch.equal(index, sorted_selection(scores, pool, pinned, keep, width))


@pytest.mark.parametrize(
    "keep",
    [
        pytest.param([0, 0, 0], id="none"),
        pytest.param([1, 0, 2], id="one-none-two"),
        pytest.param([100, 100, 100], id="all"),
        pytest.param([101, 5000, 2**40], id="more-than-there-are"),
    ],
)
@pytest.mark.parametrize("width", [0, 1, 7, 100, 300])
def test_counts_and_widths(device, operations, keep, width):
    scores = few_values(3, 100).to(device)
    pool, pinned = random_flags(device, 3, 100)
    keep = torch.tensor(keep, device=device)
    index = operations.select_tokens(scores, pool, pinned, keep, width)
    assert (index.shape, index.dtype, index.device) == ((3, width), torch.int64, scores.device)
    assert torch.equal(index, sorted_selection(scores, pool, pinned, keep, width))


@pytest.mark.parametrize("pinned", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("pooled", [0.0, 0.5, 1.0])
def test_pools_and_pinned_tokens(device, operations, pooled, pinned):
    scores = normal_scores(2, 100).to(device)
    pool, pinned = random_flags(device, 2, 100, pooled, pinned)
    keep = torch.tensor([20, 3], device=device)
    index = operations.select_tokens(scores, pool, pinned, keep, 100)
    assert torch.equal(index, sorted_selection(scores, pool, pinned, keep, 100))


@pytest.mark.parametrize(
    "length", [4096, 4097, 10_001, 16_384, 65_536, 65_537, pytest.param(131_072, marks=pytest.mark.rest)]
)
def test_long_sequences(device, operations, launches, length):
    scores = torch.stack([normal_scores(length), few_values(length), special_values(length)]).to(device)
    pool, pinned = random_flags(device, 3, length)
    pinned[1] = False
    pool[2, : length // 2] = False
    keep = torch.tensor([length // 3, length - 100, 7], device=device)
    width = length // 3 + int(pinned.sum(1).max())
    index = operations.select_tokens(scores, pool, pinned, keep, width)
    assert torch.equal(index, sorted_selection(scores, pool, pinned, keep, width))
    if operations is rk.triton:
        assert len(launches) == (1 if length <= 65_536 else 5)


@pytest.mark.parametrize("length", [60, 4097, 65_537])
def test_a_negative_count_asks_for_none(device, operations, length):
    pinned = torch.arange(length, device=device).expand(3, -1) < torch.tensor([5, 0, 9], device=device)[:, None]
    keep = torch.tensor([-3, -(2**40), 1], device=device)
    index = operations.select_tokens(normal_scores(3, length).to(device), ~pinned, pinned, keep, 12)
    assert index[:2].tolist() == [[0, 1, 2, 3, 4] + [-1] * 7, [-1] * 12]
    assert index[2, :9].tolist() == list(range(9))
    assert index[2, 9] >= 9


def test_scores_outside_the_pool_do_not_count(device, operations):
    scores = normal_scores(2, 100).to(device)
    pool, pinned = random_flags(device, 2, 100, pooled=0.5)
    keep = torch.tensor([20, 3], device=device)
    index = operations.select_tokens(scores, pool, pinned, keep, 60)
    for value in (torch.inf, torch.nan, -torch.inf):
        changed = scores.masked_fill(~pool | pinned, value)
        assert torch.equal(operations.select_tokens(changed, pool, pinned, keep, 60), index)


def test_ties_go_to_the_smaller_position(device, operations):
    scores = torch.tensor([[1.0, 2.0, 1.0, 3.0, 1.0, 1.0, 0.0, -0.0]], device=device)
    pool, pinned = torch.ones_like(scores, dtype=torch.bool), torch.zeros_like(scores, dtype=torch.bool)
    for keep, expected in [
        (2, [1, 3]),
        (3, [0, 1, 3]),
        (5, [0, 1, 2, 3, 4]),
        (7, [0, 1, 2, 3, 4, 5, 6]),
    ]:
        index = operations.select_tokens(scores, pool, pinned, torch.tensor([keep], device=device), keep)
        assert index.tolist() == [expected]
    negative_zero_first = torch.tensor([[-0.0, 0.0, -0.0, 0.0]], device=device)
    index = operations.select_tokens(
        negative_zero_first, pool[:, :4], pinned[:, :4], torch.tensor([2], device=device), 2
    )
    assert index.tolist() == [[0, 1]]


def test_nan_ranks_below_minus_infinity(device, operations):
    scores = torch.tensor([[torch.nan, -torch.inf, torch.nan, -torch.inf, -1.0]], device=device)
    pool, pinned = torch.ones_like(scores, dtype=torch.bool), torch.zeros_like(scores, dtype=torch.bool)
    for keep, expected in [(1, [4]), (2, [1, 4]), (3, [1, 3, 4]), (4, [0, 1, 3, 4])]:
        index = operations.select_tokens(scores, pool, pinned, torch.tensor([keep], device=device), keep)
        assert index.tolist() == [expected]


@pytest.mark.parametrize("length", [7000, 65_536, 70_000])
def test_ties_across_tiles(device, operations, length):
    """The threshold is shared by tokens of several tiles, and only some of them are selected."""
    scores = torch.zeros(1, length, device=device)
    scores[0, length - 500 :] = 1.0
    pool, pinned = torch.ones_like(scores, dtype=torch.bool), torch.zeros_like(scores, dtype=torch.bool)
    keep = torch.tensor([length - 2000], device=device)
    expected = [*range(length - 2500), *range(length - 500, length)]
    assert operations.select_tokens(scores, pool, pinned, keep, length - 2000).tolist() == [expected]


@pytest.mark.parametrize("length", [65_536, 65_537])
def test_every_token_counts(device, operations, length):
    """As many candidates as tokens, then pinned tokens: counts pass the range of 16 bits."""
    flags = torch.ones(1, length, dtype=torch.bool, device=device)
    for value, keep in ((0.5, length), (torch.nan, length), (torch.nan, length - 1), (torch.inf, 40_000)):
        scores = torch.full((1, length), value, device=device)
        index = operations.select_tokens(scores, flags, ~flags, torch.tensor([keep], device=device), length)
        expected = torch.arange(length, device=device)
        assert torch.equal(index[0], torch.where(expected < keep, expected, -1))
    index = operations.select_tokens(scores, flags, flags, torch.tensor([3], device=device), length)
    assert torch.equal(index[0], expected)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_keep_of_either_integer_type(device, operations, dtype):
    scores = normal_scores(2, 100).to(device)
    pool, pinned = random_flags(device, 2, 100)
    keep = torch.tensor([[3, 0], [9, 0]], dtype=dtype, device=device)[:, 0]
    index = operations.select_tokens(scores, pool, pinned, keep, 50)
    assert torch.equal(index, sorted_selection(scores, pool, pinned, keep, 50))


@pytest.mark.parametrize("name", ["scores", "pool", "pinned"])
def test_layouts(device, operations, layout, name):
    pool, pinned = random_flags(device, 3, 100)
    arguments = {"scores": normal_scores(3, 100).to(device), "pool": pool, "pinned": pinned}
    arguments[name] = layout(arguments[name])
    keep = torch.tensor([3, 0, 12], device=device)
    index = operations.select_tokens(**arguments, keep=keep, length=80)
    assert torch.equal(index, sorted_selection(**arguments, keep=keep, length=80))


@pytest.mark.parametrize("name", ["scores", "pool", "pinned"])
def test_tokens_far_apart(device, far_apart, name):
    arguments = {
        "scores": torch.tensor([[1.0, 3.0, 2.0, 4.0]], device=device),
        "pool": torch.tensor([[True, True, False, True]], device=device),
        "pinned": torch.tensor([[False, False, True, False]], device=device),
    }
    far = far_apart(1, arguments[name].dtype)[:, :, 0]
    far.copy_(arguments[name])
    index = rk.triton.select_tokens(**arguments | {name: far}, keep=torch.tensor([2], device=device), length=4)
    assert index.tolist() == [[1, 2, 3, -1]]


@pytest.mark.parametrize(("batch", "length", "width"), [(0, 5, 3), (2, 0, 3), (2, 5, 0), (0, 0, 0)])
def test_empty(device, operations, launches, batch, length, width):
    scores = torch.zeros(batch, length, device=device)
    flags = torch.ones(batch, length, dtype=torch.bool, device=device)
    keep = torch.ones(batch, dtype=torch.int64, device=device)
    index = operations.select_tokens(scores, flags, ~flags, keep, width)
    assert torch.equal(index, torch.full((batch, width), -1, device=device))
    assert all(min(grid) > 0 for _, grid in launches)
    if index.numel() == 0:
        assert launches == []


def test_one_launch(device, launches):
    scores = normal_scores(3, 300).to(device)
    rk.triton.select_tokens(scores, *random_flags(device, 3, 300), torch.tensor([3, 0, 12], device=device), 80)
    assert launches == [("select_and_compact", (3,))]


def test_same_bits_twice_and_in_any_order(device):
    scores = few_values(4, 3000).to(device)
    pool, pinned = random_flags(device, 4, 3000)
    keep = torch.tensor([3, 0, 1200, 700], device=device)
    index = rk.triton.select_tokens(scores, pool, pinned, keep, 2000)
    assert torch.equal(rk.triton.select_tokens(scores, pool, pinned, keep, 2000), index)
    order = torch.tensor([2, 0, 3, 1], device=device)
    shuffled = rk.triton.select_tokens(scores[order], pool[order], pinned[order], keep[order], 2000)
    assert torch.equal(shuffled, index[order])


def test_inputs_stay_as_they_were(device, operations):
    pool, pinned = random_flags(device, 2, 100)
    arguments = [special_values(2, 100).to(device), pool, pinned, torch.tensor([3, 9], device=device)]
    before = [tensor.clone() for tensor in arguments]
    operations.select_tokens(*arguments, 50)
    assert all(torch.equal(now.nan_to_num(5), then.nan_to_num(5)) for now, then in zip(arguments, before, strict=True))
