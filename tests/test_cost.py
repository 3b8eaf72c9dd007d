"""What policies cost, against the published tiers counted a second time."""

import re

import pytest

import reroute_kernels as rk
from reroute_kernels import Policy, Stage

LAYERS = {"llava-1.5-7b": 32, "qwen2.5-vl-7b": 28}

# What the tiers really cost: the average over all layers of the visual tokens that run, of 576.
AVERAGES = {
    (192, "fastv"): (191.8, 197.4),
    (192, "pdrop"): (191.3, 192.2),
    (192, "reroute-pdrop"): (191.5, 193.4),
    (128, "fastv"): (127.4, 134.0),
    (128, "pdrop"): (127.6, 129.4),
    (128, "reroute-pdrop"): (127.4, 130.7),
    (64, "fastv"): (64.0, 71.5),
    (64, "pdrop"): (80.4, 83.5),
    (64, "reroute-pdrop"): (84.1, 88.3),
}


@pytest.mark.parametrize("model", LAYERS)
@pytest.mark.parametrize(("tier", "method"), AVERAGES)
def test_averages_of_the_published_tiers(model, tier, method):
    expected = AVERAGES[tier, method][list(LAYERS).index(model)]
    policy = rk.preset(model, method, tier)
    assert rk.cost.average_visual_tokens(policy, LAYERS[model], 576) == pytest.approx(expected, abs=0.051)
    if method == "fastv":  # matched by construction: the same ratio in the same layers
        matched = rk.preset(model, "reroute-fastv", tier)
        assert rk.cost.average_visual_tokens(matched, LAYERS[model], 576) == pytest.approx(expected, abs=0.051)


def test_tokens_of_every_layer():
    policy = Policy([Stage(2, 0.5), Stage(3, 0.29), Stage(5, 0.75)], action="reroute")
    assert rk.cost.visual_tokens_per_layer(policy, 6, 100) == [100, 100, 50, 28, 28, 75]
    assert rk.cost.average_visual_tokens(policy, 6, 100) == pytest.approx(381 / 6)
    policy = Policy(policy.schedule, action="remove")
    assert rk.cost.visual_tokens_per_layer(policy, 6, 100) == [100, 100, 50, 28, 28, 28]


def test_decision_before_the_first_layer():
    assert rk.cost.visual_tokens_per_layer(Policy([Stage(0, 0.5)]), 2, 9) == [4, 4]


def test_no_visual_tokens():
    policy = Policy([Stage(1, 0.5)])
    assert rk.cost.visual_tokens_per_layer(policy, 3, 0) == [0, 0, 0]
    assert rk.cost.average_visual_tokens(policy, 3, 0) == 0.0


@pytest.mark.parametrize(
    ("num_layers", "visual_tokens", "message"),
    [
        (0, 10, "num_layers must be 1 or more, got 0"),
        (-4, 10, "num_layers must be 1 or more, got -4"),
        (8, -1, "visual_tokens must be 0 or more, got -1"),
        (7, 10, "schedule must stay below layer 7 of this model, got layer 7"),
        (3, 10, "schedule must stay below layer 3 of this model, got layer 7"),
    ],
)
@pytest.mark.parametrize("count", [rk.cost.visual_tokens_per_layer, rk.cost.average_visual_tokens])
def test_refuses_and_says_why(count, num_layers, visual_tokens, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        count(Policy([Stage(3, 0.5), Stage(7, 0.5)]), num_layers, visual_tokens)
