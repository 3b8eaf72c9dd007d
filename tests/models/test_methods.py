"""Every published method by its name, under both actions, on models as deep as those that it was published for."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

import reroute_kernels as rk
from reroute_kernels.presets import METHODS, NUM_LAYERS, ORIGINALS, tiers
from tests.models.prompts import ACTIONS, GOLDEN, PROMPTS, batch
from tests.models.test_rankings import check as check_rankings
from tests.models.test_reducers import check as check_reducer

FOLDERS = {"llava-1.5-7b": "llava", "qwen2.5-vl-7b": "qwen2_5_vl"}
NAMES = [method for method in METHODS + ORIGINALS if not method.endswith("stagewise")]


@cache
def deep_model(name):
    """The golden model of a family with as many layers as the published one."""
    config = AutoConfig.from_pretrained(GOLDEN / FOLDERS[name])
    text = config.text_config.to_dict() | {"num_hidden_layers": NUM_LAYERS[name], "layer_types": None}
    config.text_config = type(config.text_config)(**text)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config).eval()
    assert len(model.model.language_model.layers) == NUM_LAYERS[name]
    return model


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("method", NAMES)
@pytest.mark.parametrize("name", FOLDERS)
def test_generation(name, method, action):
    inputs = batch([PROMPTS[FOLDERS[name]](2, 6, 14, seed=11)])
    policy = replace(rk.preset(name, method, tiers(name, method)[0]), action=action)
    check = check_reducer if policy.reducer is not None else check_rankings
    trace = check(deep_model(name), inputs, policy)
    assert [stage.layer for stage in trace.stages] == [stage.layer for stage in policy.schedule]
    if len(trace.stages) > 1 and action == "reroute":
        first, *later = (set(stage.selected[0].tolist()) for stage in trace.stages)
        assert any(selected - first for selected in later), "no token was picked back"
