"""Gradients equal those of a plain routed call if activations are computed anew in the backward pass."""

import copy
import functools

import pytest
import torch
import transformers
from torch.distributed._composable import checkpoint as composable
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.utils.checkpoint import checkpoint

import reroute_kernels as rk
from tests.models.families import load
from tests.models.prompts import ACTIONS, IMAGE
from tests.models.slow_way import decoder_of

FAMILIES = ("glm4v_moe", "llava", "qwen2_5_vl", "qwen3_5", "qwen3_vl_moe")
RANKINGS = {"this": rk.rankings.LastQuery(), "previous": rk.rankings.LastQuery("previous")}
HOOKS_ARE_OUTSIDE = tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 23)


def wrap(model, chosen, implementation=CheckpointImpl.NO_REENTRANT):
    modules = set(chosen)
    wrapper = functools.partial(checkpoint_wrapper, checkpoint_impl=implementation)
    apply_activation_checkpointing(model, wrapper, lambda module: module in modules)


def layers(model):
    return list(decoder_of(model).layers)


def compose(model):
    for layer in layers(model):
        composable(layer)


BEFORE = {
    "layers": lambda model: wrap(model, layers(model)),
    "layers-reentrant": lambda model: wrap(model, layers(model), CheckpointImpl.REENTRANT),
    "every-second-layer": lambda model: wrap(model, layers(model)[::2]),
    "mlp": lambda model: wrap(model, [layer.mlp for layer in layers(model)]),
    "self-attn": lambda model: wrap(model, [layer.self_attn for layer in layers(model) if hasattr(layer, "self_attn")]),
    "norms": lambda model: wrap(model, [layer.input_layernorm for layer in layers(model)]),
    "composable": compose,
}
# Wrap the layers, which may also come once the model is routed.
AFTER = {name: BEFORE[name] for name in ("mlp", "self-attn", "norms", "composable")}


def policy_of(case, action="reroute", ranking=RANKINGS["this"], positions="original"):
    kinds = getattr(case.model.config.get_text_config(), "layer_types", None) or ()
    numbers = (1, 3, 5) if "linear_attention" in kinds else (1, 2, 4)
    stages = [rk.Stage(layer, keep) for layer, keep in zip(numbers, (0.5, 0.3, 0.2), strict=True)]
    return rk.Policy(stages, action, ranking, positions)


def inputs_of(case):
    inputs = case.batch([case.prompt(1, 4, 9, seed=1), case.prompt(2, 3, 6, seed=2)])
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels[:, :-4] = -100
    return inputs | {"labels": labels, "use_cache": False}


def trained(case):
    model = copy.deepcopy(case.model).train()
    model.requires_grad_(False)
    decoder_of(model).requires_grad_(True)
    if case.name == "llava":
        model.get_input_embeddings().requires_grad_(True)
    return model


def gradients(model, call=None):
    model.zero_grad()
    loss = (call or model)(**model.arguments).loss
    loss.backward()
    names = {name.replace("_checkpoint_wrapped_module.", ""): weight for name, weight in model.named_parameters()}
    return loss.detach(), {name: weight.grad.clone() for name, weight in names.items() if weight.grad is not None}


def check(case, policy, before=None, after=None, call=None, plain_before=None):
    plain, model = trained(case), trained(case)
    # Reentrant checkpoints have no gradients if no input has.
    for each in (plain, model):
        each.arguments = inputs_of(case)
        each.enable_input_require_grads()
    if plain_before is not None:
        plain_before(plain)
    with rk.apply(plain, policy) as routing:
        expected = gradients(plain)
        chosen = [stage.selected for stage in routing.trace.stages]
    if before is not None:
        before(model)
    with rk.apply(model, policy) as routing:
        if after is not None:
            after(model)
        for _step in range(2):
            loss, actual = gradients(model, None if call is None else functools.partial(call, model))
            torch.testing.assert_close((loss, actual), expected, atol=1e-5, rtol=1e-4)
            for stage, rows in zip(routing.trace.stages, chosen, strict=True):
                assert all(map(torch.equal, stage.selected, rows))


@pytest.mark.parametrize("way", BEFORE)
@pytest.mark.parametrize("family", FAMILIES)
def test_wrapped_and_then_routed(family, way):
    case = load(family)
    check(case, policy_of(case), before=BEFORE[way])


@pytest.mark.parametrize("way", AFTER)
@pytest.mark.parametrize("family", ["llava", "qwen3_vl_moe"])
def test_routed_and_then_wrapped(family, way):
    case = load(family)
    check(case, policy_of(case), after=AFTER[way])


@pytest.mark.parametrize("positions", ["original", "contiguous"])
@pytest.mark.parametrize("ranking", RANKINGS)
@pytest.mark.parametrize("action", ACTIONS)
def test_policies(action, ranking, positions):
    case = load("llava")
    check(case, policy_of(case, action, RANKINGS[ranking], positions), before=BEFORE["layers"])


def test_layers_wrapped_after_apply_are_refused():
    case = load("llava")
    model = trained(case)
    model.arguments = inputs_of(case)
    ran = []
    with rk.apply(model, policy_of(case)):
        BEFORE["layers"](model)
        model.model.language_model.layers[0].register_forward_pre_hook(lambda *_: ran.append(None))
        with pytest.raises(ValueError, match="layers must be the modules that were routed"):
            gradients(model)
    assert not ran


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("family", ["llava", "qwen3_vl_moe"])
def test_checkpoint_around_the_whole_call(family, reentrant):
    case = load(family)

    def call(model, **arguments):
        names = list(arguments)

        def run(_grad, *values):
            return model(**dict(zip(names, values, strict=True))).loss

        grad = torch.zeros((), requires_grad=True)
        loss = checkpoint(run, grad, *arguments.values(), use_reentrant=reentrant)
        return transformers.utils.ModelOutput(loss=loss)

    check(case, policy_of(case), call=call)


@pytest.mark.everyday(8)
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("use_cache", [False, True], ids=["no-cache", "cache"])
@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointing_of_transformers(family, use_cache, reentrant):
    case = load(family)

    def enable(model):
        model.arguments["use_cache"] = use_cache
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})

    if HOOKS_ARE_OUTSIDE:
        check(case, policy_of(case), before=enable)
        check(case, policy_of(case), after=enable)
    else:
        with pytest.raises(NotImplementedError, match="gradient checkpointing must be off for a routed prompt"):
            check(case, policy_of(case), before=enable)


def tower_layers(model):
    return list(model.model.visual.blocks if hasattr(model.model, "visual") else tower(model).encoder.layers)


def tower(model):
    return getattr(model.model.vision_tower, "vision_model", model.model.vision_tower)


TOWERS = {
    "wrapped": lambda model: wrap(model, tower_layers(model)),
    "wrapped-reentrant": lambda model: wrap(model, tower_layers(model), CheckpointImpl.REENTRANT),
}


@pytest.mark.parametrize("way", [*TOWERS, "transformers"])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_vision_tower_under_a_reducer(family, way):
    case = load(family)
    policy = rk.Policy(policy_of(case).schedule, reducer=rk.reducers.Nuwa(keep=0.5, per_cell=1))

    def enable(model):
        model.requires_grad_(True)
        if way == "transformers":
            model.gradient_checkpointing_enable({"use_reentrant": False})
            for layer in layers(model):
                layer.gradient_checkpointing = False
        else:
            TOWERS[way](model)

    if way == "transformers" and not HOOKS_ARE_OUTSIDE:
        with pytest.raises(NotImplementedError, match="gradient checkpointing must be off for a routed prompt"):
            check(case, policy, before=enable)
        return
    check(case, policy, before=enable, plain_before=lambda model: model.requires_grad_(True))


def test_generation_while_layers_are_wrapped():
    case = load("llava")
    arguments = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    inputs = case.batch([case.prompt(1, 4, 9, seed=1)])
    assert (inputs["input_ids"] == IMAGE).any()
    with rk.apply(case.model, policy_of(case)):
        expected = case.model.generate(**inputs, **arguments)
    model = copy.deepcopy(case.model)
    BEFORE["layers"](model)
    with rk.apply(model, policy_of(case)):
        assert torch.equal(model.generate(**inputs, **arguments), expected)
