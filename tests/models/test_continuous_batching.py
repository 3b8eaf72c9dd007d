"""Continuous batching of transformers: requests of text on a routed model run untouched, those with images are refused.

transformers hands no image to its batches yet; when it does, the first of these tests needs another answer.
"""

import copy

import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

import reroute_kernels as rk
from tests.models.prompts import policy

SETTINGS = GenerationConfig(max_new_tokens=3, do_sample=False, eos_token_id=2, pad_token_id=0)
SMALL = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=512)  # not as much as the memory holds
MESSAGE = r"inputs must be text in continuous batching .*; got %s visual tokens and a PagedAttentionCache"


def generated(model, requests) -> list[tuple[list[int], str | None]]:
    """Tokens and error of each request."""
    settings = {"generation_config": SETTINGS, "continuous_batching_config": copy.deepcopy(SMALL)}
    outputs = model.generate_batch(inputs=requests, **settings, progress_bar=False)
    return [(outputs[name].generated_tokens, outputs[name].error) for name in sorted(outputs)]


@pytest.fixture
def requests(prompt):
    image, *texts = prompt(1, 5, 12, seed=1), prompt(0, 5, 12, seed=1), prompt(0, 9, 12, seed=2)
    return {"image": image.ids.tolist(), "texts": [text.ids.tolist() for text in texts]}


def test_requests(model, requests):
    model = copy.deepcopy(model)
    expected = generated(model, requests["texts"])
    if not expected:
        pytest.skip("this version batches no vision-language model continuously")
    assert all(error is None for _, error in expected)
    model.set_attn_implementation("sdpa")
    with rk.apply(model, policy()) as routing:
        assert generated(model, requests["texts"]) == expected
        for tokens, error in generated(model, [requests["image"], requests["texts"][0]]):
            assert not tokens
            assert "inputs must be text in continuous batching" in error
        assert routing.trace is None


class PagedAttentionCache:
    """Holds nothing: if it is written to, a layer has run."""


@torch.no_grad()
def test_paged_call(model, requests):
    """As the batches call the model, whatever the version."""
    ids = torch.tensor([[*requests["texts"][0], *requests["image"]]])
    count = int((ids == model.config.image_token_id).sum())
    call = {"cache": PagedAttentionCache(), "use_cache": False, "position_ids": torch.arange(ids.shape[1])[None]}
    ran = []
    handle = model.model.language_model.layers[0].register_forward_pre_hook(lambda *_: ran.append(1))
    try:
        with rk.apply(model, policy()), pytest.raises(NotImplementedError, match=MESSAGE % count):
            model(input_ids=ids, **call)
    finally:
        handle.remove()
    assert not ran
