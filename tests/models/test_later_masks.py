"""Masks of later calls that hide tokens of the cached prompt: the routed layers honour them as the others do."""

import copy

import pytest
import torch

import reroute_kernels as rk
from tests.models.families import load
from tests.models.prompts import ACTIONS, policy

ONES = (rk.Stage(2, 1.0), rk.Stage(5, 1.0))


def hiding(mask, places):
    mask = mask.clone()
    mask[:, places] = 0
    return mask


def of_four_dimensions(mask, queries):
    """(B, 1, Q, L) of (B, L), causal."""
    total = mask.shape[1]
    causal = torch.ones(queries, total, dtype=torch.bool).tril(total - queries)
    return (causal & mask[:, None].bool())[:, None]


def places(inputs, what):
    """Columns of the prompt to hide."""
    visual = (inputs["input_ids"][0] == 500).nonzero().flatten()
    text = (inputs["input_ids"][0] != 500).nonzero().flatten()
    return {"text": text[:3], "image": visual[2:9], "question": text[-6:-2], "all of the image": visual}[what]


def steps(model, inputs, what, queries, four):
    """Logits of a call of some tokens on the prompt's cache, with a mask that hides some of the prompt."""
    cache = model(**inputs, use_cache=True).past_key_values
    batch_size, length = inputs["input_ids"].shape
    mask = torch.cat([inputs["attention_mask"], torch.ones(batch_size, queries, dtype=torch.int64)], dim=1)
    mask = hiding(mask, places(inputs, what))
    ids = torch.arange(20, 20 + queries).expand(batch_size, -1)
    positions = (length + torch.arange(queries)).expand(batch_size, -1)
    given = of_four_dimensions(mask, queries) if four else mask
    return model(input_ids=ids, attention_mask=given, position_ids=positions, past_key_values=cache).logits


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("four", [False, True], ids=["two", "four"])
@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("what", ["text", "image", "question", "all of the image"])
@torch.no_grad()
def test_keeping_all_equals_the_unrouted_model(what, queries, four, action):
    case = load("llava")
    inputs = case.batch([case.prompt(1, 6, 15, seed=1)])
    expected = steps(case.model, inputs, what, queries, four)
    with rk.apply(case.model, policy(action, ONES)):
        actual = steps(case.model, inputs, what, queries, four)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("queries", [1, 3])
@torch.no_grad()
def test_hidden_tokens_of_a_padded_batch(queries, implementation):
    """Each sample hides the same tokens as alone; those that a stage deferred are hidden already."""
    case = load("llava")
    model = copy.deepcopy(case.model)
    model.set_attn_implementation(implementation)
    prompts = [case.prompt(1, 6, 15, seed=1), case.prompt(1, 2, 4, seed=2)]
    with rk.apply(model, rk.Policy([rk.Stage(1, 0.5), rk.Stage(3, 0.3)])):
        inputs = case.batch(prompts)
        cache = model(**inputs, use_cache=True).past_key_values
        length = inputs["input_ids"].shape[1]
        visual = inputs["input_ids"] == 500
        mask = torch.cat(
            [inputs["attention_mask"] & ~(visual & (visual.cumsum(1) % 2 == 0)), torch.ones(2, queries)], 1
        )
        ids = torch.arange(20, 20 + queries).expand(2, -1)
        together = model(input_ids=ids, attention_mask=mask.long(), past_key_values=cache).logits
        for sample, one in enumerate(prompts):
            alone = case.batch([one])
            cache = model(**alone, use_cache=True).past_key_values
            own = mask[sample : sample + 1, length - len(one) :].long()
            logits = model(input_ids=ids[:1], attention_mask=own, past_key_values=cache).logits
            torch.testing.assert_close(together[sample : sample + 1], logits, atol=1e-4, rtol=0)


@torch.no_grad()
def test_image_turn_that_hides_tokens_of_the_first():
    """A later prompt with an image neither ranks by nor sees tokens that its mask hides; the step after it does."""
    case = load("llava")
    model = case.model
    inputs, others = (case.batch([case.prompt(1, 6, 15, seed=seed)]) for seed in (1, 2))
    expected, step = {}, {}
    length = inputs["input_ids"].shape[1] + others["input_ids"].shape[1]
    mask = torch.cat([inputs["attention_mask"], others["attention_mask"]], dim=1)
    turn = {**others, "attention_mask": hiding(mask, places(inputs, "image")), "position_ids": None}
    del turn["position_ids"]
    for name, this in (("unrouted", None), ("routed", policy(schedule=ONES))):
        routing = rk.apply(model, this) if this else None
        cache = model(**inputs, use_cache=True).past_key_values
        expected[name] = model(**turn, past_key_values=cache).logits
        later = hiding(torch.ones(1, length + 1, dtype=torch.int64), places(inputs, "text"))
        step[name] = model(
            input_ids=torch.tensor([[7]]), attention_mask=later, past_key_values=copy.deepcopy(cache)
        ).logits
        if routing:
            routing.remove()
    torch.testing.assert_close(expected["routed"], expected["unrouted"], atol=1e-4, rtol=0)
    torch.testing.assert_close(step["routed"], step["unrouted"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["mistral3", "aya_vision", "qwen3_5"])
@torch.no_grad()
def test_other_kinds_of_layers(name):
    """Sliding windows, and recurrent states, in which nothing can be hidden later."""
    case = load(name)
    inputs = case.batch([case.prompt(1, 6, 15, seed=1)])
    kinds = case.model.config.get_text_config().layer_types if name != "mistral3" else None
    layers = [n for n, kind in enumerate(kinds) if kind == "full_attention"] if kinds else [1, 2]
    this = rk.Policy([rk.Stage(layer, 1.0) for layer in layers[:2] if layer])
    expected = steps(case.model, inputs, "image", 1, False)
    with rk.apply(case.model, this):
        actual = steps(case.model, inputs, "image", 1, False)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)
