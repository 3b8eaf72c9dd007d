"""Presets of methods that reduce before the decoder: budgets, layers and reducers, on decoders of any depth."""

import math
import re
from types import SimpleNamespace

import pytest

import reroute_kernels as rk
from reroute_kernels.cost import average_visual_tokens
from reroute_kernels.presets import MODELS, tiers
from reroute_kernels.rankings import LastQuery
from reroute_kernels.reduced import EXPANSION, IMAGE_METHODS, REDUCED, VIDEO_METHODS
from reroute_kernels.reducers import FlashVid, VidCom2, VisionZip

LLAVA, QWEN = MODELS
HYBRID = (["linear_attention"] * 3 + ["full_attention"]) * 10


def config(layers, model_type="qwen3_vl", kinds=None):
    text = SimpleNamespace(num_hidden_layers=layers, layer_types=kinds)
    return SimpleNamespace(model_type=model_type, get_text_config=lambda: text)


def averaged(model, method, amount, tokens=576):
    """Visual tokens of an image or frame that run in a layer on average."""
    layers = MODELS[model].decoder.layers if isinstance(model, str) else model.get_text_config().num_hidden_layers
    return average_visual_tokens(rk.preset(model, method, amount), layers, tokens)


@pytest.mark.parametrize("method", IMAGE_METHODS)
@pytest.mark.parametrize("model", MODELS)
def test_images_meet_the_tier(model, method):
    for tier in tiers(model, method):
        policy = rk.preset(model, method, tier)
        assert policy.schedule == ()
        assert policy.action == "remove"
        assert policy.reducer == IMAGE_METHODS[method](tier / 576)
        assert policy.positions == ("contiguous" if model == LLAVA else "original")
        assert rk.cost(model, f"{method}/{tier}").average_visual_tokens == tier


@pytest.mark.parametrize("method", IMAGE_METHODS)
@pytest.mark.parametrize("model", MODELS)
def test_rerouted_images_choose_from_twice_the_tier(model, method):
    for tier in tiers(model, method):
        policy = rk.preset(model, f"reroute-{method}", tier)
        assert policy.reducer.survivors(576) == 2 * tier
        assert policy.stage_layers == (0, 3, *MODELS[model].later_layers)
        assert (policy.action, policy.positions) == ("reroute", "original")
        counts = policy.selected_counts(576, 2 * tier)
        assert max(counts) - min(counts) <= 1
        assert 0 <= tier - averaged(model, f"reroute-{method}", tier) < 0.1


@pytest.mark.parametrize(
    ("model", "layer", "keep_of_share"),
    [
        (QWEN, 20, 0.375),
        (config(28, "llava_onevision"), 20, 0.375),
        (config(36), 28, 0.125),
        (config(64), 46, (64 - 57.5) / 18),
        (config(16), 11, (16 - 13.75) / 5),
        (config(2), 1, 0.75),
        (config(40, kinds=HYBRID), 27, (40 - 33.75) / 13),
    ],
)
def test_flashvid_drops_tokens_where_its_authors_do(model, layer, keep_of_share):
    policy = rk.preset(model, "flashvid", "20%")
    assert [stage.layer for stage in policy.schedule] == [layer]
    assert math.isclose(policy.schedule[0].keep, 0.2 * keep_of_share)
    # Beside linear attention the layer before the decision has no row of attention.
    assert policy.ranking == (LastQuery() if layer == 27 else LastQuery(layer="previous"))
    assert policy.action == "remove"


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (QWEN, {"selection": "v1", "min_segments": 4}),
        (config(36), {"selection": "v1", "min_segments": 4}),
        (config(28, "llava_onevision"), {"selection": "v2", "min_segments": 8}),
    ],
)
def test_flashvid_selects_as_on_the_family(model, options):
    for method in ("flashvid", "reroute-flashvid"):
        assert rk.preset(model, method, "15%").reducer == FlashVid(0.15, **options)
    is_qwen = options["selection"] == "v1"
    assert rk.preset(model, "flashvid", "15%").positions == ("original" if is_qwen else "contiguous")


@pytest.mark.parametrize("method", ["flashvid", "reroute-flashvid", "vidcom2", "reroute-vidcom2"])
def test_videos_meet_their_share_at_any_depth(method):
    for layers in range(3, 81):
        for share in (0.1, 0.15, 0.2, 0.25):
            for tokens in (169, 196, 576):
                average = averaged(config(layers), method, f"{100 * share:g}%", tokens)
                assert abs(average - share * tokens) < 1, (layers, share, tokens)


def test_rerouted_flashvid_decides_twice_and_keeps_as_many():
    for layers, expected in ((28, (20, 24)), (36, (28, 32)), (16, (11, 13)), (4, (2, 3))):
        policy = rk.preset(config(layers), "reroute-flashvid", "10%")
        assert tuple(stage.layer for stage in policy.schedule) == expected
        assert policy.action == "reroute"
        assert len({stage.keep for stage in policy.schedule}) == 1
    once, twice = (rk.preset(QWEN, method, "10%") for method in ("flashvid", "reroute-flashvid"))
    assert once.schedule[0] == twice.schedule[0]
    costs = [rk.cost(QWEN, policy) for policy in (once, twice)]
    assert costs[0].average_visual_tokens == costs[1].average_visual_tokens
    assert costs[0].kv_bytes == costs[1].kv_bytes
    assert costs[0].ranking < costs[1].ranking


def test_vidcom2_leaves_twice_its_share_for_rerouting():
    assert rk.preset(QWEN, "vidcom2", "10%").reducer == VidCom2(0.1)
    policy = rk.preset(QWEN, "reroute-vidcom2", "10%")
    assert policy.reducer == VidCom2(0.2)
    assert policy.stage_layers == (0, 3, 6, 13, 20)


@pytest.mark.parametrize("method", REDUCED)
def test_other_models_take_any_budget(method):
    for model in (config(12), config(40, kinds=HYBRID), config(4, "llava")):
        amount = "7.5%" if method.removeprefix("reroute-") in VIDEO_METHODS else 30.5
        policy = rk.preset(model, method, amount)
        assert policy == rk.preset(model, method, amount)
        kinds = model.get_text_config().layer_types
        assert all(
            stage.layer and (kinds is None or kinds[stage.layer] == "full_attention") for stage in policy.schedule
        )
        share = 0.075 if isinstance(amount, str) else amount / 576
        assert abs(averaged(model, method, amount) - share * 576) < 1


def test_a_pool_is_no_larger_than_the_image():
    policy = rk.preset(config(32), "reroute-visionzip", 400)
    assert policy.reducer == VisionZip(1.0)
    assert 0 <= policy.budget.under < 0.1
    assert rk.preset(config(32), "reroute-vidcom2", "60%").reducer == VidCom2(1.0)
    assert abs(averaged(config(32), "reroute-vidcom2", "60%") - 0.6 * 576) < 1


def test_texts():
    assert rk.Policy.parse("visionzip/64", LLAVA) == rk.preset(LLAVA, "visionzip", 64)
    assert rk.Policy.parse("qwen2.5-vl-7b/flashvid/10%") == rk.preset(QWEN, "flashvid", "10%")
    assert rk.Policy.parse("reroute-flashvid/12.5%", config(36)) == rk.preset(config(36), "reroute-flashvid", "12.5%")
    assert str(rk.Preset(QWEN, "flashvid", "10%")) == "qwen2.5-vl-7b/flashvid/10%"


@pytest.mark.parametrize(
    ("text", "model", "message"),
    [
        ("visionzip/100", LLAVA, "avg_tokens must be one of 192, 128, 64, got 100"),
        ("flashvid/12%", QWEN, "avg_tokens must be one of '25%', '20%', '15%', '10%', got '12%'"),
        ("flashvid/64", QWEN, "avg_tokens must be one of '25%', '20%', '15%', '10%', got 64"),
        ("flashvid/ten", config(8), "avg_tokens must be an integer, or a percentage such as 10%, got 'ten'"),
        (
            "flashvid/64",
            config(8),
            "avg_tokens must be a percentage above 0% and at most 80%, such as '10%', for 'flashvid', got 64",
        ),
        ("flashvid/90%", config(8), "at most 80%, such as '10%', for 'flashvid', got '90%'"),
        ("vidcom2/0%", config(8), "avg_tokens must be a percentage above 0% and at most 100%, such as '10%', for"),
        ("vidcom2/ten%", config(8), "such as '10%', for 'vidcom2', got 'ten%'"),
        ("visionzip/600", config(8), "avg_tokens must be a number of visual tokens from 1 to 576 for 'visionzip', got"),
        ("visionzip/10%", config(8), "visual tokens from 1 to 576 for 'visionzip', got '10%'"),
        ("fastv/10%", config(8), "avg_tokens must be a number for 'fastv', got '10%'"),
        ("fastv/10%", QWEN, "avg_tokens must be one of 192, 128, 64, got '10%'"),
        ("visionzap/64", config(8), "method must be one of 'fastv', "),
        ("flashvid/10%", config(1), "model must have a layer that can decide early enough for the budget, got"),
        ("reroute-holov/64", config(1), "model must have a layer that can decide early enough for the budget, got"),
    ],
)
def test_wrong_budgets_are_refused(text, model, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        rk.Policy.parse(text, model)


@pytest.mark.parametrize(("method", "amount"), [("visionzip", None), ("visionzip", True), ("flashvid", None)])
def test_budgets_of_other_types_are_refused(method, amount):
    with pytest.raises(TypeError, match="avg_tokens must be a "):
        rk.preset(config(8), method, amount)


def test_costs_of_a_video_round_for_each_frame():
    """A clip of the published size: 25 tokens of each frame enter, and 3% of the clip's go on from layer 20."""
    clip = {"text_tokens": 0, "visual_tokens": 32 * 196, "images": 32}
    policy = rk.preset(QWEN, "flashvid", "10%")
    counted = rk.cost(QWEN, policy, **clip)
    assert [stage.visual_tokens for stage in counted.stages] == [32 * 25, 235]
    assert policy.schedule[0].keep * 6272 == pytest.approx(235.2)
    assert counted.average_visual_tokens == average_visual_tokens(policy, 28, 6272, images=32)
    assert rk.cost(QWEN, None, **clip) == rk.cost(QWEN, None, 0, 6272)
    for images, error in (
        (0, "images must be 1 or more, got 0"),
        (5, "visual_tokens must be a multiple of images, 5,"),
    ):
        with pytest.raises(ValueError, match=error):
            rk.cost(QWEN, policy, 0, 6272, images=images)


def test_expansion_is_that_of_the_reducer():
    assert FlashVid(0.1).expansion == EXPANSION
