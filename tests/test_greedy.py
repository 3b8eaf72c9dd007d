"""Greedy selections: both backends against the formulas with whole matrices in float64."""

import math

import pytest
import torch

import reroute_kernels as rk
from tests.conftest import LAYOUTS

HALVES = [torch.float16, torch.bfloat16]


def cosines(features):
    """(N, N) float64 of one row; 1 with itself, NaN with a token whose norm is not finite in float32."""
    wide = features.double()
    norm = torch.linalg.vector_norm(features.float(), dim=-1)
    unit = torch.where((norm > 0)[:, None], wide / torch.linalg.vector_norm(wide, dim=-1, keepdim=True), 0)
    unit[~norm.isfinite()] = torch.nan
    return (unit @ unit.T).fill_diagonal_(1.0)


class Diverse:
    """Scores of the next pick by the whole matrix of weighted distances."""

    name, values = "select_diverse", "weights"

    def __init__(self, features, weights):
        matrix = (1 - cosines(features)).clamp(min=0) * weights.double()
        usable = torch.linalg.vector_norm(features.float(), dim=-1).isfinite() & weights.isfinite()
        self.entries = matrix.masked_fill(~usable[:, None], torch.inf)
        self.usable, self.picked = usable, []

    def scores(self):
        second = self.entries.sort(dim=0).values[:2][-1]
        least = self.entries[self.picked].amin(dim=0) if self.picked else second
        return least.masked_fill(~self.usable, torch.nan)


class Dpp:
    """Scores of the next pick by determinants of the kernel's blocks."""

    name, values = "select_dpp", "relevance"

    def __init__(self, features, relevance):
        usable = torch.linalg.vector_norm(features.float(), dim=-1).isfinite() & relevance.isfinite()
        self.cosines = cosines(features).nan_to_num(0.0).fill_diagonal_(1.0)
        self.squares = (relevance.double() ** 2).masked_fill(~usable, torch.nan)
        self.picked = []

    def scores(self):
        """r squared times the part of the unit vector that the picked ones do not span, 0 if it is next to nothing."""
        basis = []
        for place in self.picked:
            if self._outside(place, basis) > 1e-5:
                basis.append(place)
        outside = torch.stack([self._outside(place, basis) for place in range(len(self.squares))])
        return self.squares * torch.where(outside > 1e-5, outside, 0.0)

    def _outside(self, place, basis):
        """The Schur complement of a block of the cosines."""
        if not basis:
            return torch.tensor(1.0, dtype=torch.float64)
        across = self.cosines[basis, place]
        return 1 - across @ torch.linalg.solve(self.cosines[basis][:, basis], across)


def order(scores, free):
    """Free places, the next pick first."""
    places = [place for place in range(len(free)) if free[place]]
    return sorted(places, key=lambda place: (math.isnan(scores[place]), -scores[place]))


def check_row(rule, selected, keep, tolerance):
    """Replay the picks: each is the best of its step, or within the tolerance of it, if it is among the selected."""
    total = len(rule.scores())
    wanted = min(keep, total)
    assert selected[:wanted] == sorted(set(selected[:wanted])), "ascending, each once"
    assert selected[wanted:] == [-1] * (keep - wanted)
    free = [True] * total
    for _ in range(wanted):
        scores = rule.scores().tolist()
        ranked = order(scores, free)
        best = next((place for place in ranked if place in selected), None)
        assert best is not None
        if best != ranked[0]:
            assert scores[best] >= scores[ranked[0]] - tolerance, (best, ranked[0], scores)
        rule.picked.append(best)
        free[best] = False


def check(operations, kind, features, values, keep, lengths=None, tolerance=0.0):
    given = {kind.values: values} if values is not None else {}
    index = getattr(operations, kind.name)(features, **given, keep=keep, lengths=lengths)
    rows, total, _ = features.shape
    assert (index.shape, index.dtype, index.device) == ((rows, keep), torch.int64, features.device)
    values = torch.ones(rows, total) if values is None else values
    counts = [total] * rows if lengths is None else [min(max(length, 0), total) for length in lengths.tolist()]
    for row, count in enumerate(counts):
        if count == 0:
            assert index[row].eq(-1).all()
            continue
        rule = kind(features[row, :count].cpu(), values[row, :count].cpu())
        check_row(rule, index[row].tolist(), keep, tolerance)
    return index


def signs(*shape):
    """Vectors whose norm is a power of 2 for d = 4 ** n: their cosines are exact, and often equal."""
    return torch.randint(0, 2, shape) * 2.0 - 1.0


def quarters(*shape):
    """Exact weights, a few of them negative or 0."""
    return torch.randint(-1, 6, shape) / 4


BOTH = pytest.mark.parametrize("kind", [Diverse, Dpp], ids=["diverse", "dpp"])


@pytest.fixture
def made(device):
    """Makes features and values whose scores lie apart."""

    def make(rows=2, total=20, width=12, dtype=torch.float32):
        return torch.randn(rows, total, width).to(device, dtype), torch.rand(rows, total).to(device) + 0.1

    return make


@BOTH
@pytest.mark.parametrize(
    ("total", "width", "keep"), [(1, 1, 1), (2, 3, 1), (17, 2, 4), (33, 16, 12), (40, 100, 40), (30, 5, 37)]
)
def test_picks_as_the_formula(operations, made, kind, total, width, keep):
    check(operations, kind, *made(2, total, width), keep, tolerance=1e-5)


@BOTH
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_halves(operations, made, kind, dtype):
    check(operations, kind, *made(2, 25, 33, dtype), 9, tolerance=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize(("total", "width"), [(7, 1), (9, 4), (36, 16), (21, 64)])
@pytest.mark.parametrize("weighted", [False, True], ids=["ones", "weights"])
def test_ties_go_to_the_smaller_place(device, operations, dtype, total, width, weighted):
    """Every number on the way is exact: no tolerance."""
    features = signs(3, total, width).to(device, dtype)
    check(operations, Diverse, features, quarters(3, total).to(device) if weighted else None, total // 2)


def test_ties_of_relevance(device, operations):
    """Vectors at right angles: the relevance alone decides, of either sign."""
    features = torch.eye(6, device=device)[None] * 3.0
    relevance = torch.tensor([[0.5, -1.0, 1.0, 0.5, 2.0, 0.5]], device=device)
    for keep, expected in [(1, [4]), (2, [1, 4]), (3, [1, 2, 4]), (4, [0, 1, 2, 4])]:
        assert operations.select_dpp(features, relevance, keep=keep).tolist() == [expected]


@pytest.mark.parametrize("alike", [12, 5], ids=["the-second-pick", "the-last-picks"])
def test_less_relevant_tokens_are_picked_where_the_others_are_alike(device, operations, made, alike):
    features, _ = made(1, 30, 12)
    features[:, :alike] = features[:, :1]
    relevance = 0.5 - 0.01 * torch.arange(30, dtype=torch.float32, device=device)[None]
    relevance[:, :alike] = 1.0
    check(operations, Dpp, features, relevance, 5, tolerance=1e-5)
    assert (operations.select_dpp(features, relevance, keep=5) >= alike).sum() == 4


@BOTH
def test_rows_of_any_length(device, operations, made, kind):
    features, values = made(6, 20, 8)
    lengths = torch.tensor([20, 7, 1, 0, -3, 2**40], device=device)
    index = check(operations, kind, features, values, 8, lengths, tolerance=1e-5)
    assert index[2:5].tolist() == [[0] + [-1] * 7, [-1] * 8, [-1] * 8]
    assert torch.equal(
        index[:5], getattr(operations, kind.name)(features, values, keep=8, lengths=lengths.clamp(max=20).int())[:5]
    )


@BOTH
def test_what_lies_beyond_a_row_does_not_count(device, operations, made, kind):
    features, values = made(2, 20, 8)
    lengths = torch.tensor([13, 5], device=device)
    select = getattr(operations, kind.name)
    index = select(features, values, keep=8, lengths=lengths)
    beyond = torch.arange(20, device=device) >= lengths[:, None]
    for value in (torch.nan, torch.inf, 0.0, 100.0):
        changed = features.masked_fill(beyond[:, :, None], value), values.masked_fill(beyond, value)
        assert torch.equal(select(*changed, keep=8, lengths=lengths), index)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@BOTH
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 3e38])
@pytest.mark.parametrize("of_features", [True, False], ids=["features", "values"])
def test_what_is_not_finite_comes_last(device, operations, made, kind, value, of_features):
    features, values = made(2, 12, 8)
    if of_features:
        features[0, [3, 7], 2] = value
    elif value == 3e38:
        pytest.skip("is finite")
    else:
        values[0, [3, 7]] = value
    others = [place for place in range(12) if place not in (3, 7)]
    select = getattr(operations, kind.name)
    for keep in (4, 10, 11, 12):
        index = check(operations, kind, features, values, keep, tolerance=1e-5)
        without = select(features[:1, others], values[:1, others], keep=min(keep, 10))
        expected = [others[place] for place in without[0].tolist()] + [3, 7][: max(0, keep - 10)]
        assert index[0].tolist() == sorted(expected)


@BOTH
def test_nothing_is_finite(device, operations, kind):
    features, values = torch.full((1, 5, 4), torch.nan, device=device), torch.ones(1, 5, device=device)
    assert getattr(operations, kind.name)(features, values, keep=3).tolist() == [[0, 1, 2]]


@BOTH
def test_equal_tokens(device, operations, made, kind):
    """All the same, or each twice: no token twice, nothing that is not a number, and one of each first."""
    features, values = made(1, 8, 6)
    same = features[:, :1].expand(1, 8, 6)
    ones = torch.ones_like(values)
    assert getattr(operations, kind.name)(same, ones, keep=8).tolist() == [[0, 1, 2, 3, 4, 5, 6, 7]]
    twice = torch.cat((features[:, :4], features[:, :4]), dim=1)
    index = getattr(operations, kind.name)(twice, ones, keep=4)[0]
    assert (index % 4).sort().values.tolist() == [0, 1, 2, 3]
    assert sorted(getattr(operations, kind.name)(twice, ones, keep=8)[0].tolist()) == [0, 1, 2, 3, 4, 5, 6, 7]


@BOTH
def test_tokens_of_zeros_stand_at_right_angles_to_all(device, operations, made, kind):
    features, values = made(1, 10, 8)
    features[0, [2, 5]] = 0.0
    check(operations, kind, features, values, 7, tolerance=1e-5)
    assert getattr(operations, kind.name)(features * 0, torch.ones_like(values), keep=3).tolist() == [[0, 1, 2]]


def test_more_picks_than_the_rank(device, operations):
    """Beyond it no token adds anything, so the smallest places come next: the same at every call."""
    basis = torch.randn(1, 3, 8)
    features = (torch.randn(1, 20, 3) @ basis).to(device)
    relevance = torch.rand(1, 20).to(device) + 0.5
    three = operations.select_dpp(features, relevance, keep=3)[0].tolist()
    for keep in (4, 9, 20):
        others = [place for place in range(20) if place not in three][: keep - 3]
        assert operations.select_dpp(features, relevance, keep=keep)[0].tolist() == sorted(three + others)


def test_tokens_of_no_relevance_come_last(device, operations, made):
    features, relevance = made(1, 10, 16)
    relevance[0, [0, 4]] = 0.0
    index = operations.select_dpp(features, relevance, keep=8)
    assert index.tolist() == [[1, 2, 3, 5, 6, 7, 8, 9]]
    assert 0 in operations.select_dpp(features, relevance, keep=9)[0]


def test_scale_of_features_has_no_effect(operations, made):
    features, values = made(2, 20, 8)
    for kind in (Diverse, Dpp):
        select = getattr(operations, kind.name)
        assert torch.equal(select(features * 2.0**40, values, keep=6), select(features, values, keep=6))


@BOTH
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts(operations, made, kind, layout):
    features, values = made(2, 14, 6)
    check(operations, kind, layout(features), layout(values), 5, tolerance=1e-5)


@BOTH
@pytest.mark.parametrize(
    ("rows", "total", "width", "keep"), [(0, 5, 4, 3), (2, 0, 4, 3), (2, 5, 0, 3), (2, 5, 4, 0), (0, 0, 0, 0)]
)
def test_empty(device, operations, launches, kind, rows, total, width, keep):
    features, values = torch.ones(rows, total, width, device=device), torch.ones(rows, total, device=device)
    index = getattr(operations, kind.name)(features, values, keep=keep)
    expected = torch.arange(keep, device=device).expand(rows, keep)
    assert torch.equal(index, torch.where(expected < total, expected, -1))
    assert all(min(grid) > 0 for _, grid in launches)


@BOTH
@pytest.mark.parametrize(("total", "width"), [(20, 24), (70, 5)], ids=["kept-cosines", "made-anew"])
def test_launches(made, launches, kind, total, width):
    """One for all picks; no memory for the cosines of all pairs where they are more than the features."""
    getattr(rk.triton, kind.name)(*made(3, total, width), keep=6)
    compares = kind is Diverse or total <= width
    assert launches == [("compare_tokens", ((total + 31) // 32, 3))] * compares + [  # of float32
        (kind.name.replace("select", "pick"), (3,))
    ]


@BOTH
def test_memory_grows_with_the_tokens(kind):
    """The reference makes no tensor of all pairs, nor do plans of kernels where rows are wider than tokens."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            result = function(*arguments, **(options or {}))
            tensors = [each for each in tree_leaves(result) if isinstance(each, torch.Tensor)]
            self.elements = max([self.elements, *(each.numel() for each in tensors)])
            return result

    largest = []
    for total in (1024, 4096):
        features, values = torch.randn(1, total, 8), torch.rand(1, total)
        values[0, :4] = torch.tensor([9.0, 8.0, 7.0, 6.0])
        with Largest() as mode:
            getattr(rk.ref, kind.name)(features, values, keep=4)
        largest.append(mode.elements)
    assert largest[1] <= 4 * largest[0] < 1024**2


@BOTH
def test_scratch_grows_with_the_tokens(monkeypatch, kind):
    shapes = []
    scratch = rk.triton.plan.Plan.scratch

    def noted(plan, *shape, dtype):
        shapes.append(shape)
        return scratch(plan, *shape, dtype=dtype)

    monkeypatch.setattr(rk.triton.plan.Plan, "scratch", noted)
    monkeypatch.setattr(rk.triton.plan.Plan, "run", lambda plan, inputs: [None])
    getattr(rk.triton, kind.name)(torch.empty(1, 16384, 16), torch.empty(1, 16384), keep=4)
    assert shapes
    assert max(shape[-1] * shape[-2] for shape in shapes) <= 4 * 16384


@BOTH
def test_tokens_far_apart(device, far_apart, kind):
    features = far_apart(4, torch.float32)
    features.copy_(torch.tensor([[[1.0, 0, 0, 0], [1, 0.1, 0, 0], [0, 0, 1, 0], [0, 1, 0, 0.5]]], device=device))
    index = getattr(rk.triton, kind.name)(features, torch.ones(1, 4, device=device), keep=3)
    assert torch.equal(
        index, getattr(rk.ref, kind.name)(features.contiguous(), torch.ones(1, 4, device=device), keep=3)
    )


@BOTH
def test_more_rows_than_a_grid_takes(made, monkeypatch, kind):
    features, values = made(5, 12, 4)
    lengths = torch.tensor([12, 3, 0, 7, 9], device=features.device)
    select = getattr(rk.triton, kind.name)
    expected = select(features, values, keep=4, lengths=lengths)
    rk.triton.plan.forget_plans()
    for module in (rk.triton.launch, rk.triton.diverse, rk.triton.dpp):
        monkeypatch.setattr(module, "MAX_PROGRAMS", 2)
    assert torch.equal(select(features, values, keep=4, lengths=lengths), expected)


@BOTH
@pytest.mark.parametrize("width", [200, 20], ids=["kept-cosines", "made-anew"])
def test_several_tiles(operations, made, kind, width):
    check(operations, kind, *made(1, 150, width), 5, tolerance=1e-5)


@BOTH
def test_inputs_stay_as_they_were(device, operations, made, kind):
    given = *made(2, 20, 8), torch.tensor([20, 9], device=device)
    before = [each.clone() for each in given]
    index = getattr(operations, kind.name)(*given[:2], keep=5, lengths=given[2])
    assert all(map(torch.equal, given, before))
    assert torch.equal(getattr(operations, kind.name)(*given[:2], keep=5, lengths=given[2]), index)


@BOTH
def test_rows_do_not_depend_on_each_other(device, operations, made, kind):
    features, values = made(4, 20, 8)
    select = getattr(operations, kind.name)
    index, order = select(features, values, keep=6), torch.tensor([2, 0, 3, 1], device=device)
    assert torch.equal(select(features[order], values[order], keep=6), index[order])
    assert torch.equal(select(features[2:3], values[2:3], keep=6), index[2:3])


@BOTH
def test_has_no_gradient(made, kind):
    features, values = made(1, 8, 4)
    index = getattr(rk.ops, kind.name)(features.requires_grad_(), values.requires_grad_(), keep=3)
    assert not index.requires_grad


@pytest.mark.parametrize("keep", [-1, 2**63])
@BOTH
def test_refuses_counts(made, kind, keep):
    with pytest.raises(ValueError, match=f"^keep must be 0 or more, and below 2\\*\\*63, got {keep}$"):
        getattr(rk.ops, kind.name)(*made(), keep=keep)


@pytest.mark.parametrize("keep", [True, 2.0, None, torch.tensor(3)])
@BOTH
def test_refuses_what_is_no_count(made, kind, keep):
    with pytest.raises(TypeError, match=r"^keep must be an integer, got "):
        getattr(rk.ops, kind.name)(*made(), keep=keep)


@BOTH
def test_refuses_what_is_no_tensor(made, kind):
    features, values = made()
    for position, name in enumerate(("features", kind.values)):
        given = [features, values]
        given[position] = "tokens"
        with pytest.raises(TypeError, match=f"^{name} must be a tensor, got str$"):
            getattr(rk.ops, kind.name)(*given, keep=3)
    with pytest.raises(TypeError, match=r"^lengths must be a tensor, got list$"):
        getattr(rk.ops, kind.name)(features, values, keep=3, lengths=[1, 2])
