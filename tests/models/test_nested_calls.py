"""Calls of a routed model while another call of it runs: from hooks, from rankings, after interrupted calls."""

import copy

import pytest
import torch

import reroute_kernels as rk
from tests.models.prompts import policy, selections

POLICIES = [policy(), policy("remove"), rk.Policy([rk.Stage(2, 0.5), rk.Stage(5, 0.25)], positions="contiguous")]
NAMES = ["reroute", "remove", "contiguous"]


def calling(model, number, call):
    """A hook inside a layer that makes a call of its own, once."""
    results = []

    def hook(*_):
        if not results:
            results.append(None)
            results[0] = call()

    handle = model.model.language_model.layers[number].mlp.register_forward_pre_hook(hook)
    return handle, results


@pytest.mark.parametrize("this", POLICIES, ids=NAMES)
@pytest.mark.parametrize("number", [1, 2, 4, 11])
@pytest.mark.parametrize("inner", ["text", "image"])
@torch.no_grad()
def test_prompt_inside_a_prompt(model, inputs, others, this, number, inner):
    nested = {"input_ids": torch.tensor([[5, 6, 7]])} if inner == "text" else others
    with rk.apply(model, this) as routing:
        expected_inner = model(**nested).logits
        expected = model(**inputs).logits
        selected = selections(routing.trace)
        handle, results = calling(model, number, lambda: model(**nested).logits)
        actual = model(**inputs).logits
        handle.remove()
        assert torch.equal(actual, expected)
        assert torch.equal(results[0], expected_inner)
        assert selections(routing.trace) == selected


@pytest.mark.parametrize("this", POLICIES, ids=NAMES)
@torch.no_grad()
def test_call_inside_a_decode_step(model, inputs, this):
    step = {"input_ids": torch.tensor([[7]])}
    with rk.apply(model, this):
        cache = model(**inputs, use_cache=True).past_key_values
        expected = model(**step, past_key_values=copy.deepcopy(cache)).logits
        handle, _ = calling(model, 3, lambda: model(**inputs))
        actual = model(**step, past_key_values=cache).logits
        handle.remove()
    assert torch.equal(actual, expected)


@torch.no_grad()
def test_ranking_that_calls_the_model(model, inputs):
    class Asks:
        def rank(self, candidates):
            model(input_ids=torch.tensor([[5, 6, 7]]))
            return candidates.hidden.float().norm(dim=-1)

    class Computes:
        def rank(self, candidates):
            return candidates.hidden.float().norm(dim=-1)

    schedule = [rk.Stage(2, 0.5), rk.Stage(5, 0.25)]
    with rk.apply(model, rk.Policy(schedule, ranking=Computes())) as routing:
        expected, selected = model(**inputs).logits, selections(routing.trace)
    with rk.apply(model, rk.Policy(schedule, ranking=Asks())) as routing:
        assert torch.equal(model(**inputs).logits, expected)
        assert selections(routing.trace) == selected


def fails(model, inputs, error):
    def fail(*_):
        raise error

    handle = model.model.language_model.layers[6].register_forward_pre_hook(fail)
    with pytest.raises(error):
        model(**inputs)
    handle.remove()


@torch.no_grad()
def test_call_that_fails_inside_another(model, inputs):
    """The hook that made it goes on, and the outer call is still routed."""
    with rk.apply(model, policy()) as routing:
        expected, selected = model(**inputs).logits, selections(routing.trace)
        handle, _ = calling(model, 1, lambda: fails(model, inputs, ZeroDivisionError))
        assert torch.equal(model(**inputs).logits, expected)
        handle.remove()
        assert selections(routing.trace) == selected


@torch.no_grad()
def test_calls_after_an_interrupted_one(model, inputs):
    """PyTorch runs no hook after KeyboardInterrupt: the next call finds the state that was left."""
    with rk.apply(model, policy()) as routing:
        expected, selected = model(**inputs).logits, selections(routing.trace)
        fails(model, inputs, KeyboardInterrupt)
        handle, _ = calling(model, 1, lambda: model(input_ids=torch.tensor([[5, 6, 7]])))
        assert torch.equal(model(**inputs).logits, expected)
        handle.remove()
        assert selections(routing.trace) == selected
        assert not routing._running.stack


@torch.no_grad()
def test_hook_that_fails_before_a_call_is_read(model, inputs):
    """Its error ends the inner call alone, although the hooks of this library never saw that call begin."""

    def fail(*_):
        raise ZeroDivisionError

    def fails():
        handle = model.model.register_forward_pre_hook(fail, prepend=True)
        with pytest.raises(ZeroDivisionError):
            model(input_ids=torch.tensor([[5, 6, 7]]))
        handle.remove()

    with rk.apply(model, policy()) as routing:
        expected, selected = model(**inputs).logits, selections(routing.trace)
        handle, _ = calling(model, 1, fails)
        assert torch.equal(model(**inputs).logits, expected)
        handle.remove()
        assert selections(routing.trace) == selected


@torch.no_grad()
def test_images_encoded_inside_a_reduced_tower(model, inputs):
    reducer = rk.reducers.Nuwa(keep=0.5, per_cell=2)
    tower = model.model.vision_tower if hasattr(model.model, "vision_tower") else model.model.visual
    layers = tower.blocks if hasattr(tower, "blocks") else getattr(tower, "vision_model", tower).encoder.layers
    calls = []

    def hook(*_):
        calls.append(True)
        if len(calls) == 1:
            model(**inputs)

    with rk.apply(model, rk.Policy([rk.Stage(3, 0.5)], reducer=reducer)):
        expected = model(**inputs).logits
        handle = layers[-1].register_forward_pre_hook(hook)
        try:
            with pytest.raises(RuntimeError, match="inside a vision tower whose features are reduced"):
                model(**inputs)
        finally:
            handle.remove()
        assert torch.equal(model(**inputs).logits, expected)
