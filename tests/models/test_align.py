"""Deferred tokens that follow those that ran: tiny models against the slow way, in every way of calling."""

from dataclasses import replace

import pytest
import torch

import reroute_kernels as rk
from reroute_kernels.rankings import AllText, KeyNorm, LastQuery, Mixed
from tests.models.families import load
from tests.models.prompts import offset, selections
from tests.models.slow_way import SlowWay

SCHEDULE = (rk.Stage(1, 0.4), rk.Stage(3, 0.3), rk.Stage(4, 0.2))
PROXIES = (rk.Stage(1, 0.7), rk.Stage(3, 0.6), rk.Stage(4, 0.5))
GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
FAMILIES = ["llava", "qwen2_5_vl", "qwen3_vl"]


def aligned(**others):
    return rk.Policy(**{"schedule": SCHEDULE, "align": "stage", **others})


@pytest.fixture(params=FAMILIES)
def family(request):
    return load(request.param)


@pytest.fixture
def inputs(family):
    return family.batch([family.prompt(2, 6, 15, seed=1)])


def check(model, inputs, policy):
    with SlowWay(model, policy) as slow, torch.no_grad():
        expected = model(**inputs)
        answer = model.generate(**inputs, **GREEDY)
    with rk.apply(model, policy) as routing, torch.no_grad():
        output = model(**inputs)
        assert selections(routing.trace) == slow.selected
        assert model.generate(**inputs, **GREEDY).tolist() == answer.tolist()
    # The addition of waiting tokens is rounded at other places.
    torch.testing.assert_close(output.logits, expected.logits, atol=1e-4, rtol=0)
    return output.logits


@torch.no_grad()
def check_padded_batch(family, policy, side, prompts):
    """A batch gives what its samples give alone."""
    with rk.apply(family.model, policy) as routing:
        together = family.model(**family.batch(prompts, side)).logits
        trace = routing.trace
        for row, prompt in enumerate(prompts):
            begin = offset(prompt, together.shape[1], side)
            alone = family.model(**family.batch([prompt])).logits[0]
            torch.testing.assert_close(together[row, begin : begin + len(prompt)][-9:], alone[-9:], atol=1e-4, rtol=0)
            if prompt.features:
                assert selections(trace, row, begin) == selections(routing.trace)


@torch.no_grad()
def check_later_turn(family, inputs, policy, other, message):
    """A later turn on the cache equals the slow way; under another policy it is refused."""
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 3), value=1)
    turn = {"input_ids": torch.tensor([[7, 8, 9]]), "attention_mask": mask}
    if rk.models.ADAPTERS[family.model.config.model_type].position_axes == 3:
        turn["position_ids"] = (mask.cumsum(dim=1) - 1)[None, :, -3:].expand(3, -1, -1)
    with SlowWay(family.model, policy):
        cache = family.model(**inputs, use_cache=True).past_key_values
        expected = family.model(**turn, past_key_values=cache).logits
    with rk.apply(family.model, policy):
        cache = family.model(**inputs, use_cache=True).past_key_values
        later = family.model(**turn, past_key_values=cache).logits
    torch.testing.assert_close(later, expected, atol=1e-4, rtol=0)
    with rk.apply(family.model, other), pytest.raises(ValueError, match=message):
        family.model(**turn, past_key_values=cache)


@pytest.mark.parametrize("ranking", [LastQuery(), LastQuery("previous"), Mixed(LastQuery(), 0.9)], ids=repr)
def test_proxies_equal_the_slow_way(family, ranking):
    inputs = family.batch([family.prompt(2, 8, 15, seed=1)])
    policy = aligned(align="proxy", schedule=PROXIES, ranking=ranking)
    logits = check(family.model, inputs, policy)
    with rk.apply(family.model, replace(policy, align=None)), torch.no_grad():
        assert (family.model(**inputs).logits - logits).abs().max() > 1e-2


def test_a_stage_of_few_tokens_has_no_proxies(family, inputs):
    policy = aligned(align="proxy", schedule=[rk.Stage(2, 0.6), rk.Stage(3, 0.02), rk.Stage(4, 0.4)])
    candidates = int((inputs["input_ids"] == family.model.config.image_token_id).sum())
    first, second, _ = policy.proxy_counts(policy.selected_counts(candidates), candidates)
    assert first > 0
    assert second == 0
    check(family.model, inputs, policy)


RANKINGS = [LastQuery(), LastQuery("previous"), AllText(), KeyNorm("previous")]


@pytest.mark.parametrize("ranking", RANKINGS, ids=repr)
def test_equals_the_slow_way(family, inputs, ranking):
    check(family.model, inputs, aligned(ranking=ranking))


def test_contiguous_positions(family, inputs):
    check(family.model, inputs, aligned(positions="contiguous"))


@torch.no_grad()
def test_it_matters(family, inputs):
    """The tests above would see it left out."""
    with rk.apply(family.model, aligned()):
        logits = family.model(**inputs).logits
    with rk.apply(family.model, rk.Policy(SCHEDULE)):
        assert (family.model(**inputs).logits - logits).abs().max() > 1e-2


@pytest.mark.parametrize("align", ["stage", "proxy"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_equals_its_samples(family, side, align):
    prompts = [family.prompt(1, 6, 15, seed=1), family.prompt(2, 4, 9, seed=2), family.prompt(0, 4, 30, seed=3)]
    policy = aligned(align=align, schedule=SCHEDULE if align == "stage" else PROXIES)
    check_padded_batch(family, policy, side, prompts)


@torch.no_grad()
def test_one_decision_leaves_nothing_to_align(family, inputs):
    schedule = (rk.Stage(2, 0.3),)
    with rk.apply(family.model, rk.Policy(schedule)):
        expected = family.model(**inputs).logits
    with rk.apply(family.model, aligned(schedule=schedule)):
        assert torch.equal(family.model(**inputs).logits, expected)


def test_a_later_turn_and_another_policy(family, inputs):
    """The record on the cache tells policies apart."""
    policy = aligned()
    check_later_turn(family, inputs, policy, replace(policy, align=None), "filled under align-stage:1")


def test_gradients_reach_the_tokens_that_ran(family):
    """Once through the rows that are written back, and once through what they add to others."""
    embeds, inputs = {}, family.batch([family.prompt(2, 8, 15, seed=1)])

    def keep(module, args, output):
        embeds["of"] = output
        output.retain_grad()

    weight = family.model.get_input_embeddings().weight
    grads = []
    for align in (None, "stage", "proxy"):
        handle = family.model.get_input_embeddings().register_forward_hook(keep)
        with rk.apply(family.model, aligned(align=align, schedule=PROXIES)):
            family.model(**inputs).logits[0, -1].logsumexp(0).backward()
        handle.remove()
        grads.append(embeds["of"].grad.clone())
    weight.grad = None
    family.model.zero_grad(set_to_none=True)
    assert all(grad.isfinite().all() for grad in grads)
    assert not torch.allclose(grads[0], grads[1])
    assert not torch.allclose(grads[0], grads[2])


@torch.no_grad()
def test_kernels_do_the_same():
    """Under Triton's kernels the norm of the ranking layer is an operation of its own, behind the addition."""
    family = load("qwen3_vl")
    inputs = family.batch([family.prompt(1, 3, 5, seed=1)])
    with rk.apply(family.model, aligned()) as routing:
        expected, selected = family.model(**inputs).logits, selections(routing.trace)
        with rk.backend("triton"):
            torch.testing.assert_close(family.model(**inputs).logits, expected, atol=1e-4, rtol=0)
        assert selections(routing.trace) == selected
