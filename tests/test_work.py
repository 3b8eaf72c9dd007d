"""Work of a decision beside the model's own modules, counted: kernel launches, other operators, host transfers."""

from collections import Counter

import pytest
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import reroute_kernels as rk
from reroute_kernels.attention import Attention
from reroute_kernels.memory import Memory
from reroute_kernels.prompt import Prompt
from reroute_kernels.rankings import LastQuery, Mixed, Norm, Remembered
from reroute_kernels.routing import RoutedForward
from reroute_kernels.triton.plan import forget_plans
from tests.conftest import HAS_GPU
from tests.test_route import decision

# Operators that only look at memory in another way, or take it; the rest start work on the device.
FREE = {
    "alias",
    "as_strided",
    "detach",
    "empty",
    "empty_like",
    "empty_strided",
    "expand",
    "flatten",
    "lift_fresh",
    "new_empty",
    "reshape",
    "select",
    "slice",
    "squeeze",
    "transpose",
    "unbind",
    "unflatten",
    "unsqueeze",
    "view",
}
DECISION = ["attention_logits", "reduce_attention", "select_and_compact", "copy_rows_to_compact"]


@pytest.fixture
def work(monkeypatch):
    """Counts the work of a call by the profiler: Triton launches in order, and operators that are not free."""
    from triton.runtime.jit import KernelInterface

    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    launch_on = KernelInterface.__getitem__
    launched = []

    def recording(kernel, grid):
        def launch(*args, **kwargs):
            launched.append(kernel.__name__)
            if HAS_GPU:  # the interpreter itself would use operators
                launch_on(kernel, grid)(*args, **kwargs)

        return launch

    def count(call):
        with rk.backend("triton"):
            if HAS_GPU:
                call()  # compiles
                forget_plans()  # whose launches go another way
            monkeypatch.setattr(KernelInterface, "__getitem__", recording)
            launched.clear()
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if HAS_GPU else [])]
            with profile(activities=activities) as record:
                call()
            monkeypatch.setattr(KernelInterface, "__getitem__", launch_on)
        names = Counter(event.name for event in record.events())
        operators = {name.removeprefix("aten::"): n for name, n in names.items() if name.startswith("aten::")}
        if HAS_GPU:
            on_device = [event.name for event in record.events() if event.device_type == DeviceType.CUDA]
            assert not [name for name in on_device if "Memcpy" in name]
            assert not [name for name in names if "StreamSynchronize" in name]
            assert len(on_device) == len(launched) + sum(n for name, n in operators.items() if name not in FREE)
        return list(launched), {name: n for name, n in operators.items() if name not in FREE}

    return count


@pytest.mark.parametrize("padded", [False, True], ids=["no-mask", "padding"])
def test_a_decision_is_four_launches_and_nothing_else(device, work, padded):
    arguments = decision(device, 3, 200, 2, padded=padded, past=50 if padded else 0)
    assert work(lambda: rk.ops.route_tokens(**arguments)) == (DECISION, {})


@pytest.mark.skipif(HAS_GPU, reason="operators of PyTorch may take several launches there")
def test_finding_the_last_tokens_of_a_mask(device, work):
    """A caller who gives the places of the queries saves these operators."""
    arguments = decision(device, 3, 200, 2, padded=True) | {"query_index": None}
    launches, others = work(lambda: rk.ops.route_tokens(**arguments))
    assert launches == DECISION
    assert others.keys() - {"resize_", "scalar_tensor", "to"} == {"arange", "where", "topk", "flip"}


@pytest.mark.parametrize("length", [200, 5000])
def test_a_memory_takes_nothing_more(device, work, length):
    arguments, select = decision(device, 1, length), "select_and_compact" if length == 200 else "select_in_passes"
    expected = ["attention_logits", "reduce_attention", select, "copy_rows_to_compact"]
    memory = Memory(0.3, torch.rand(1, 300, device=device), torch.arange(length, device=device)[None])
    for each in (None, Memory(0.3), memory):
        assert work(lambda memory=each: rk.ops.route_tokens(**arguments, memory=memory)) == (expected, {})


def test_a_decision_on_a_long_sequence(device, work):
    arguments = decision(device, 1, 5000)
    expected = ["attention_logits", "reduce_attention", "select_in_passes", "copy_rows_to_compact"]
    assert work(lambda: rk.ops.route_tokens(**arguments)) == (expected, {})


def test_a_decision_on_a_very_long_sequence(device, work):
    arguments = decision(device, 1, 66_000)
    launches, others = work(lambda: rk.ops.route_tokens(**arguments))
    digits = ["count_digits"] * 4
    expected = ["attention_logits", "reduce_attention", *digits, "compact_tiles", "copy_rows_to_compact"]
    assert (launches, others) == (expected, {})
    memory = Memory(0.3, torch.rand(1, 66_000, device=device))
    assert work(lambda: rk.ops.route_tokens(**arguments, memory=memory)) == (expected, {})


def test_scatter_is_one_launch(device, work):
    full, compact = torch.randn(2, 30, 8, device=device), torch.randn(2, 3, 8, device=device)
    index = torch.tensor([[0, 3, 4], [2, -1, 5]], device=device)
    assert work(lambda: rk.ops.scatter_tokens_(full, index, compact)) == (["copy_rows_to_full"], {})


@pytest.mark.parametrize("writes", [True, False], ids=["write", "no-write"])
def test_a_write_back_with_the_norm_is_one_launch(device, work, writes):
    full, compact = torch.randn(2, 30, 8, device=device), torch.randn(2, 3, 8, device=device)
    index, weight = torch.tensor([[0, 3, 4], [2, 5, -1]], device=device), torch.randn(8, device=device)
    given = (index, compact) if writes else (None, None)
    assert work(lambda: rk.ops.scatter_norm_tokens_(full, *given, weight, 1e-6)) == (["normalize_rows"], {})


def test_an_alignment_is_two_launches_and_nothing_else(device, work):
    full, compact = torch.randn(2, 30, 8, device=device), torch.randn(2, 3, 8, device=device)
    index = torch.tensor([[0, 3, 4], [2, 5, -1]], device=device)
    pool = (torch.arange(30, device=device) % 3 > 0).repeat(2, 1)
    assert work(lambda: rk.ops.align_tokens_(full, index, compact, pool)) == (["sum_changes", "follow_changes"], {})


@pytest.mark.parametrize("packed", [False, True])
def test_a_saliency_is_two_launches_and_nothing_else(device, work, packed):
    query, key = torch.randn(2, 40, 4, 16, device=device), torch.randn(2, 40, 2, 16, device=device)
    bounds = torch.tensor([0, 7, 40], device=device) if packed else None
    assert work(lambda: rk.ops.column_saliency(query, key, bounds)) == (["softmax_statistics", "sum_columns"], {})


def test_a_merge_is_one_launch_and_nothing_else(device, work):
    features, assignment = torch.randn(2, 30, 8, device=device), torch.arange(60, device=device).view(2, 30) % 7
    assert work(lambda: rk.ops.merge_tokens(features, assignment, 5)) == (["merge_rows"], {})


def test_the_count_sees_transfers_and_other_work(device, work):
    numbers = torch.ones(3, device=device)
    if HAS_GPU:
        with pytest.raises(AssertionError, match="Memcpy"):
            work(lambda: numbers.sum().item())
    else:
        _, others = work(lambda: numbers.sum().item() + len(numbers.nonzero()))
        assert others["sum"] == others["item"] == others["nonzero"] == 1
    _, others = work(lambda: numbers + numbers)
    assert others == {"add": 1}


class Forward:
    """A routed prefill without a model: tensors as between its layers."""

    layer_norm = None

    def __init__(self, device, action, lefts, ranking="last_query"):
        length = 60
        valid = torch.arange(length, device=device) >= torch.tensor(lefts, device=device)[:, None]
        places = torch.arange(length, device=device).expand(len(lefts), -1)
        visual = (places >= 20) & (places < 50) & valid
        policy = rk.Policy([rk.Stage(1, 0.5), rk.Stage(2, 0.3), rk.Stage(3, 0.2)], action, ranking)
        self.routed = RoutedForward(policy, Prompt(visual, valid))
        self.hidden = torch.randn(len(lefts), length, 16, device=device)
        self.tables = tuple(torch.randn(len(lefts), length, 8, device=device) for _ in range(2))
        self.query = torch.randn(len(lefts), 1, 4, 8, device=device)
        self.key = torch.randn(len(lefts), length, 2, 8, device=device)

    def norm(self, hidden):
        return self.layer_norm

    def attention(self, hidden, rotary, key_mask, positions, states):
        assert (states is None) == (self.layer_norm is None)
        cos, sin = rotary or (None, None)
        key = self.key[:, : hidden.shape[1]]
        return Attention(self.query, key, cos, sin, key_mask=key_mask, query_index=positions)

    def decide(self):
        self.hidden = self.routed.decide(self.hidden, self.tables, self)

    def finish(self):
        self.hidden = self.routed.finish(self.hidden)


SCATTER_FIRST = ["copy_rows_to_full", *DECISION]
# The full sequence is copied before it is written to if the model or a ranking made it: hooks may hold it.
COPIED = {"clone": 1, "copy_": 1}


@pytest.mark.skipif(HAS_GPU, reason="calls once, and a GPU compiles on the first call")
@pytest.mark.parametrize("ranking", [LastQuery(), Remembered(LastQuery())], ids=["", "remembered"])
@pytest.mark.parametrize("action", ["reroute", "remove"])
def test_decisions_of_a_prefill(device, work, action, ranking):
    """Remembering adds no launch, and no other work."""
    forward = Forward(device, action, [0, 0], ranking)
    # Under `remove`, places among the survivors are looked up in the full sequence.
    lookup = {"lt": 1, "where": 1} if action == "remove" else {}
    assert work(forward.decide) == (DECISION, {})
    assert work(forward.decide) == (SCATTER_FIRST, {**COPIED, **lookup})
    copied = COPIED if action == "reroute" else {}
    assert work(forward.decide) == (SCATTER_FIRST, {**copied, **lookup})
    assert work(forward.finish) == (["copy_rows_to_full"], copied)


@pytest.mark.skipif(HAS_GPU, reason="calls once, and a GPU compiles on the first call")
@pytest.mark.parametrize("action", ["reroute", "remove"])
def test_decisions_with_the_norm(device, work, action):
    """One launch more at the first decision and where survivors alone are ranked, else in place of the write-back."""
    forward = Forward(device, action, lefts=[0, 0])
    forward.layer_norm = Norm(torch.ones(16, device=device), 1e-6, False)
    decision = ["normalize_rows", *DECISION]
    lookup = {"lt": 1, "where": 1} if action == "remove" else {}
    assert work(forward.decide) == (decision, {})
    later = decision if action == "reroute" else ["copy_rows_to_full", *decision]
    assert work(forward.decide) == (later, {**COPIED, **lookup})
    assert work(forward.decide) == (later, lookup)  # no one asked for the hidden states, which are written to again
    assert work(forward.finish) == (["copy_rows_to_full"], {})


class Holding(rk.rankings.LastQuery):
    """A ranking that keeps the hidden states that it was handed."""

    def __init__(self, held):
        super().__init__()
        object.__setattr__(self, "held", held)

    def rank(self, candidates):
        self.held.append(candidates.hidden)
        return super().rank(candidates)


@pytest.mark.skipif(HAS_GPU, reason="calls once, and a GPU compiles on the first call")
def test_hidden_states_that_a_ranking_keeps_are_not_written_to(device):
    held, values = [], []
    forward = Forward(device, "reroute", lefts=[0, 0], ranking=Holding(held))
    forward.layer_norm = Norm(torch.ones(16, device=device), 1e-6, False)
    with rk.backend("triton"):
        for _ in range(3):
            forward.decide()
            values.append(held[-1].clone())
            forward.hidden = forward.hidden + 1
        forward.finish()
    assert len({hidden.data_ptr() for hidden in held}) == 3
    assert all(map(torch.equal, held, values))


@pytest.mark.skipif(HAS_GPU, reason="calls once, and a GPU compiles on the first call")
def test_a_mixed_decision(device, work):
    """A few operators on flags, and none on scores."""
    forward = Forward(device, "reroute", [0, 0], Mixed(LastQuery(rotary=False)))
    launches, others = work(forward.decide)
    assert launches == DECISION
    flags = {
        "to": 2,
        "_to_copy": 1,
        "copy_": 1,
        "cumsum": 1,
        "clamp": 1,
        "mul": 2,
        "sub": 2,
        "floor_divide": 2,
        "gt": 1,
        "bitwise_and": 1,
        "bitwise_or": 1,
    }
    assert {name: n for name, n in others.items() if name not in ("clamp_min", "__and__", "__or__")} == flags


@pytest.mark.skipif(HAS_GPU, reason="calls once, and a GPU compiles on the first call")
@pytest.mark.parametrize("action", ["reroute", "remove"])
def test_decisions_of_a_padded_prefill(device, work, action):
    forward = Forward(device, action, lefts=[0, 7])
    ragged = {"ge": 1}  # which rows of the compact sequence hold a token
    lookup = {"lt": 1, "where": 1} if action == "remove" else {}
    assert work(forward.decide) == (DECISION, ragged)
    assert work(forward.decide) == (SCATTER_FIRST, {**COPIED, **ragged, **lookup})
    copied = COPIED if action == "reroute" else {}
    assert work(forward.decide) == (SCATTER_FIRST, {**copied, **ragged, **lookup})
    assert work(forward.finish) == (["copy_rows_to_full"], copied)
