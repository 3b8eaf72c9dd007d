"""Norms of layers that one launch computes with the write-back: which they are, and that nothing else changes."""

import importlib
from contextlib import contextmanager

import pytest
import torch
from torch import nn

import reroute_kernels as rk
from reroute_kernels.models.norms import ROUNDED_FIRST, ZERO_CENTERED, known_norm
from tests.models.families import MODELS, load
from tests.models.prompts import selections
from tests.models.slow_way import decoder_of

SCHEDULE = (rk.Stage(1, 0.5), rk.Stage(3, 0.25))  # layers with full attention in every family
WITHOUT = ("aya_vision",)  # which has a LayerNorm


def norm_of(name, width=48, dtype=torch.float32):
    """A module of a class, with random weights."""
    module, _, kind = name.rpartition(".")
    norm = getattr(importlib.import_module(module), kind)(width, eps=1e-5).to(dtype)
    norm.weight.data.normal_(0.5, 1)
    return norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ROUNDED_FIRST + ZERO_CENTERED)
@torch.no_grad()
def test_known_classes_compute_as_the_reference_does(name, dtype):
    """Bit for bit."""
    norm, hidden = norm_of(name, dtype=dtype), 3 * torch.randn(2, 9, 48).to(dtype)
    weight, eps, one_plus = known_norm(norm, hidden)
    assert (weight is norm.weight, eps, one_plus) == (True, 1e-5, name in ZERO_CENTERED)
    expected = norm(hidden)
    assert expected.dtype == dtype
    assert torch.equal(rk.ref.scatter_norm_tokens_(hidden, None, None, weight, eps, one_plus=one_plus), expected)


@pytest.mark.parametrize("name", MODELS)
def test_norms_of_every_family(name):
    """The class that its decision layers begin with is known, under every supported transformers."""
    for layer in decoder_of(load(name).model).layers:
        assert (known_norm(layer.input_layernorm, torch.zeros(1, 1, 64)) is None) == (name in WITHOUT)


def hooked(norm):
    norm.register_forward_hook(lambda *_: None)


def hooked_before(norm):
    norm.register_forward_pre_hook(lambda *_: None)


def with_forward(norm):
    norm.forward = lambda hidden: hidden


def accelerated(norm):
    norm._hf_hook = object()


class Subclass(type(norm_of(ROUNDED_FIRST[2]))):
    pass


def subclassed(norm):
    norm.__class__ = Subclass


def doubled(norm):
    nn.utils.parametrize.register_parametrization(norm, "weight", nn.Identity())


class Weight(nn.Parameter):
    pass


def weighted_otherwise(norm):
    norm.weight = Weight(norm.weight.data)


def of_another_width(norm):
    norm.weight.data = torch.ones(47)


CHANGES = [
    hooked,
    hooked_before,
    with_forward,
    accelerated,
    subclassed,
    doubled,
    weighted_otherwise,
    of_another_width,
    lambda norm: norm.to(torch.bfloat16),
    lambda norm: norm.to("meta"),
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changed_modules_are_left_to_themselves(change):
    norm, hidden = norm_of(ROUNDED_FIRST[2]), torch.randn(1, 3, 48)
    assert known_norm(norm, hidden) is not None
    change(norm)
    assert known_norm(norm, hidden) is None


def test_other_modules_are_left_to_themselves():
    norm, hidden = norm_of(ROUNDED_FIRST[2]), torch.randn(1, 3, 48)
    assert known_norm(torch.compile(norm), hidden) is None
    assert known_norm(nn.RMSNorm(48), hidden) is None
    assert known_norm(nn.Sequential(norm), hidden) is None
    assert known_norm(norm_of(ROUNDED_FIRST[2]).double(), hidden.double()) is None


def test_hooks_of_all_modules(monkeypatch):
    norm, hidden = norm_of(ROUNDED_FIRST[2]), torch.randn(1, 3, 48)
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert known_norm(norm, hidden) is None
    finally:
        handle.remove()
    assert known_norm(norm, hidden) is not None
    monkeypatch.setattr(type(norm), "forward", lambda norm, hidden: hidden)
    assert known_norm(norm, hidden) is None


@contextmanager
def hooks_on_norms(model):
    handles = [layer.input_layernorm.register_forward_hook(lambda *_: None) for layer in decoder_of(model).layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def run(case, inputs, policy, launches):
    """Logits, trace and names of the kernels of a prompt, by the kernels."""
    launches.clear()
    with rk.backend("triton"), rk.apply(case.model, policy) as routing, torch.no_grad():
        logits = case.model(**inputs).logits
        return logits, routing.trace, [name for name, _ in launches]


def check(case, inputs, policy, launches):
    """The same with and without the launch for the norm; returns the kernels of both."""
    logits, trace, names = run(case, inputs, policy, launches)
    with hooks_on_norms(case.model):
        expected, other, without = run(case, inputs, policy, launches)
    samples = range(len(inputs["input_ids"]))
    assert [selections(trace, row) for row in samples] == [selections(other, row) for row in samples]
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    for stage, another in zip(trace.stages, other.stages, strict=True):
        for scores, wanted in zip(stage.scores, another.scores, strict=True):
            torch.testing.assert_close(scores, wanted, atol=1e-5, rtol=1e-4, equal_nan=True)
    return names, without


pytest_device = pytest.mark.skipif(torch.cuda.is_available(), reason="the models of this file are on the CPU")


@pytest.mark.everyday(7)
@pytest_device
@pytest.mark.parametrize("name", MODELS)
def test_same_with_and_without(name, launches):
    case = load(name)
    names, without = check(case, case.batch([case.prompt(1, 6, 15, seed=1)]), rk.Policy(SCHEDULE), launches)
    assert names.count("normalize_rows") == (0 if name in WITHOUT else 2)
    assert names.count("copy_rows_to_full") == (2 if name in WITHOUT else 1)
    assert without.count("normalize_rows") == 0
    assert without.count("copy_rows_to_full") == 2


RANKINGS = [
    # family, action, ranking, samples: each row of them is a program
    ("qwen2_vl", "reroute", rk.rankings.LastQuery("previous"), 1),
    ("qwen2_vl", "reroute", rk.rankings.LastQuery(queries=2), 2),
    ("qwen2_vl", "reroute", rk.rankings.KeyNorm(), 1),
    ("qwen2_vl", "remove", rk.rankings.LastQuery(), 1),
    ("qwen2_vl", "remove", rk.rankings.KeyNorm("previous"), 2),
    ("qwen3_vl", "reroute", rk.rankings.KeyNorm(), 1),
]


@pytest.mark.everyday(3)
@pytest_device
@pytest.mark.parametrize(("name", "action", "ranking", "samples"), RANKINGS, ids=str)
def test_rankings(name, ranking, action, samples, launches):
    case = load(name)
    inputs = case.batch([case.prompt(1, 6, 15, seed=1), case.prompt(1, 3, 9, seed=2)][:samples])
    names, without = check(case, inputs, rk.Policy(SCHEDULE, action, ranking), launches)
    assert names.count("normalize_rows") == 2
    fewer = without.count("copy_rows_to_full") - names.count("copy_rows_to_full")
    assert fewer == (1 if action == "reroute" else 0)  # those of survivors alone are not of what was written


@pytest_device
def test_left_padded_rows(launches):
    """Rows of compact sequences are padded on the left where layers see a window or keep a state."""
    case = load("qwen3_5")
    inputs = case.batch([case.prompt(1, 6, 15, seed=1), case.prompt(1, 3, 9, seed=2)])
    names, _ = check(case, inputs, rk.Policy(SCHEDULE), launches)
    assert names.count("normalize_rows") == 2


@pytest_device
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_with_a_reducer(name, launches):
    keeps = rk.reducers.Nuwa(keep=0.5, per_cell=2) if name == "llava" else rk.reducers.Nuwa(keep=0.6, per_cell=3)
    case = load(name)
    policy = rk.Policy(SCHEDULE, reducer=keeps)
    names, _ = check(case, case.batch([case.prompt(1, 6, 15, seed=1)]), policy, launches)
    assert names.count("normalize_rows") == 2


@pytest_device
def test_rankings_that_ask_for_nothing_need_no_norm(launches):
    case = load("qwen2_vl")
    inputs = case.batch([case.prompt(1, 6, 15, seed=1)])
    _, _, names = run(case, inputs, rk.Policy(SCHEDULE, ranking=rk.rankings.Uniform()), launches)
    assert names.count("normalize_rows") == 0
    assert names.count("copy_rows_to_full") == 2


@pytest_device
def test_gradients_leave_the_norm_to_the_layer(launches):
    case = load("qwen2_vl")
    inputs = case.batch([case.prompt(1, 6, 15, seed=1)])
    with rk.backend("triton"), rk.apply(case.model, rk.Policy(SCHEDULE)):
        assert case.model(**inputs).logits.requires_grad
    names = [name for name, _ in launches]
    assert names.count("normalize_rows") == 0
    assert names.count("copy_rows_to_full") == 2


@torch.no_grad()
def test_the_reference_leaves_the_norm_to_the_layer(monkeypatch):
    case = load("llava")
    ran = []
    monkeypatch.setattr(rk.ops, "scatter_norm_tokens_", lambda *_, **__: pytest.fail("the module is as fast"))
    handles = [
        layer.input_layernorm.register_forward_hook(lambda *_: ran.append(True))
        for layer in decoder_of(case.model).layers
    ]
    try:
        with rk.backend("ref"), rk.apply(case.model, rk.Policy(SCHEDULE)):
            case.model(**case.batch([case.prompt(1, 6, 15, seed=1)]))
    finally:
        for handle in handles:
            handle.remove()
    assert len(ran) == len(handles) + 2


@pytest_device
@torch.no_grad()
def test_hidden_states_that_layers_hold_are_not_written_to(launches):
    case = load("llava")
    held, handles = [], []

    def hold(module, args, output):
        held.extend((tensor, tensor.clone()) for tensor in (*args, output) if isinstance(tensor, torch.Tensor))

    for layer in decoder_of(case.model).layers:
        handles += [module.register_forward_hook(hold) for module in (layer, layer.self_attn.k_proj, layer.mlp)]
    try:
        schedule = (rk.Stage(1, 0.5), rk.Stage(2, 0.4), rk.Stage(4, 0.25))
        _, _, names = run(case, case.batch([case.prompt(1, 6, 15, seed=1)]), rk.Policy(schedule), launches)
    finally:
        for handle in handles:
            handle.remove()
    assert names.count("normalize_rows") == 3
    assert all(torch.equal(tensor, copy) for tensor, copy in held)
