"""Heads split over two processes by transformers: both select the same tokens as one process."""

import copy
from types import SimpleNamespace

import pytest
import torch

import reroute_kernels as rk
from reroute_kernels.models import hooks
from tests.models.prompts import ACTIONS, SCHEDULE, policy
from tests.models.tensor_parallel_worker import RANKINGS, REDUCED, on_two_ranks, prompts, run


@pytest.fixture(scope="module")
def ranks(family, tmp_path_factory):
    folder = tmp_path_factory.mktemp(family)
    return on_two_ranks(folder, family, str(folder))


@pytest.mark.parametrize("action", [*ACTIONS, "freeze"])
def test_equals_one_process(family, model, ranks, action):
    compare(*(rank[action] for rank in ranks), run(model, prompts(family), policy(action)))


@pytest.mark.parametrize(("action", "ranking"), RANKINGS, ids=str)
def test_other_rankings_equal_one_process(family, model, ranks, action, ranking):
    expected = run(model, prompts(family), rk.Policy(SCHEDULE, action, ranking))
    compare(*(rank[str(ranking)] for rank in ranks), expected)


def test_a_reducer_equals_one_process(family, model, ranks):
    """The tower is whole on every rank, and leaves the same tokens."""
    compare(*(rank["reducer"] for rank in ranks), run(model, prompts(family), REDUCED))


def compare(first, second, expected):
    assert first == second
    assert first["selected"] == expected["selected"]
    assert first["tokens"] == expected["tokens"]
    torch.testing.assert_close(torch.tensor(first["logits"]), torch.tensor(expected["logits"]), atol=1e-4, rtol=0)


def test_reductions(ranks):
    for rank in ranks:
        assert rank["all_gather_scores"] == {"mean": [[2.0, 2.0, 2.0]], "max": [[4.0, 3.0, 2.0]]}


def test_ranks_would_select_apart(ranks):
    """The tests above would see scores that are not combined."""
    first, second = (rank["each rank by its own heads"]["selected"] for rank in ranks)
    assert first != second


def test_heads_without_their_process_group(ranks):
    for rank in ranks:
        assert "model must have all" in rank["without a process group"]


@pytest.fixture
def half(model):
    """A model with the first half of the heads, as if it were one rank of two."""
    model = copy.deepcopy(model)
    for layer in model.model.language_model.layers:
        attention = layer.self_attn
        for name in ("q_proj", "k_proj", "v_proj"):
            projection = getattr(attention, name)
            for parameter in projection.parameters():
                parameter.data = parameter.data[: len(parameter) // 2]
        attention.o_proj.weight.data = attention.o_proj.weight.data[:, : attention.o_proj.weight.shape[1] // 2]
    return model


def test_a_tower_that_is_split(model, family, monkeypatch):
    tower = "vision_tower" if family == "llava" else "visual"
    monkeypatch.setattr(hooks, "head_group", lambda model: SimpleNamespace(size=lambda: 2))
    rk.apply(model, REDUCED).remove()
    monkeypatch.setattr(model, "_tp_plan", {f"model.{tower}.layers.*.self_attn.q_proj": "colwise"}, raising=False)
    with pytest.raises(NotImplementedError, match="whose vision tower is split over processes"):
        rk.apply(model, REDUCED)


@torch.no_grad()
def test_heads_split_by_hand(family, half, monkeypatch):
    inputs = prompts(family)
    half(**inputs)
    config = half.config.text_config
    heads, key_heads = config.num_attention_heads, config.num_key_value_heads
    expected = (
        f"model must have all {heads} query and {key_heads} key heads .* got {heads // 2} query and {key_heads // 2}"
    )
    with rk.apply(half, policy()) as routing:
        with pytest.raises(NotImplementedError, match=expected):
            half(**inputs)
        assert routing.trace is None
    monkeypatch.setattr(hooks, "head_group", lambda model: SimpleNamespace(size=lambda: 3))
    with (
        rk.apply(half, policy()),
        pytest.raises(NotImplementedError, match=r"split evenly over 3 tensor-parallel ranks, got"),
    ):
        half(**inputs)
