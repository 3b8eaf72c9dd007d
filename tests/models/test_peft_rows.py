"""Adapters of PEFT that count tokens in rows, or add some in front of them."""

import copy

import peft
import pytest
import torch

import reroute_kernels as rk
from tests.models.families import load
from tests.models.prompts import ACTIONS, Prompt
from tests.models.slow_way import decoder_of

INVOCATION = [401, 402]
GREEDY = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
TARGETS = r".*(language_model|text_model).*(q_proj|v_proj)"
FAMILIES = ("aya_vision", "llava", "qwen2_5_vl")


def policy_of(case, keep, action="reroute"):
    return rk.Policy([rk.Stage(1, keep), rk.Stage(3, keep / 2 if keep < 1 else 1.0)], action)


def activated(case, **arguments):
    config = peft.LoraConfig(
        target_modules=TARGETS, task_type="CAUSAL_LM", alora_invocation_tokens=INVOCATION, **arguments
    )
    model = peft.get_peft_model(copy.deepcopy(case.model), config).eval()
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(len(name)))
    return model


def invoked(prompt, behind):
    """The prompt with the invocation so many tokens before its end."""
    ids = prompt.ids.clone()
    ids[-behind - 2 : len(ids) - behind] = torch.tensor(INVOCATION)
    return Prompt(ids, prompt.features)


def prompts_of(case):
    """Prompts of one image, of two, of text alone, and one that does not call the adapter."""
    return [
        invoked(case.prompt(1, 4, 9, seed=1), 3),
        invoked(case.prompt(2, 3, 6, seed=2), 1),
        invoked(case.prompt(0, 5, 6, seed=3), 0),
        case.prompt(1, 4, 5, seed=4),
    ]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_keeping_everything_in_a_padded_batch(family):
    case = load(family)
    model, inputs = activated(case), case.batch(prompts_of(case))
    expected = model(**inputs).logits
    assert (expected - case.model(**inputs).logits).abs().max() > 0.1
    with rk.apply(model, policy_of(case, 1.0)) as routing:
        actual = model(**inputs).logits
        assert routing.trace is not None
    valid = inputs["attention_mask"].bool()
    assert (actual - expected)[valid].abs().max() <= 1e-4


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_batch_equals_its_samples_alone(family, action):
    case = load(family)
    model, prompts = activated(case), prompts_of(case)
    with rk.apply(model, policy_of(case, 0.5, action)):
        together = model(**case.batch(prompts)).logits
        for row, prompt in enumerate(prompts):
            alone = model(**case.batch([prompt])).logits[0]
            assert (together[row, -1] - alone[-1]).abs().max() <= 1e-4
        # The rows of a stage are cached with their fill in front.
        tokens = model.generate(**case.batch(prompts), **GREEDY)[:, -5:]
        for row, prompt in enumerate(prompts):
            assert torch.equal(tokens[row], model.generate(**case.batch([prompt]), **GREEDY)[0, -5:])
        if family == "llava":
            static = model.generate(**case.batch(prompts), **GREEDY, cache_implementation="static")[:, -5:]
            assert torch.equal(static, tokens)


def test_gradients_of_a_padded_batch():
    case = load("llava")
    model, prompts = activated(case).train(), prompts_of(case)
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}

    def gradients(*batches):
        total = sum(model(**batch).logits[:, -1].logsumexp(-1).sum() for batch in batches)
        return dict(zip(weights, torch.autograd.grad(total, weights.values()), strict=True))

    with rk.apply(model, policy_of(case, 0.5)):
        actual = gradients(case.batch(prompts))
        expected = gradients(*(case.batch([prompt]) for prompt in prompts))
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-3)


@torch.no_grad()
def test_rows_that_are_refused():
    case = load("llava")
    model, prompts = activated(case), prompts_of(case)
    early = prompts[0].ids.clone()
    early[-5:-3] = 7
    early[:2] = torch.tensor(INVOCATION)
    ran = []
    decoder_of(model.get_base_model()).layers[0].register_forward_pre_hook(lambda *_: ran.append(None))
    with rk.apply(model, policy_of(case, 0.5)):
        with pytest.raises(
            NotImplementedError, match="attention_mask must put padding on the left under activated LoRA"
        ):
            model(**case.batch(prompts, "right"))
        with pytest.raises(NotImplementedError, match="got 196 visual tokens behind them"):
            model(**case.batch([Prompt(early, prompts[0].features)]))
        assert not ran
        model(**case.batch(prompts[2:3], "right"))
        model(**case.batch(prompts[:1], "right"))


VIRTUAL = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 5}
OTHERS = {
    "adapter_names": (peft.LoraConfig(target_modules=TARGETS), {"adapter_names": ["default", "__base__"]}),
    "cpt": (
        peft.CPTConfig(
            task_type="CAUSAL_LM", cpt_token_ids=[5, 6, 7], cpt_mask=[1, 1, 1], cpt_tokens_type_mask=[1, 2, 3]
        ),
        {},
    ),
    "ia3": (peft.IA3Config(target_modules=TARGETS, feedforward_modules=[]), {}),
    "p-tuning": (peft.PromptEncoderConfig(**VIRTUAL), {}),
    "prefix-tuning": (peft.PrefixTuningConfig(**VIRTUAL), {}),
    "prompt-tuning": (peft.PromptTuningConfig(**VIRTUAL), {}),
    "vera": (peft.VeraConfig(target_modules=TARGETS), {}),
}


@pytest.mark.parametrize("way", OTHERS)
@torch.no_grad()
def test_other_adapters_keep_everything(way):
    """Also those that put virtual tokens in front of padding, or into the cache."""
    case = load("llava")
    config, arguments = OTHERS[way]
    model = peft.get_peft_model(copy.deepcopy(case.model), config).eval()
    for name, weight in model.named_parameters():
        if "lora_B" in name or "vera_lambda" in name:
            weight.data.normal_(0, 0.3)
    inputs = case.batch(prompts_of(case)[:2])
    expected = model(**inputs, **arguments).logits
    with rk.apply(model, policy_of(case, 1.0)) as routing:
        actual = model(**inputs, **arguments).logits
        assert routing.trace is not None
    valid = inputs["attention_mask"].bool()
    added = expected.shape[1] - valid.shape[1]
    assert (actual - expected)[:, added:][valid].abs().max() <= 1e-4


@torch.no_grad()
def test_virtual_tokens_always_run():
    case = load("llava")
    (prompt,) = prompts_of(case)[:1]
    inputs = case.batch([prompt])
    model = peft.get_peft_model(copy.deepcopy(case.model), peft.PromptTuningConfig(**VIRTUAL)).eval()
    with rk.apply(model, policy_of(case, 0.5)) as routing:
        model(**inputs)
        assert [stage.tokens for stage in routing.trace.stages] == [
            len(prompt) - 196 + 5 + 98,
            len(prompt) - 196 + 5 + 49,
        ]
