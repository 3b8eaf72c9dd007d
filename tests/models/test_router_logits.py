"""The load-balancing loss of mixtures of experts is that of the tokens that ran."""

import copy
import importlib
from unittest import mock

import pytest
import torch

import reroute_kernels as rk
from tests.models.families import load
from tests.models.prompts import ACTIONS, selections
from tests.models.slow_way import SlowWay

FAMILIES = ("glm4v_moe", "qwen3_5_moe", "qwen3_vl_moe")


def policy_of(case, keeps, action="reroute"):
    numbers = (1, 3) if case.name == "qwen3_5_moe" else (2, 4)
    return rk.Policy([rk.Stage(*each) for each in zip(numbers, keeps, strict=True)], action)


def sides(family):
    return ("left",) if family == "qwen3_5_moe" else ("left", "right")


CASES = [(family, side) for family in FAMILIES for side in sides(family)]


def prompts_of(case):
    return [case.prompt(1, 4, 9, seed=1), case.prompt(2, 3, 6, seed=2), case.prompt(0, 5, 6, seed=3)]


def call(case, inputs, **arguments):
    return case.model(**inputs, labels=labels_of(inputs), output_router_logits=True, **arguments)


def labels_of(inputs):
    """All text, so that the last token ranks."""
    return inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)


@pytest.mark.parametrize(("family", "side"), CASES)
@torch.no_grad()
def test_keeping_everything_in_a_padded_batch(family, side):
    case = load(family)
    inputs = case.batch(prompts_of(case), side)
    expected = call(case, inputs)
    with rk.apply(case.model, policy_of(case, (1.0, 1.0))) as routing:
        actual = call(case, inputs)
        assert routing.trace is not None
    assert actual.aux_loss.item() == pytest.approx(expected.aux_loss.item(), abs=1e-5)
    assert actual.loss.item() == pytest.approx(expected.loss.item(), abs=1e-4)
    tokens = int(inputs["attention_mask"].sum())
    assert [len(rows) for rows in actual.router_logits] == [tokens] * len(actual.router_logits)
    for rows, full in zip(actual.router_logits, expected.router_logits, strict=True):
        valid = full[inputs["attention_mask"].flatten().bool()]
        assert (rows - valid).abs().max() <= 1e-4


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize(("family", "side"), CASES)
@torch.no_grad()
def test_rows_and_loss_of_the_tokens_that_ran(family, side, action):
    """The router logits of the samples alone, routed the slow way, joined; and their loss by the model's module."""
    case = load(family)
    this, prompts = policy_of(case, (0.5, 0.3), action), prompts_of(case)
    inputs = case.batch(prompts, side)
    with rk.apply(case.model, this):
        actual = call(case, inputs)
    alone = []
    for prompt in prompts:
        single = case.batch([prompt]) | {"attention_mask": None}
        with SlowWay(case.model, this):
            alone.append(case.model(**single, output_router_logits=True, use_cache=False).router_logits)
    # Rows of one layer after the other, each with its samples one after the other.
    expected = tuple(map(torch.cat, zip(*alone, strict=True)))
    for rows, others in zip(actual.router_logits, expected, strict=True):
        assert rows.shape == others.shape
        assert (rows - others).abs().max() <= 1e-4
    assert actual.aux_loss.item() == pytest.approx(float(loss_of(case, expected)), abs=1e-5)


def loss_of(case, rows):
    """The loss as the model's own module computes it."""
    text = case.model.config.text_config
    experts = getattr(text, "num_experts", None) or text.n_routed_experts
    module = importlib.import_module(type(case.model).__module__)
    return module.load_balancing_loss_func(rows, experts, text.num_experts_per_tok, None)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_the_routers(family):
    case = load(family)
    model = copy.deepcopy(case.model).train()
    inputs = case.batch(prompts_of(case))
    routers = {name: weight for name, weight in model.named_parameters() if name.endswith("mlp.gate.weight")}
    assert routers

    def gradients():
        loss = model(**inputs, output_router_logits=True).aux_loss
        return dict(zip(routers, torch.autograd.grad(loss, routers.values()), strict=True))

    expected = gradients()
    with rk.apply(model, policy_of(case, (1.0, 1.0))):
        torch.testing.assert_close(gradients(), expected, atol=1e-5, rtol=1e-3)
    with rk.apply(model, policy_of(case, (0.5, 0.3))):
        routed = gradients()
    assert all(gradient.isfinite().all() and gradient.abs().sum() > 0 for gradient in routed.values())


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_other_ways_to_ask(family):
    """By the configuration of the text model, and with the answer in a tuple."""
    case = load(family)
    inputs = case.batch(prompts_of(case))
    this, text = policy_of(case, (0.5, 0.3)), case.model.config.text_config
    with rk.apply(case.model, this) as routing:
        expected = case.model(**inputs, output_router_logits=True)
        chosen = selections(routing.trace)
        as_tuple = case.model(**inputs, output_router_logits=True, return_dict=False)
        assert any(torch.equal(each, expected.aux_loss) for each in as_tuple if isinstance(each, torch.Tensor))
        with mock.patch.object(text, "output_router_logits", True, create=True):
            by_config = case.model(**inputs)
        assert selections(routing.trace) == chosen
        assert by_config.aux_loss is None or torch.equal(by_config.aux_loss, expected.aux_loss)
        assert torch.equal(by_config.logits, expected.logits)
        assert case.model(**inputs).router_logits is None


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_text_alone_is_untouched(family):
    case = load(family)
    inputs = case.batch([case.prompt(0, 5, 6, seed=3), case.prompt(0, 3, 2, seed=4)])
    expected = case.model(**inputs, output_router_logits=True)
    with rk.apply(case.model, policy_of(case, (0.5, 0.3))):
        actual = case.model(**inputs, output_router_logits=True)
    assert torch.equal(actual.aux_loss, expected.aux_loss)
    assert all(map(torch.equal, actual.router_logits, expected.router_logits))
