"""Models beside the golden ones, with tiny random weights: DeepStack, kinds of layers, and `generate`."""

import copy

import pytest
import torch

import reroute_kernels as rk
from tests.models.families import MODELS, load
from tests.models.prompts import ACTIONS, policy, selections
from tests.models.slow_way import SlowWay, decoder_of, layer_types
from tests.models.test_slow_way import check
from tests.models.test_ways import GREEDY

STAGES = (rk.Stage(1, 0.4), rk.Stage(3, 0.3), rk.Stage(5, 0.2))
OTHERS = [name for name in MODELS if name not in ("llava", "qwen2_5_vl")]


@pytest.fixture(params=OTHERS)
def case(request):
    return make_case(request.param)


def make_case(name):
    family = load(name)
    return family.model, family.batch([family.prompt(1, 6, 15, seed=1)])


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("layers", [(0, 2), (1, 2, 3), (2, 4), (3, 5)], ids=str)
def test_deepstack_reaches_deferred_tokens(layers, action):
    """Features are added after layers 0, 1 and 2, whether a token runs there or not."""
    model, inputs = make_case("qwen3_vl")
    stages = tuple(rk.Stage(layer, keep) for layer, keep in zip(layers, (0.4, 0.3, 0.2), strict=False))
    check(model, inputs, policy(action, stages))


@torch.no_grad()
def test_deepstack_matters():
    """The test above would see an addition left out."""
    model, inputs = make_case("qwen3_vl")
    this = policy("reroute", (rk.Stage(1, 0.4), rk.Stage(3, 0.3)))
    with rk.apply(model, this) as routing:
        expected = model(**inputs).logits
        routing._adapter.take_layer_features = lambda arguments: (
            arguments.update(deepstack_visual_embeds=None) or [torch.zeros_like(arguments["inputs_embeds"])]
        )
        assert (model(**inputs).logits - expected).abs().max() > 1e-2


@torch.no_grad()
def test_generate_grows_the_cache_of_every_stage(case):
    """Every attention layer caches the tokens that it ran, and one token a step."""
    model, inputs = case
    decoder, prompt = decoder_of(model), inputs["input_ids"].shape[1]
    with rk.apply(model, policy("reroute", STAGES)) as routing:
        cache = model.generate(**inputs, **GREEDY).past_key_values
        stages = routing.trace.stages
    ran = [prompt] + [stages[(number - 1) // 2].tokens for number in range(1, 6)]
    assert stages[2].tokens < stages[1].tokens < stages[0].tokens < prompt
    for number, kind in enumerate(layer_types(decoder)):
        if kind != "linear_attention":
            assert cache.get_seq_length(number) == ran[number] + 7


@pytest.mark.parametrize("name", ["qwen3_5", "qwen3_5_moe"])
@torch.no_grad()
def test_decision_at_the_layer_that_counts_tokens(name):
    """The length of the first attention layer's cache, by which transformers counts, is that of its stage."""
    case = load(name)
    prompts = [case.prompt(1, 6, 15, seed=1), case.prompt(2, 4, 9, seed=2), case.prompt(0, 4, 30, seed=3)]
    expected = [case.model.generate(**case.batch([each]), **GREEDY) for each in prompts]
    with rk.apply(case.model, policy(schedule=(rk.Stage(1, 1.0), rk.Stage(3, 1.0)))):
        for each, plain in zip(prompts, expected, strict=True):
            output = case.model.generate(**case.batch([each]), **GREEDY)
            assert output.sequences.tolist() == plain.sequences.tolist()
            torch.testing.assert_close(torch.stack(output.logits), torch.stack(plain.logits), atol=1e-4, rtol=0)
    with rk.apply(case.model, policy(schedule=(rk.Stage(1, 0.4), rk.Stage(3, 0.3)))):
        single = [case.model.generate(**case.batch([each]), **GREEDY).sequences[0, -8:].tolist() for each in prompts]
        together = case.model.generate(**case.batch(prompts), **GREEDY).sequences[:, -8:].tolist()
    assert together == single


@pytest.mark.parametrize(("name", "kind"), [("qwen3_5", "linear_attention"), ("aya_vision", "sliding_attention")])
def test_decisions_need_full_attention(name, kind):
    message = rf"full attention, of this \w+ForConditionalGeneration 1, 3, 5; got layer 2 of '{kind}'"
    with pytest.raises(NotImplementedError, match=message):
        rk.apply(load(name).model, policy(schedule=(rk.Stage(1, 0.5), rk.Stage(2, 0.5))))


@pytest.mark.parametrize("window", [8, 30, 500])
@pytest.mark.parametrize("action", ACTIONS)
def test_a_sliding_window_is_one_of_positions(window, action):
    """Windows shorter than the prompt, shorter than the tokens selected of it, and longer than both."""
    family = load("aya_vision")
    config = copy.deepcopy(family.model.config)
    config.text_config.sliding_window = window
    torch.manual_seed(0)
    model = type(family.model)(config).eval()
    this = policy(action, (rk.Stage(1, 0.4), rk.Stage(3, 0.3)))
    inputs = family.batch([family.prompt(1, 6, 15, seed=1)])
    with SlowWay(model, this) as slow:
        expected = model.generate(**inputs, **GREEDY)
    with rk.apply(model, this) as routing:
        output = model.generate(**inputs, **GREEDY)
    assert selections(routing.trace) == slow.selected
    assert output.sequences.tolist() == expected.sequences.tolist()
    torch.testing.assert_close(torch.stack(output.logits), torch.stack(expected.logits), atol=1e-4, rtol=0)


@torch.no_grad()
def test_padding_that_the_first_layer_with_full_attention_hides():
    """transformers looks for padding in as many tokens as that layer has cached: those of its stage."""
    family = load("aya_vision")
    config = copy.deepcopy(family.model.config)
    config.text_config.sliding_window = 1000
    torch.manual_seed(0)
    model = type(family.model)(config).eval()
    prompts = [family.prompt(1, 6, 15, seed=seed) for seed in (1, 2)]
    text = torch.randint(3, 400, (2, 9), generator=torch.Generator().manual_seed(0))

    def turns(rows, tokens, padding=0):
        """Logits of a turn of text, whose last sample is padded on the left, and of three tokens after it."""
        inputs = family.batch([prompts[row] for row in rows])
        valid = torch.ones_like(tokens)
        valid[-1, :padding] = 0
        mask = torch.cat([inputs["attention_mask"], valid], dim=1)
        cache = model(**inputs, use_cache=True).past_key_values
        logits = []
        for _ in range(4):
            places = (mask.cumsum(dim=1) - 1)[:, -tokens.shape[1] :]
            step = {"input_ids": tokens, "attention_mask": mask, "position_ids": places}
            logits.append(model(**step, past_key_values=cache).logits[:, -1])
            tokens, mask = logits[-1].argmax(-1)[:, None], torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        return torch.stack(logits, dim=1)

    with rk.apply(model, policy(schedule=(rk.Stage(1, 0.4), rk.Stage(3, 0.3)))):
        together, alone = turns([0, 1], text, padding=4), turns([1], text[1:, 4:])
    torch.testing.assert_close(together[1:], alone, atol=1e-4, rtol=0)


@torch.no_grad()
def test_removal_restores_the_model(case):
    model, inputs = case
    expected = model(**inputs).logits
    with rk.apply(model, policy("reroute", STAGES)):
        assert not torch.equal(model(**inputs).logits, expected)
    assert torch.equal(model(**inputs).logits, expected)


def test_register_refuses_what_it_cannot_use():
    with pytest.raises(ValueError, match=r"model_type must have no adapter yet, got 'llava'"):
        rk.models.register("llava", type("Other", (rk.models.Adapter,), {}))
    with pytest.raises(TypeError, match="adapter must be Adapter or a subclass of it, got 3"):
        rk.models.register("my_vlm", 3)
    with pytest.raises(TypeError, match="model_type must be a string, got None"):
        rk.models.register(None, rk.models.Adapter)
    rk.models.register("llava", rk.models.ADAPTERS["llava"])  # the same again changes nothing
    assert "my_vlm" not in rk.models.ADAPTERS
