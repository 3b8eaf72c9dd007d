"""Invariants of routing."""

import pytest
import torch

import reroute_kernels as rk
from tests.models.conftest import hooks
from tests.models.prompts import ACTIONS, batch, cached_lengths, policy

ALL = tuple(rk.Stage(layer, 1.0) for layer in (1, 4, 9))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("action", ACTIONS)
@torch.no_grad()
def test_keeping_everything_equals_the_unrouted_model(model, inputs, action, attention):
    model.set_attn_implementation(attention)
    expected = model(**inputs, use_cache=True)
    with rk.apply(model, policy(action, ALL)) as routing:
        output = model(**inputs, use_cache=True)
    assert routing.trace is not None
    torch.testing.assert_close(output.logits, expected.logits, atol=1e-5, rtol=0)
    assert cached_lengths(output.past_key_values) == cached_lengths(expected.past_key_values)


@torch.no_grad()
def test_one_decision_reroutes_and_removes_alike(model, inputs):
    stage = (rk.Stage(3, 0.2),)
    logits = []
    for action in ACTIONS:
        with rk.apply(model, policy(action, stage)):
            logits.append(model(**inputs).logits[inputs["input_ids"] != 500])
    assert torch.equal(*logits)


@torch.no_grad()
def test_actions_differ_from_the_second_decision_on(model, inputs):
    logits, selected = [], []
    for action in ACTIONS:
        with rk.apply(model, policy(action)) as routing:
            logits.append(model(**inputs).logits[0, -1])
        selected.append([set(stage.selected[0].tolist()) for stage in routing.trace.stages])
    assert not torch.allclose(*logits, atol=1e-3)
    rerouted, removed = selected
    assert removed[0] >= removed[1] >= removed[2]
    assert rerouted[1] - rerouted[0], "no deferred token came back"


@pytest.mark.parametrize("action", ACTIONS)
@torch.no_grad()
def test_deferred_tokens_keep_their_hidden_state_and_write_no_key(model, inputs, action):
    """Seen from outside: the inputs and outputs of each layer."""
    seen = {}
    layers = model.model.language_model.layers
    handles = [
        layer.register_forward_hook(lambda module, args, output, number=number: seen.update({number: output.clone()}))
        for number, layer in enumerate(layers)
    ]
    try:
        with rk.apply(model, policy(action)) as routing:
            output = model.model(**inputs, use_cache=True)
    finally:
        for handle in handles:
            handle.remove()
    length = inputs["input_ids"].shape[1]
    visual = (inputs["input_ids"][0] == 500).nonzero().flatten().tolist()
    text = length - len(visual)
    tokens = [length] * 2 + [text + len(stage.selected[0]) for stage in routing.trace.stages for _ in range(3)]
    tokens += [tokens[-1]] * (len(layers) - len(tokens))
    assert cached_lengths(output.past_key_values) == tokens
    assert [seen[number].shape[1] for number in range(len(layers) - 1)] == tokens[:-1]

    ran = set().union(*(stage.selected[0].tolist() for stage in routing.trace.stages))
    never_ran = [position for position in visual if position not in ran]
    assert never_ran
    normed = model.model.language_model.norm(seen[1])
    assert torch.equal(output.last_hidden_state[0, never_ran], normed[0, never_ran])


@pytest.mark.parametrize("action", ACTIONS)
def test_text_only_prompt_runs_untouched(model, prompt, action):
    inputs = batch([prompt(0, 20, 11, seed=3)])
    with torch.no_grad():
        expected = model(**inputs, use_cache=True)
    tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    with rk.apply(model, policy(action)) as routing, torch.no_grad():
        output = model(**inputs, use_cache=True)
        routed_tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert routing.trace is None
    assert torch.equal(output.logits, expected.logits)
    assert torch.equal(routed_tokens, tokens)


@torch.no_grad()
def test_removal_restores_the_model(model, inputs):
    def state():
        modules = {name: set(vars(module)) for name, module in model.named_modules()}
        return modules, {name: type(module) for name, module in model.named_modules()}

    model(**inputs)
    attributes, weights = state(), {name: value.clone() for name, value in model.state_dict().items()}
    expected = model(**inputs).logits
    with rk.apply(model, policy()) as routing:
        routed = model(**inputs).logits
        assert hooks(model)
    assert not torch.allclose(routed, expected)
    assert not hooks(model)
    assert state() == attributes
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(**inputs).logits, expected)
    routing.remove()  # again: nothing happens
    with rk.apply(model, policy()):
        assert torch.equal(model(**inputs).logits, routed)


@torch.no_grad()
def test_model_hidden_states_are_not_written_to(model, inputs):
    """A hook of the user's that holds a layer's output finds it unchanged after the prefill."""
    held = []
    first = policy().schedule[0].layer
    handle = model.model.language_model.layers[first - 1].register_forward_hook(
        lambda module, args, output: held.append((output, output.clone()))
    )
    try:
        with rk.apply(model, policy()):
            model(**inputs)
    finally:
        handle.remove()
    ((output, copy),) = held
    assert torch.equal(output, copy)


def test_gradients_flow_through_a_routed_forward(model, inputs):
    model.zero_grad()
    with rk.apply(model, policy()) as routing:
        loss = model(**inputs).logits[0, -1].logsumexp(-1)
        loss.backward()
    assert routing.trace is not None
    gradient = model.model.language_model.layers[6].mlp.up_proj.weight.grad
    assert gradient is not None
    assert gradient.abs().sum() > 0
    model.zero_grad()


@torch.no_grad()
def test_one_transfer_per_prefill_and_none_at_decode(model, inputs, transfers):
    """Transfers are counted at the calls that make them from Python: `item`, `tolist`, `cpu`, `nonzero`, `bool`."""

    def run():
        transfers.clear()
        output = model(**inputs, use_cache=True)
        prefill = len(transfers)
        transfers.clear()
        model(input_ids=torch.tensor([[5]]), position_ids=position, past_key_values=output.past_key_values)
        return prefill, len(transfers)

    position = torch.tensor([[inputs["input_ids"].shape[1]]])
    unrouted = run()
    with rk.apply(model, policy()) as routing:
        routed = run()
        assert routed == (unrouted[0] + 1, unrouted[1])
        transfers.clear()
        assert len(routing.trace.stages[0].selected) == 1
        assert transfers, "the count sees no transfer at all"
