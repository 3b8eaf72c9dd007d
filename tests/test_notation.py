"""Policies as text: one grammar, its inverse, and the policies that are suggested."""

import re
from types import SimpleNamespace

import pytest

import reroute_kernels as rk
from reroute_kernels.cost import average_visual_tokens
from reroute_kernels.presets import MODELS, model_of, suggested

LLAVA, QWEN = MODELS


def config(model_type="llava", layers=32, kinds=None):
    text = SimpleNamespace(num_hidden_layers=layers, layer_types=kinds)
    return SimpleNamespace(model_type=model_type, get_text_config=lambda: text)


@pytest.mark.parametrize(
    "text", ["3:0.25", "3:0.25,7:0.1", "remove:0:1.0", "remove:2:0.3,5:0.2", "align-proxy:2:0.3", "freeze:2:0.3,5:0.2"]
)
def test_text_of_a_policy_is_the_inverse(text):
    assert str(rk.Policy.parse(text)) == text
    assert rk.Policy.parse(text.replace(",", "+")) == rk.Policy.parse(text)


def test_a_stages_own_ranking_is_told_in_python():
    policy = rk.Policy([rk.Stage(3, 0.25), rk.Stage(7, 0.1, rk.rankings.KeyNorm())])
    told = str(policy)
    assert told.startswith("Policy(schedule=(Stage(layer=3, keep=0.25), Stage(layer=7, keep=0.1, ranking=KeyNorm(")
    assert eval(told, vars(rk) | vars(rk.rankings)) == policy


@pytest.mark.parametrize("name", rk.presets(originals=True), ids=str)
def test_every_preset_is_parsed_by_its_name(name):
    policy = rk.preset(*name)
    assert rk.Policy.parse(str(name)) == policy
    assert rk.Policy.parse(f"{name.method}/{name.avg_tokens}", name.model) == policy
    if str(policy).startswith("Policy("):
        assert policy.reducer is not None or policy != rk.Policy(policy.schedule, policy.action)
    else:
        assert rk.Policy.parse(str(policy)) == policy


@pytest.mark.parametrize("model", [LLAVA, config(), config("qwen3_vl", 32)], ids=["name", "config", "other-type"])
def test_preset_of_another_model_is_refused(model):
    with pytest.raises(ValueError, match=r"presets of qwen2.5-vl-7b are for 28 decoder layers, and this model has 32"):
        rk.Policy.parse("qwen2.5-vl-7b/fastv/192", model)
    assert rk.Policy.parse("llava-1.5-7b/fastv/192", model) == rk.preset(LLAVA, "fastv", 192)


def test_preset_without_a_model_needs_one():
    with pytest.raises(ValueError, match=r"policy must be .*: a preset is model/method/avg_tokens$"):
        rk.Policy.parse("fastv/192")


@pytest.mark.parametrize("text", ["", "3", "3:", "3:2", "7:0.5,3:0.5", "drop:3:0.25", "a/b", "llava-1.5-7b/fastv/63"])
def test_what_is_no_policy_is_refused(text):
    with pytest.raises(
        ValueError, match=f"policy must be a preset like .*, a schedule like .* or a file like .*, got {text!r}"
    ):
        rk.Policy.parse(text)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("3:0.5,", "a stage is a layer and a keep ratio, such as 3:0.25, got ''"),
        ("3:a", "a stage is a layer and a keep ratio, such as 3:0.25, got '3:a'"),
        ("1:2:3", "a stage is a layer and a keep ratio, such as 3:0.25, got '1:2:3'"),
        ("align-token:3:0.5", "align must be one of None, 'stage', 'proxy', got 'token'"),
        ("Remove:3:0.5", "action must be one of 'reroute', 'remove', 'freeze', got 'Remove'"),
        ("llava-1.5-7b/fastv/many", "avg_tokens must be an integer, or a percentage such as 10%, got 'many'"),
        ("fastv", "a preset is model/method/avg_tokens"),
    ],
)
def test_reasons_are_in_the_words_of_policies(text, reason):
    with pytest.raises(ValueError, match=f": {re.escape(reason)}$"):
        rk.Policy.parse(text)


def test_presets_of_models_without_published_ones_are_solved():
    model = config("qwen3_vl", 36)
    assert rk.Policy.parse("reroute-fastv/64", model) == rk.preset(model, "reroute-fastv", 64)
    with pytest.raises(ValueError, match=r"policy must be a preset like reroute-fastv/192, .*: method must be one of"):
        rk.Policy.parse("nuwa/64", model)
    with pytest.raises(ValueError, match=r"presets of llava-1.5-7b are for 32 decoder layers, and this model has 36"):
        rk.Policy.parse("llava-1.5-7b/reroute-fastv/192", model)


def test_policy_text_must_be_a_string():
    with pytest.raises(TypeError, match="policy must be a string, got 3"):
        rk.Policy.parse(3)


def test_published_model_of_a_configuration():
    assert model_of(config()) is MODELS[LLAVA]
    assert model_of(config("qwen2_5_vl", 28)) is MODELS[QWEN]
    assert model_of(config(layers=40)) is model_of(config("llava_next")) is None


@pytest.mark.parametrize(
    ("model", "layers", "decisions"),
    [
        (LLAVA, 32, [3, 7, 15, 23]),
        (config("qwen2_5_vl", 28), 28, [3, 6, 13, 20]),
        (config("qwen3_vl", 36), 36, [4, 9, 18, 27]),
        (config("qwen3_5", 32, (["linear_attention"] * 3 + ["full_attention"]) * 8), 32, [7, 11, 19, 27]),
        (config("idefics3", 3), 3, [0, 1, 2]),
        (config("idefics3", 1), 1, [0]),
    ],
)
@pytest.mark.parametrize("keep", [1 / 3, 0.4, 0.5, 1.0])
def test_suggestion_averages_what_was_asked_for(model, layers, decisions, keep):
    policy = rk.suggest(model, keep)
    assert policy.action == "reroute"
    assert [stage.layer for stage in policy.schedule] == decisions
    average = average_visual_tokens(policy, layers, 100_000) / 100_000
    published = isinstance(model, str) or model_of(model) is not None
    assert (-0.01 if published and keep == 1 / 3 else -1e-9) <= keep - average < 2e-4


def test_suggestion_as_text():
    assert suggested(config()) == "llava-1.5-7b/reroute-fastv/192"
    for of in (config(), config("qwen3_vl", 36)):
        assert rk.Policy.parse(suggested(of), of) == rk.suggest(of)


@pytest.mark.parametrize(
    ("model", "keep", "error", "message"),
    [
        (
            LLAVA,
            3 / 32,
            ValueError,
            r"keep must be above 0.09375 \(3 of 32 layers run all tokens\) and at most 1, got 0.09375",
        ),
        (LLAVA, 1.1, ValueError, "keep must be above .*, got 1.1"),
        (LLAVA, "1", TypeError, "keep must be a number"),
        (
            "gpt",
            0.5,
            ValueError,
            "config_or_model must be one of 'llava-1.5-7b', 'qwen2.5-vl-7b', a model or .*, got 'gpt'",
        ),
        (3, 0.5, TypeError, "config_or_model must be a transformers model or configuration"),
        (config("aya", 2, ["sliding_attention"] * 2), 0.5, ValueError, "must have layers with full attention"),
    ],
)
def test_suggestion_refuses(model, keep, error, message):
    with pytest.raises(error, match=message):
        rk.suggest(model, keep)
