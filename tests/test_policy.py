"""Stages and policies: accepted arguments, and how many tokens they select."""

import dataclasses
import re

import numpy as np
import pytest

import reroute_kernels as rk
from reroute_kernels import Policy, Stage
from reroute_kernels.rankings import KeyNorm, LastQuery, Uniform
from reroute_kernels.reducers import Nuwa

STAGES = [Stage(3, 0.5), Stage(7, 0.25)]


def test_stage_takes_any_integer_and_any_real_number():
    stage = Stage(layer=np.int64(3), keep=np.float32(0.5))
    assert (stage.layer, stage.keep) == (3, 0.5)
    assert (type(stage.layer), type(stage.keep)) == (int, float)
    assert Stage(0, 1) == Stage(layer=0, keep=1.0)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((-1, 0.5), ValueError, "layer must be 0 or more, got -1"),
        ((2.0, 0.5), TypeError, "layer must be an integer, got 2.0"),
        ((True, 0.5), TypeError, "layer must be an integer, got True"),
        (("3", 0.5), TypeError, "layer must be an integer, got '3'"),
        ((7, 1.4), ValueError, "keep must be in (0, 1], got 1.4 at layer 7"),
        ((7, 0.0), ValueError, "keep must be in (0, 1], got 0.0 at layer 7"),
        ((7, -0.1), ValueError, "keep must be in (0, 1], got -0.1 at layer 7"),
        ((7, float("nan")), ValueError, "keep must be in (0, 1], got nan at layer 7"),
        ((7, float("inf")), ValueError, "keep must be in (0, 1], got inf at layer 7"),
        ((7, True), TypeError, "keep must be a number in (0, 1], got True at layer 7"),
        ((7, "0.5"), TypeError, "keep must be a number in (0, 1], got '0.5' at layer 7"),
        ((7, None), TypeError, "keep must be a number in (0, 1], got None at layer 7"),
        (
            (7, 0.5, "random"),
            ValueError,
            "ranking must be 'last_query' or an object such as those of reroute_kernels.rankings, got 'random'",
        ),
        ((7, 0.5, 3), TypeError, "ranking must be an object with a method 'rank', got 3"),
        (
            (7, 0.5, Uniform),
            TypeError,
            "ranking must be an object with a method 'rank', got <class 'reroute_kernels.rankings.Uniform'>",
        ),
    ],
)
def test_stage_refuses_and_says_why(arguments, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        Stage(*arguments)


def test_stages_with_a_ranking_of_their_own():
    own = Stage(7, 0.25, KeyNorm())
    assert own != Stage(7, 0.25) == Stage(7, 0.25, None)
    assert hash(own) == hash(Stage(7, 0.25, ranking=KeyNorm()))
    assert Stage(7, 0.25, "last_query").ranking == LastQuery()
    assert eval(repr(own), {"Stage": Stage, "KeyNorm": KeyNorm}) == own
    assert repr(Stage(7, 0.25)) == "Stage(layer=7, keep=0.25)"
    policy = Policy([Stage(3, 0.5), own, Stage(9, 0.25, LastQuery("previous"))], ranking=Uniform())
    assert policy.rankings == (Uniform(), KeyNorm(), LastQuery("previous"))
    assert policy != Policy([Stage(each.layer, each.keep) for each in policy.schedule], ranking=Uniform())
    assert Policy([], reducer=Nuwa(keep=0.5, per_cell=2)).rankings == ()


def test_layers_that_rank_ahead_are_those_of_their_stages():
    previous = LastQuery("previous")
    mixed = [Stage(3, 0.5), Stage(5, 0.5, KeyNorm()), Stage(7, 0.5, KeyNorm("previous"))]
    assert Policy(mixed).layers_ranking_ahead == (6,)
    assert Policy(mixed, ranking=previous).layers_ranking_ahead == (2, 6)
    assert Policy(mixed[:2]).layers_ranking_ahead == ()
    assert Policy([Stage(3, 0.5, KeyNorm())], ranking=previous).ranks_by_previous_layer is False
    assert Policy(mixed).ranks_by_previous_layer is True


def test_a_decision_at_layer_0_ranks_by_its_own_layer():
    previous = KeyNorm("previous")
    assert Policy([Stage(0, 0.5, KeyNorm()), Stage(3, 0.5)], ranking=previous).layers_ranking_ahead == (2,)
    message = "where the previous layer ranks, got a decision at layer 0 and KeyNorm(layer='previous')"
    for arguments in ({"schedule": [Stage(0, 0.5, previous)]}, {"schedule": [Stage(0, 0.5)], "ranking": previous}):
        with pytest.raises(ValueError, match=re.escape(message)):
            Policy(**arguments)


def test_policy_has_defaults():
    policy = Policy(schedule=STAGES)
    assert policy == Policy(tuple(STAGES), action="reroute", ranking="last_query", positions="original")
    assert policy.schedule == tuple(STAGES)
    assert Policy(schedule=iter(STAGES)) == policy


def test_policies_are_values():
    policy = Policy(STAGES)
    assert hash(policy) == hash(Policy(tuple(STAGES)))
    assert policy != Policy(STAGES, action="remove")
    assert policy != Policy(STAGES, align="stage")
    with pytest.raises(dataclasses.FrozenInstanceError):
        policy.action = "remove"
    with pytest.raises(dataclasses.FrozenInstanceError):
        policy.schedule[0].keep = 1.0


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"schedule": None}, TypeError, "schedule must be a sequence of Stage, got None"),
        ({"schedule": Stage(3, 0.5)}, TypeError, "schedule must be a sequence of Stage, got Stage(layer=3, keep=0.5)"),
        ({"schedule": [(3, 0.5)]}, TypeError, "schedule must hold Stage objects, got (3, 0.5)"),
        ({"schedule": []}, ValueError, "schedule must hold at least one Stage, got none"),
        (
            {"schedule": [Stage(7, 0.5), Stage(3, 0.5)]},
            ValueError,
            "schedule must have strictly ascending layers, got [7, 3]",
        ),
        (
            {"schedule": [Stage(3, 0.5), Stage(3, 0.2)]},
            ValueError,
            "schedule must have strictly ascending layers, got [3, 3]",
        ),
        ({"action": "drop"}, ValueError, "action must be one of 'reroute', 'remove', 'freeze', got 'drop'"),
        (
            {"ranking": "random"},
            ValueError,
            "ranking must be 'last_query' or an object such as those of reroute_kernels.rankings, got 'random'",
        ),
        ({"align": "token"}, ValueError, "align must be one of None, 'stage', 'proxy', got 'token'"),
        (
            {"recycle": 0.3},
            ValueError,
            "recycle must be 0 under the action 'reroute', under which no token is removed, got 0.3",
        ),
        ({"recycle": 1.5, "action": "remove"}, ValueError, "recycle must be in [0, 1], got 1.5"),
        ({"recycle": True, "action": "remove"}, TypeError, "recycle must be a number in [0, 1], got True"),
        (
            {"align": "stage", "action": "remove"},
            ValueError,
            "align must be None under the action 'remove', under which no token waits, got 'stage'",
        ),
        (
            {"action": "freeze", "positions": "contiguous"},
            ValueError,
            "positions must be 'original' under the action 'freeze', which leaves every token in its place, got "
            "'contiguous'",
        ),
        ({"positions": None}, ValueError, "positions must be one of 'original', 'contiguous', got None"),
    ],
)
def test_policy_refuses_and_says_why(arguments, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        Policy(**{"schedule": STAGES} | arguments)


@pytest.mark.parametrize("action", ["reroute", "remove"])
@pytest.mark.parametrize(
    ("keeps", "visual_tokens", "counts"),
    [
        pytest.param([0.2644] * 4, 576, (152, 152, 152, 152), id="truncated"),
        pytest.param([0.5, 0.25], 7, (3, 1), id="odd"),
        pytest.param([0.01], 5, (1,), id="at-least-one"),
        pytest.param([1.0, 0.999], 100, (100, 99), id="everything"),
        pytest.param([0.5], 1, (1,), id="one-token"),
        pytest.param([0.5, 0.1], 0, (0, 0), id="no-token"),
        pytest.param([0.29], 100, (28,), id="as-floating-point-multiplies"),
    ],
)
def test_selected_counts_follow_the_formula(action, keeps, visual_tokens, counts):
    policy = Policy([Stage(3 + i, keep) for i, keep in enumerate(keeps)], action=action)
    assert policy.selected_counts(visual_tokens) == counts


def test_a_growing_schedule_grows_only_where_tokens_come_back():
    schedule = [Stage(2, 0.2), Stage(5, 0.6), Stage(9, 0.1), Stage(12, 1.0)]
    assert Policy(schedule, action="reroute").selected_counts(50) == (10, 30, 5, 50)
    assert Policy(schedule, action="freeze").selected_counts(50) == (10, 30, 5, 50)
    assert Policy(schedule, action="remove").selected_counts(50) == (10, 10, 5, 5)


def test_fewer_candidates_than_tokens_in_the_prompt():
    """The ratios stay relative to the prompt; only the pool is smaller."""
    schedule = [Stage(2, 0.5), Stage(5, 0.2)]
    for action in ("reroute", "remove"):
        policy = Policy(schedule, action=action)
        assert policy.selected_counts(100, candidates=80) == (50, 20)
        assert policy.selected_counts(100, candidates=30) == (30, 20)
        assert policy.selected_counts(100, candidates=0) == (0, 0)
    schedule = [Stage(2, 0.1), Stage(5, 0.5)]
    assert Policy(schedule, action="reroute").selected_counts(100, candidates=30) == (10, 30)
    assert Policy(schedule, action="remove").selected_counts(100, candidates=30) == (10, 10)


def test_public_names_are_the_same_objects():
    assert rk.Policy is Policy
    assert rk.Stage is Stage
