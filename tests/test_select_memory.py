"""Selection by scores in which those of the decision before live on, in both backends."""

import re

import pytest
import torch

import reroute_kernels as rk
from reroute_kernels.attention import TENSORS
from reroute_kernels.memory import Memory
from reroute_kernels.triton import launch, select
from tests.conftest import LAYOUTS
from tests.test_route import decision, one_after_the_other
from tests.test_select import random_flags, sorted_selection

KINDS = ("first", "same places", "other places")


def memory_of(kind, scores, decay=0.3):
    """A memory; one of other places holds less than there are scores, and knows nothing of some tokens."""
    batch, length = scores.shape
    if kind == "first":
        return Memory(decay)
    remembered = length if kind == "same places" else length // 2 + 3
    before = torch.rand(batch, remembered).to(scores.device) / length
    if kind == "same places":
        return Memory(decay, before)
    places = torch.randint(-2, remembered + 2, (batch, length))
    places[0, 0] = 2**40
    return Memory(decay, before, places.to(scores.device))


def by_hand(scores, pool, memory):
    """The scores that rank, in float64, one token at a time."""
    ranked = []
    for sample, row in enumerate(scores.double().tolist()):
        total = sum(score for score, flag in zip(row, pool[sample].tolist(), strict=True) if flag)
        ranked.append([])
        for token, score in enumerate(row):
            before = 0.0
            if memory.scores is not None:
                place = token if memory.places is None else int(memory.places[sample, token])
                if 0 <= place < memory.scores.shape[1]:
                    before = float(memory.scores[sample, place])
            ranked[-1].append((score / total if total > 0 else 0.0) + memory.decay * before)
    return torch.tensor(ranked, dtype=torch.float64, device=scores.device)


LENGTHS = [(1, 2), (63, 2), (257, 2), (4096, 1), (4097, 1)]


@pytest.mark.parametrize(
    ("length", "batch", "kind"),
    [(*shape, kind) for shape in LENGTHS for kind in KINDS]
    + [(12_000, 1, "other places"), (65_537, 1, "other places")],
)
def test_equals_the_rule_by_hand(device, operations, launches, length, batch, kind):
    scores = torch.rand(batch, length).to(device)
    pool, pinned = random_flags(device, batch, length)
    pool[0, 0] = True
    memory = memory_of(kind, scores)
    keep = torch.tensor([length // 4, 3][:batch], device=device)
    width = length // 4 + 3 + int(pinned.sum(1).max())
    index, ranked = operations.select_tokens(scores, pool, pinned, keep, width, memory)
    if operations is rk.triton:
        assert len(launches) == (1 if length <= 65_536 else 5), "as many as without a memory"
    expected = by_hand(scores, pool, memory)
    torch.testing.assert_close(ranked.double(), expected, atol=1e-9, rtol=1e-6)
    assert torch.equal(index, sorted_selection(ranked, pool, pinned, keep, width))
    reference = rk.ref.select_tokens(scores, pool, pinned, keep, width, memory)
    torch.testing.assert_close(ranked, reference[1], atol=1e-9, rtol=1e-6)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(
    ("total", "length"), [("zero", 40), ("infinite", 40), ("nan", 40), ("overflowing", 40), ("nan", 4100)]
)
def test_a_sum_that_divides_nothing_leaves_what_is_remembered(device, operations, total, length):
    value = {"zero": 0.0, "infinite": torch.inf, "nan": torch.nan, "overflowing": 3e38}[total]
    scores = torch.full((2, length), value, device=device)
    scores[1] = torch.rand(length).to(device)
    pool, pinned = torch.ones(2, length, dtype=torch.bool, device=device), torch.zeros_like(scores, dtype=torch.bool)
    keep = torch.tensor([5, 5], device=device)
    memory = memory_of("same places", scores)
    index, ranked = operations.select_tokens(scores, pool, pinned, keep, 5, memory)
    torch.testing.assert_close(ranked[0], 0.3 * memory.scores[0], atol=0, rtol=1e-6)
    assert torch.equal(index, sorted_selection(ranked, pool, pinned, keep, 5))
    index, ranked = operations.select_tokens(scores, pool, pinned, keep, 5, Memory(0.3))
    assert index[0].tolist() == [0, 1, 2, 3, 4]
    assert not ranked[0].any()
    assert ranked[1].isfinite().all()


def test_the_sum_is_over_the_pool(device, operations):
    """Pinned tokens in it count; scores outside it do not, whatever they are."""
    scores = torch.tensor([[1.0, 2.0, 5.0, torch.nan, torch.inf, 100.0]], device=device)
    pool = torch.tensor([[True, True, True, False, False, False]], device=device)
    pinned = torch.tensor([[False, True, False, True, False, False]], device=device)
    keep = torch.tensor([1], device=device)
    index, ranked = operations.select_tokens(scores, pool, pinned, keep, 3, Memory(0.5))
    assert ranked[0, :3].tolist() == [0.125, 0.25, 0.625]
    assert index.tolist() == [[1, 2, 3]]


def test_padding_changes_no_bit(device, operations):
    scores = torch.rand(1, 300).to(device)
    pool, pinned = random_flags(device, 1, 300)
    memory = memory_of("same places", scores)
    keep = torch.tensor([40], device=device)
    index, ranked = operations.select_tokens(scores, pool, pinned, keep, 120, memory)
    for left, right in ((0, 77), (130, 0), (3000, 900)):
        wide = [torch.nn.functional.pad(each, (left, right)) for each in (scores, pool, pinned, memory.scores)]
        later, shares = operations.select_tokens(*wide[:3], keep, 120, Memory(0.3, wide[3]))
        assert torch.equal(shares[:, left : left + 300], ranked)
        assert torch.equal(later, torch.where(index < 0, -1, index + left))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts(device, layout):
    scores = torch.rand(3, 40).to(device)
    pool, pinned = random_flags(device, 3, 40)
    memory, keep = memory_of("other places", scores), torch.tensor([4, 5, 6], device=device)
    laid_out = Memory(0.3, layout(memory.scores), layout(memory.places))
    dense = Memory(0.3, *(x.clone(memory_format=torch.contiguous_format) for x in laid_out.operands()))
    result = rk.triton.select_tokens(scores, pool, pinned, keep, 20, laid_out)
    expected = rk.ref.select_tokens(scores, pool, pinned, keep, 20, dense)
    assert torch.equal(result[0], expected[0])
    torch.testing.assert_close(result[1], expected[1], atol=1e-9, rtol=1e-6)


@pytest.mark.parametrize(("batch", "length", "width"), [(0, 5, 3), (2, 0, 3), (2, 5, 0), (0, 0, 0)])
def test_empty(device, operations, batch, length, width):
    scores = torch.rand(batch, length, device=device)
    flags = torch.ones(batch, length, dtype=torch.bool, device=device)
    keep = torch.zeros(batch, dtype=torch.int64, device=device)
    for memory in (Memory(0.5), Memory(0.5, scores)):
        index, ranked = operations.select_tokens(scores, flags, ~flags, keep, width, memory)
        assert (index.shape, ranked.shape) == ((batch, width), (batch, length))
        assert (index == -1).all()
        if batch * length:
            torch.testing.assert_close(ranked, by_hand(scores, flags, memory).float())
    nothing = Memory(0.5, scores[:, :0], torch.full(flags.shape, -1, device=device))
    assert operations.select_tokens(scores, flags, ~flags, keep, width, nothing)[1].shape == (batch, length)


@pytest.mark.parametrize("kind", KINDS)
def test_more_samples_than_a_grid_takes(device, monkeypatch, kind):
    scores = torch.rand(5, 70).to(device)
    pool, pinned = random_flags(device, 5, 70)
    arguments = scores, pool, pinned, torch.arange(5, device=device), 30, memory_of(kind, scores)
    expected = rk.triton.select_tokens(*arguments)
    for module in (launch, select):
        monkeypatch.setattr(module, "MAX_PROGRAMS", 2)
    rk.triton.plan.forget_plans()
    assert all(map(torch.equal, rk.triton.select_tokens(*arguments), expected))
    rk.triton.plan.forget_plans()


def test_inputs_stay_as_they_were(device, operations):
    scores = torch.rand(2, 50).to(device)
    pool, pinned = random_flags(device, 2, 50)
    memory, keep = memory_of("other places", scores), torch.tensor([4, 5], device=device)
    before = [each.clone() for each in (scores, *memory.operands())]
    results = operations.select_tokens(scores, pool, pinned, keep, 20, memory)
    for each in results:
        each.fill_(7)
    assert all(map(torch.equal, (scores, *memory.operands()), before))


# A whole decision


@pytest.mark.parametrize(
    ("shape", "kind"), [*(((2, 40), kind) for kind in KINDS), ((1, 4097, 1, 1, 1, 4), "other places")]
)
def test_a_decision_equals_its_operations(device, operations, launches, shape, kind):
    arguments = decision(device, *shape)
    memory = memory_of(kind, arguments["query"].new_empty(*shape[:2]))
    *result, ranked = operations.route_tokens(**arguments, return_scores=True, memory=memory)
    if operations is rk.triton:
        assert len(launches) == 4, "as many as without a memory"
    scores = operations.rank_tokens(**{name: arguments[name] for name in ("query", "key", "cos", "sin")})
    selection = {name: arguments[name] for name in ("pool", "pinned", "keep", "length")}
    index, expected = operations.select_tokens(scores, **selection, memory=memory)
    assert torch.equal(ranked, expected)
    assert torch.equal(result[0], index)
    assert all(map(torch.equal, result[1], operations.gather_tokens(index, *arguments["tensors"])))
    short = operations.route_tokens(**arguments, memory=memory)
    assert len(short) == 2
    assert torch.equal(short[0], index)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_decision_without_remembrance_is_the_same_selection(device, operations):
    arguments = decision(device, 2, 30, padded=True)
    index, _ = operations.route_tokens(**arguments, memory=Memory(0.3))
    assert torch.equal(index, one_after_the_other(operations, arguments)[0])


# The public operation


@pytest.fixture
def given(device):
    scores = torch.rand(2, 20).to(device)
    flags = (torch.arange(20, device=device) % 5 == 0).expand(2, 20)
    keep = torch.tensor([3, 5], device=device)
    return {"scores": scores, "pool": ~flags, "pinned": flags, "keep": keep, "length": 12}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ["ref", "triton"])
def test_registered(given, device, backend, kind):
    memory = memory_of(kind, given["scores"])
    expected = getattr(rk, backend).select_tokens(**given, memory=memory)
    with rk.backend(backend):
        direct = rk.ops.select_tokens(**given, memory=memory)
        needs_gradient = given | {"scores": given["scores"].clone().requires_grad_()}
        registered = rk.ops.select_tokens(**needs_gradient, memory=memory._replace(decay=0.3))
        operation = torch.ops.reroute_kernels.select_remembered.default
        torch.library.opcheck(operation, (*given.values(), *memory))
        arguments = decision(device, 2, 20)
        ranking = [arguments.pop(name) for name in TENSORS]
        operation = torch.ops.reroute_kernels.route_tokens.default
        options = 0.25, "mean", "mean", "rotate_half"
        selection = [arguments[name] for name in ("pool", "pinned", "keep", "length", "tensors")]
        torch.library.opcheck(operation, (*ranking, *options, *selection, *memory))
    for results in (direct, registered):
        assert all(map(torch.equal, results, expected))
    assert not registered[1].requires_grad


def test_compiled(given):
    def twice(scores, pool, pinned, keep):
        index, ranked = rk.ops.select_tokens(scores, pool, pinned, keep, 12, Memory(0.3))
        return rk.ops.select_tokens(scores.flip(1), pool, pinned, keep, 12, Memory(0.3, ranked)), index

    values = list(given.values())[:4]
    with rk.backend("ref"):
        (index, ranked), first = torch.compile(twice, fullgraph=True, backend="aot_eager")(*values)
        (expected, shares), before = twice(*values)
    assert torch.equal(index, expected)
    assert torch.equal(first, before)
    assert torch.equal(ranked, shares)


REFUSED = [
    (0.3, TypeError, "memory must be a Memory or None, got 0.3"),
    (Memory("much"), TypeError, "memory.decay must be a real number, got 'much'"),
    (Memory(True), TypeError, "memory.decay must be a real number, got True"),
    (Memory(-0.5), ValueError, "memory.decay must be 0 or more, got -0.5"),
    (Memory(torch.nan), ValueError, "memory.decay must be 0 or more, got nan"),
    (Memory(0.3, [1.0]), TypeError, "memory.scores must be a tensor, got list"),
    (Memory(0.3, torch.zeros(2, 19)), ValueError, "memory.scores must be (2, 20) float32 on cpu, got (2, 19) "),
    (Memory(0.3, torch.zeros(3, 20)), ValueError, "memory.scores must be (2, 20) float32 on cpu, got (3, 20) "),
    (Memory(0.3, torch.zeros(2, 20).half()), ValueError, "memory.scores must be (2, 20) float32 on cpu, got (2, 20) "),
    (
        Memory(0.3, torch.zeros(2), torch.zeros(2, 20).long()),
        ValueError,
        "memory.scores must be (2, P) float32 on cpu, got (2,) torch.float32",
    ),
    (
        Memory(0.3, torch.zeros(2, 9), torch.zeros(2, 9).long()),
        ValueError,
        "memory.places must be (2, 20) int64 on cpu, got (2, 9) torch.int64",
    ),
    (
        Memory(0.3, None, torch.zeros(2, 20).long()),
        ValueError,
        "memory.places must come with memory.scores, got them alone",
    ),
]


@pytest.mark.parametrize(("memory", "error", "message"), REFUSED, ids=[message for *_, message in REFUSED])
@pytest.mark.parametrize("backend", ["ref", "triton"])
def test_refuses_and_says_why(device, given, launches, backend, memory, error, message):
    if device.type != "cpu":
        pytest.skip("tensors of this file are on the CPU")
    whole = decision(device, 2, 20)
    with rk.backend(backend):
        with pytest.raises(error, match=re.escape(message)):
            rk.ops.select_tokens(**given, memory=memory)
        with pytest.raises(error, match=re.escape(message)):
            rk.ops.route_tokens(**whole, memory=memory)
    assert not launches
