"""Decisions made ahead of the first prompt."""

import pytest
import torch

import reroute_kernels as rk
from reroute_kernels.models.frozen import FrozenRows
from reroute_kernels.routing import RoutedForward
from tests.models.families import MODELS, load
from tests.models.prompts import ACTIONS
from tests.models.slow_way import decoder_of, layer_types

POLICY = rk.Policy([rk.Stage(2, 0.5), rk.Stage(3, 0.25)])


@pytest.mark.parametrize("layer", ["this", "previous"])
@pytest.mark.parametrize("action", [*ACTIONS, "freeze"])
@pytest.mark.parametrize("family", MODELS)
def test_every_decision_is_made_and_the_model_stays_as_it_was(family, action, layer, monkeypatch):
    model = load(family).model
    kinds = layer_types(decoder_of(model))
    able = [i for i in range(1, len(kinds)) if {kinds[i], kinds[i - (layer == "previous")]} == {"full_attention"}]
    schedule = [rk.Stage(i, keep) for i, keep in zip(able[:2], (0.5, 0.25), strict=False)]
    if not schedule or (action == "freeze" and set(kinds[schedule[0].layer :]) != {"full_attention"}):
        pytest.skip("no layer can rank for the next one, or some cannot freeze")
    policy = rk.Policy(schedule, action, ranking=rk.rankings.LastQuery(layer=layer))
    decided = []
    decide = RoutedForward.decide

    def counting(forward, *args):
        decided.append((forward.prompt.length, forward.prompt.padded))
        return decide(forward, *args)

    monkeypatch.setattr(RoutedForward, "decide", counting)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rk.warm_up(model, policy, [20, 25, 30, 40], batch_size=2)
    # The shortest and the longest up to 32, and one up to 64.
    made = [(length, padded) for length in (20, 30, 40) for padded in (False, True) for _ in policy.schedule]
    assert decided == made
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert rk.routing_of(model) is None


def test_an_alignment_is_made_ahead(launches):
    with rk.backend("triton"):
        rk.warm_up(load("llava").model, "align-stage:1:0.5,3:0.25", [6])
    assert {"sum_changes", "follow_changes"} <= {name for name, _ in launches}


def test_rows_of_frozen_tokens_are_made_ahead(monkeypatch):
    """Of every stage, in the shapes of a layer's keys and values."""
    update, made = FrozenRows.update, []

    def counting(rows, key, value):
        made.append(tuple(each.shape[1:] for each in update(rows, key, value)))
        return made[-1]

    monkeypatch.setattr(FrozenRows, "update", counting)
    model = load("llava").model
    rk.warm_up(model, "freeze:1:0.5,3:0.25", [20])
    attention = decoder_of(model).layers[1].self_attn
    heads = attention.k_proj.out_features // attention.head_dim
    assert made == [((heads, 20, attention.head_dim),) * 2] * 4  # two stages, without padding and with it


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"lengths": [1]}, ValueError, "lengths must be 2 or more, got 1"),
        ({"lengths": ["8"]}, TypeError, "lengths must be integers, got '8'"),
        ({"lengths": [8], "batch_size": 0}, ValueError, "batch_size must be 1 or more, got 0"),
        ({"lengths": [8], "batch_size": True}, TypeError, "batch_size must be an integer, got True"),
        ({"lengths": [8], "policy": 3}, TypeError, "policy must be a Policy or its text, got int"),
    ],
)
def test_refuses(given, error, message):
    model = load("llava").model
    with pytest.raises(error, match=message):
        rk.warm_up(model, **{"policy": POLICY, **given})
