"""Routing equals the same thing done the slow way: one sample, full attention matrices, gather and scatter by index."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

import reroute_kernels as rk
from tests.models.prompts import ACTIONS, GOLDEN, batch, llava_prompt, policy, selections
from tests.models.slow_way import SlowWay


def check(model, inputs, this):
    with SlowWay(model, this) as slow, torch.no_grad():
        expected = model(**inputs).logits
    with rk.apply(model, this) as routing, torch.no_grad():
        logits = model(**inputs).logits
    assert selections(routing.trace) == slow.selected
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("first", [0, 3])
def test_golden_models(model, prompt, action, images, first):
    this = policy(action, (rk.Stage(first, 0.35), rk.Stage(6, 0.25), rk.Stage(7, 0.3), rk.Stage(11, 0.1)))
    check(model, batch([prompt(images, 6, 14, seed=11)]), this)


@pytest.fixture(params=["llama", "mistral", "qwen2"])
def text_model_type(request):
    return request.param


@pytest.mark.parametrize("action", ACTIONS)
def test_every_text_model_of_llava_with_grouped_queries(text_model_type, action):
    torch.manual_seed(4)
    config = AutoConfig.from_pretrained(GOLDEN / "llava")
    values = {
        **config.text_config.to_dict(),
        "model_type": text_model_type,
        "num_key_value_heads": 2,
        "sliding_window": None,
        "num_hidden_layers": 6,
        "initializer_range": 0.2,
    }
    config.text_config = AutoConfig.for_model(**values)
    model = AutoModelForImageTextToText.from_config(config).eval()
    this = policy(action, (rk.Stage(1, 0.35), rk.Stage(4, 0.25)))
    check(model, batch([llava_prompt(1, 6, 14, seed=11)]), this)
