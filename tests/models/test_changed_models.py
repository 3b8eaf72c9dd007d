"""Models that change after `apply`, calls past the hooks, and handles that were lost or removed."""

import copy

import pytest
import torch

import reroute_kernels as rk
from tests.models.conftest import hooks
from tests.models.families import load
from tests.models.prompts import policy, selections

NUWA = rk.reducers.Nuwa(keep=0.5, per_cell=2)


@pytest.fixture
def own(model):
    """A copy that a test may change."""
    return copy.deepcopy(model)


def ran(model):
    """Notes the decoder layers that run."""
    numbers = []
    for number, layer in enumerate(model.model.language_model.layers):
        layer.register_forward_pre_hook(lambda *_, number=number: numbers.append(number))
    return numbers


# Changed


@pytest.mark.parametrize("reducer", [None, NUWA], ids=["", "reducer"])
@pytest.mark.parametrize("number", [0, 2, 4, 11], ids=["unrouted", "decision", "stage", "last"])
@torch.no_grad()
def test_layer_that_is_replaced(own, inputs, number, reducer):
    layers = own.model.language_model.layers
    this = rk.Policy(policy().schedule, reducer=reducer)
    with rk.apply(own, this) as routing:
        expected = own(**inputs).logits
        layer, layers[number] = layers[number], copy_of(layers[number])
        numbers = ran(own)
        with pytest.raises(ValueError, match=f"modules that were routed, got another in the place of layer {number}"):
            own(**inputs)
        assert not numbers
        layers[number] = layer
        assert torch.equal(own(**inputs).logits, expected)
        layers[number] = copy_of(layer)
        routing = rk.apply(own, this, replace=True)
        assert torch.equal(own(**inputs).logits, expected)
        routing.remove()


def copy_of(layer):
    other = copy.copy(layer)  # the same weights, and hooks of its own
    other._forward_pre_hooks, other._forward_hooks = type(layer._forward_pre_hooks)(), type(layer._forward_hooks)()
    other._forward_pre_hooks_with_kwargs = type(layer._forward_pre_hooks_with_kwargs)()
    return other


@torch.no_grad()
def test_layers_that_are_cut_off(own, inputs):
    with rk.apply(own, policy()):
        own.model.language_model.layers = own.model.language_model.layers[:9]
        with pytest.raises(ValueError, match="got another in the place of layer 9"):
            own(**inputs)


@torch.no_grad()
def test_decoder_that_is_replaced(own, inputs):
    with rk.apply(own, policy()) as routing:
        expected = own(**inputs).logits
        decoder = own.model.language_model
        own.model.language_model = copy.copy(decoder)
        with pytest.raises(ValueError, match="language_model must be the module that was routed, got another"):
            own(**inputs)
        with pytest.raises(ValueError, match="model must not be routed already"):
            rk.apply(own, policy())
        own.model.language_model = decoder
        assert torch.equal(own(**inputs).logits, expected)
    assert not hooks(own)
    assert rk.routing_of(own) is None
    assert routing.trace is not None


@torch.no_grad()
def test_placeholder_of_another_number(own, inputs):
    """Read from the configuration at every call."""
    with rk.apply(own, policy()) as routing:
        own(**inputs)
        selected = selections(routing.trace)
        own.config.image_token_id = 499
        moved = {**inputs, "input_ids": inputs["input_ids"].masked_fill(inputs["input_ids"] == 500, 499)}
        routing.trace = None
        own(**moved)
        assert list(map(len, selections(routing.trace))) == list(map(len, selected))


@torch.no_grad()
def test_placeholders_without_features(model, inputs):
    """The model takes them for text."""
    text = {name: inputs[name] for name in ("input_ids", "attention_mask", "mm_token_type_ids") if name in inputs}
    count = int((inputs["input_ids"] == 500).sum())
    numbers = []
    handle = model.model.language_model.layers[0].register_forward_pre_hook(lambda *_: numbers.append(0))
    with (
        rk.apply(model, policy()),
        pytest.raises(
            ValueError, match=rf"only beside their features \(pixel_values, .*\), got {count} and no features"
        ),
    ):
        model(**text)
    handle.remove()
    assert not numbers


# Past the hooks


@pytest.mark.parametrize("this", [policy(), rk.Policy([], reducer=NUWA)], ids=["policy", "reducer"])
@torch.no_grad()
def test_forward_of_the_decoder(own, inputs, this):
    decoder = own.model.language_model
    embeds = own.get_input_embeddings()(inputs["input_ids"])
    expected = decoder.forward(inputs_embeds=embeds).last_hidden_state
    with rk.apply(own, this):
        numbers = ran(own)
        for call in (decoder, decoder.forward):
            with pytest.raises(RuntimeError, match="was called on its own: call the whole model"):
                call(inputs_embeds=embeds)
        assert not numbers
        # A layer alone is no decoder.
        tables = decoder.rotary_emb(embeds, torch.arange(embeds.shape[1])[None].expand(axes(own), 1, -1).squeeze(0))
        decoder.layers[4](embeds, position_embeddings=tables, attention_mask=None)
        assert numbers == [4]
    assert torch.equal(decoder.forward(inputs_embeds=embeds).last_hidden_state, expected)


def axes(model):
    return 3 if model.config.model_type == "qwen2_5_vl" else 1


# Handles


def test_removed_handle_is_no_context(model):
    routing = rk.apply(model, policy())
    routing.remove()
    with pytest.raises(RuntimeError, match="routing must be on its model, got one that was removed"), routing:
        pass
    with rk.apply(model, policy()) as first:
        with rk.apply(model, policy("remove"), replace=True):
            pass
        with pytest.raises(RuntimeError, match="got one that was removed"), first:
            pass
    routing.remove()
    assert not hooks(model)


def test_handle_that_was_lost(model, inputs):
    assert rk.routing_of(model) is None
    rk.remove(model)  # nothing to remove is no error
    routing = rk.apply(model, policy())
    assert rk.routing_of(model) is routing
    assert rk.routing_of(torch.nn.Sequential(model)) is routing
    assert rk.routing_of(copy.copy(model)) is routing
    del routing
    with torch.no_grad():
        model(**inputs)
    assert rk.routing_of(model).trace is not None
    rk.remove(model)
    assert not hooks(model)
    assert rk.routing_of(model) is None
    rk.remove(model)


def test_lost_handles_of_several_models(model):
    other = load("llava").model
    both = torch.nn.ModuleList([model, other])
    with rk.apply(model, policy()):
        assert rk.routing_of(both) is rk.routing_of(model)
        with rk.apply(other, rk.Policy([rk.Stage(2, 0.5)])):
            for function in (rk.routing_of, rk.remove):
                with pytest.raises(ValueError, match="model must hold one routed model, got 2 in a ModuleList"):
                    function(both)
            assert rk.routing_of(other) is not rk.routing_of(model)


@pytest.mark.parametrize("function", [rk.routing_of, rk.remove])
def test_lost_handle_of_no_module(function):
    with pytest.raises(TypeError, match="model must be a module, got str"):
        function("llava")
