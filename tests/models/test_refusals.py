"""Unsupported calls raise before the first forward, and name the value that came and those that are accepted."""

import copy
import functools
import inspect
from dataclasses import replace
from unittest import mock

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    DynamicCache,
    LlamaConfig,
)

import reroute_kernels as rk
from reroute_kernels.models import calls
from reroute_kernels.models.adapter import CACHE_NAMES, cache_name
from tests.models.conftest import hooks, no_layer_runs
from tests.models.families import TEXT, load
from tests.models.prompts import GOLDEN, Prompt, batch, policy


def test_policy_must_be_a_policy(model):
    with pytest.raises(TypeError, match="policy must be a Policy or its text, got int"):
        rk.apply(model, 3)


@pytest.mark.parametrize("what", [None, torch.nn.Linear(2, 2), "llava"], ids=["none", "module", "string"])
def test_model_must_be_a_transformers_model(what):
    with pytest.raises(TypeError, match="model must be a transformers model, got"):
        rk.apply(what, policy())


def test_unknown_model_type_is_named_with_those_supported():
    tiny = LlamaConfig(**TEXT)
    with pytest.raises(ValueError, match=r"supported type \(.*aria, .*, vipllava\), got 'llama'"):
        rk.apply(AutoModelForCausalLM.from_config(tiny), policy())


def test_schedule_beyond_the_last_layer(model):
    with pytest.raises(ValueError, match=r"schedule must stay below layer 12 .* got layer 12"):
        rk.apply(model, policy(schedule=(rk.Stage(12, 0.5),)))


@pytest.mark.parametrize("other", [{"positions": "contiguous"}, {"ranking": rk.rankings.LastQuery("previous")}])
def test_images_on_a_filled_cache(model, inputs, others, other):
    with rk.apply(model, rk.Policy([rk.Stage(2, 0.5)], **other)), torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        del others["attention_mask"]
        with pytest.raises(
            NotImplementedError, match=rf"{cache_name(model)} must be empty where .* images and the previous"
        ):
            model(**others, past_key_values=cache)


@pytest.mark.parametrize("ranking", [rk.rankings.LastQuery("previous"), rk.rankings.KeyNorm("previous")])
def test_previous_layer_without_full_attention(ranking):
    case = load("qwen3_5")
    with pytest.raises(NotImplementedError, match=r"must decide after layers with full attention .* layer 3 after one"):
        rk.apply(case.model, rk.Policy([rk.Stage(3, 0.5)], ranking=ranking))


def test_refused_model_is_left_untouched(model):
    with pytest.raises(ValueError, match="below layer 12"):
        rk.apply(model, policy(schedule=(rk.Stage(2, 0.5), rk.Stage(40, 0.5))))
    assert not hooks(model)


@pytest.mark.parametrize("name", ["input_layernorm", "self_attn.k_proj"])
def test_missing_attribute_is_named_with_the_version(model, name):
    other = copy.deepcopy(model)
    owner, _, leaf = name.rpartition(".")
    delattr(other.model.language_model.layers[3].get_submodule(owner), leaf)
    with pytest.raises(AttributeError, match=rf"transformers \d.*DecoderLayer has no attribute '{name}'"):
        rk.apply(other, policy())


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("model", "cache"),
        ("model.language_model", "position_ids"),
        ("model.language_model.layers.7", "position_embeddings"),
    ],
)
def test_missing_argument_is_named_with_the_version(model, path, name):
    module = model.get_submodule(path)
    signature = inspect.signature(module.forward)
    missing = CACHE_NAMES if name == "cache" else (name,)
    parameters = [parameter for parameter in signature.parameters.values() if parameter.name not in missing]
    module.forward = functools.partial(module.forward)
    module.forward.__signature__ = signature.replace(parameters=parameters)
    try:
        with pytest.raises(
            AttributeError, match=rf"transformers \d.*{type(module).__name__}.forward has no .* '{name}'"
        ):
            rk.apply(model, policy())
    finally:
        del module.forward


def test_model_without_its_head(model):
    with pytest.raises(AttributeError, match=rf"a whole one with its head, .* got {type(model.model).__name__}"):
        rk.apply(model.model, policy())


def tiny_config(family, **text):
    config = AutoConfig.from_pretrained(GOLDEN / family)
    for name, value in text.items():
        setattr(config.text_config, name, value)
    return config


def test_layers_without_full_attention(family):
    if family == "llava":
        text = {"model_type": "mistral", "sliding_window": 64}
        config = AutoConfig.from_pretrained(GOLDEN / family)
        values = {**config.text_config.to_dict(), **text}
        config.text_config = AutoConfig.for_model(**values)
        allowed = "none"
    else:
        config = tiny_config(family, layer_types=["sliding_attention", "full_attention"] * 6, sliding_window=64)
        allowed = "1, 3, 5, 7, 9, 11"
    other = AutoModelForImageTextToText.from_config(config)
    with pytest.raises(NotImplementedError, match=f"{allowed}; got layer 2 of 'sliding_attention'"):
        rk.apply(other, policy())


def test_layers_that_attend_in_another_way():
    config = tiny_config("qwen2_5_vl")
    other = AutoModelForImageTextToText.from_config(config)
    other.model.language_model.config.layer_types = ["full_attention"] * 6 + ["chunked_attention"] * 6
    with pytest.raises(NotImplementedError, match=r"full_attention, .* got 'chunked_attention' at layer 6"):
        rk.apply(other, policy(schedule=(rk.Stage(2, 0.5),)))


def test_text_model_of_another_family():
    config = AutoConfig.from_pretrained(GOLDEN / "llava")
    values = {**config.text_config.to_dict(), "model_type": "gemma"}
    config.text_config = AutoConfig.for_model(**values)
    other = AutoModelForImageTextToText.from_config(config)
    with pytest.raises(NotImplementedError, match=r"text model of type llama, mistral, qwen2, qwen3, .*, got 'gemma'"):
        rk.apply(other, policy())


def test_attention_implementation(model, inputs):
    with rk.apply(model, policy()):
        model.model.language_model.config._attn_implementation = "paged|sdpa"
        try:
            with pytest.raises(NotImplementedError, match=r"masks of the form eager, .*, sdpa, got 'paged\|sdpa'"):
                model(**inputs)
        finally:
            model.set_attn_implementation("sdpa")


@pytest.mark.parametrize("name", ["output_hidden_states", "output_attentions"])
@torch.no_grad()
def test_captured_outputs(model, inputs, name):
    with rk.apply(model, policy()), pytest.raises(NotImplementedError, match=f"{name} must be off"):
        model(**inputs, **{name: True})


@torch.no_grad()
def test_four_dimensional_mask(model, inputs):
    length = inputs["input_ids"].shape[1]
    causal = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
    if "image_grid_thw" in inputs:
        inputs["position_ids"] = torch.arange(length).expand(3, 1, -1)
    with rk.apply(model, policy()):
        expected = model(**inputs).logits
        torch.testing.assert_close(model(**{**inputs, "attention_mask": causal}).logits, expected)
        for other in (torch.ones_like(causal), causal.roll(1, dims=3)):
            with pytest.raises(NotImplementedError, match=r"must be causal with padding .* got one that differs"):
                model(**{**inputs, "attention_mask": other})
        of_each_head = causal.repeat(1, 4, 1, 1)
        with pytest.raises(NotImplementedError, match="attention_mask must be None or of shape"):
            model(**{**inputs, "attention_mask": of_each_head})
        cache = model(**inputs, use_cache=True).past_key_values
        later = torch.ones(1, 1, 3, length + 3, dtype=torch.bool).tril(length)
        later[:, :, 1, length] = False  # the second new token does not see the first
        with pytest.raises(NotImplementedError, match=r"must be causal with padding .* differs from that in 1 places"):
            model(input_ids=torch.tensor([[5, 6, 7]]), attention_mask=later, past_key_values=cache)
        with pytest.raises(NotImplementedError, match="attention_mask must be None or of shape"):
            model(**{**inputs, "attention_mask": causal[:, :, 1:]})


@torch.no_grad()
def test_other_caches(model, inputs):
    class OwnCache(DynamicCache):
        pass

    with (
        rk.apply(model, policy()),
        pytest.raises(NotImplementedError, match=r"must be a DynamicCache or StaticCache, got OwnCache"),
    ):
        model(**inputs, past_key_values=OwnCache(config=model.config.get_text_config()))


@pytest.mark.parametrize(
    ("first", "side", "message"),
    [(0, "left", "must be empty .* the first decision is at layer 0"), (2, "right", "got one padded on the right")],
    ids=["counted-layer-routed", "padded-right"],
)
@torch.no_grad()
def test_new_image_on_a_filled_cache(model, prompt, first, side, message):
    inputs = batch([prompt(1, 5, 12, seed=1), prompt(1, 5, 9, seed=1)], side)
    again = {name: value for name, value in inputs.items() if name != "attention_mask"}
    with rk.apply(model, policy(schedule=(rk.Stage(first, 0.5),))):
        cache = model(**inputs, use_cache=True).past_key_values
        mask = torch.cat([inputs["attention_mask"]] * 2, dim=1)
        with pytest.raises(NotImplementedError, match=message):
            model(**again, attention_mask=mask, past_key_values=cache)


@torch.no_grad()
def test_embeddings_that_hide_where_the_image_is(model, inputs):
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    with rk.apply(model, policy()), pytest.raises(ValueError, match="input_ids must be given"):
        model(inputs_embeds=embeds)


@torch.no_grad()
def test_language_model_on_its_own(model, inputs):
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    with rk.apply(model, policy()), pytest.raises(RuntimeError, match="was called on its own"):
        model.model.language_model(inputs_embeds=embeds)


@torch.no_grad()
def test_cache_of_another_policy(model, inputs):
    step = {"input_ids": torch.tensor([[7]])}
    with rk.apply(model, policy()):
        cache = model(**inputs, use_cache=True).past_key_values
    with rk.apply(model, policy("remove")), pytest.raises(ValueError, match="filled under this policy"):
        model(**step, past_key_values=cache)


@torch.no_grad()
def test_cache_of_an_unfinished_prefill(model, inputs):
    from transformers import DynamicCache

    def fail(*_):
        raise ZeroDivisionError

    cache = DynamicCache(config=model.config.get_text_config())
    with rk.apply(model, policy()):
        handle = model.model.language_model.layers[9].mlp.register_forward_pre_hook(fail)
        with pytest.raises(ZeroDivisionError):
            model(**inputs, past_key_values=cache)
        handle.remove()
        with pytest.raises(ValueError, match="must come from a finished call"):
            model(input_ids=torch.tensor([[7]]), past_key_values=cache)


@pytest.mark.parametrize(
    ("cropped", "mask", "message"),
    [
        (2, None, "whole routed prompt, got 2 of its tokens cropped"),
        (0, torch.ones(1, 5), "attention_mask must be None or of shape"),
    ],
    ids=["cropped", "mask"],
)
@torch.no_grad()
def test_what_does_not_fit_the_cache(model, inputs, cropped, mask, message):
    with rk.apply(model, policy()):
        cache = model(**inputs, use_cache=True).past_key_values
        if cropped:
            cache.crop(-cropped)
        with pytest.raises(ValueError, match=message):
            model(input_ids=torch.tensor([[7]]), past_key_values=cache, attention_mask=mask)


@torch.no_grad()
def test_batch_that_does_not_fit_the_cache(model, prompt):
    inputs = batch([prompt(1, 5, 12, seed=1), prompt(1, 5, 12, seed=2)])
    with rk.apply(model, policy()):
        cache = model(**inputs, use_cache=True).past_key_values
        with pytest.raises(
            ValueError, match="input_ids must hold 2 samples or a multiple of it, as the cached prompt, got 3"
        ):
            model(input_ids=torch.tensor([[7]] * 3), past_key_values=cache)


@torch.no_grad()
def test_refusals_leave_the_model_usable(model, inputs):
    with rk.apply(model, policy()):
        expected = model(**inputs).logits
        with pytest.raises(NotImplementedError):
            model(**inputs, output_attentions=True)
        assert torch.equal(model(**inputs).logits, expected)


@pytest.mark.parametrize("gap", [3, 20], ids=["text", "image"])
@torch.no_grad()
def test_tokens_that_are_hidden_between_others_where_states_are_recurrent(gap):
    """The recurrent layers of the unrouted model count such a token, those of a stage would not."""
    case = load("qwen3_5")
    inputs = case.batch([case.prompt(1, 6, 15, seed=1), case.prompt(1, 3, 9, seed=2)])
    hidden = inputs["attention_mask"].clone()
    hidden[0, gap] = 0
    this = rk.Policy([rk.Stage(3, 0.5)])
    with rk.apply(case.model, this) as routing:
        refused = pytest.raises(NotImplementedError, match=r"must hide no tokens between others .* got 1 that")
        with refused, no_layer_runs(case.model):
            case.model(**{**inputs, "attention_mask": hidden})
        case.model(**inputs)  # padding on the left hides nothing between others
        assert routing.trace is not None


@torch.no_grad()
def test_packed_sequences(model, inputs):
    length = inputs["input_ids"].shape[1]
    positions = torch.cat([torch.arange(9), torch.arange(length - 9)])[None]
    if "image_grid_thw" in inputs:
        positions = positions.expand(4, 1, -1)
    packed = {name: value for name, value in inputs.items() if name != "attention_mask"}
    with rk.apply(model, policy()):
        with pytest.raises(NotImplementedError, match=r"position_ids of a routed prompt must count by one"):
            model(**packed, position_ids=positions, use_cache=False)
        model(**packed, position_ids=positions, use_cache=True)


@torch.no_grad()
def test_cache_on_which_a_call_failed(model, inputs):
    def fail(*_):
        raise ZeroDivisionError

    step = {"input_ids": torch.tensor([[7]])}
    with rk.apply(model, policy()):
        cache = model(**inputs, use_cache=True).past_key_values
        handle = model.model.language_model.layers[9].mlp.register_forward_pre_hook(fail)
        with pytest.raises(ZeroDivisionError):
            model(**step, past_key_values=cache)
        handle.remove()
        with pytest.raises(ValueError, match="must hold the same tokens in all layers"):
            model(**step, past_key_values=cache)


def test_double_precision(model):
    with pytest.raises(NotImplementedError, match=r"model must be of dtype .* got torch\.float64"):
        rk.apply(copy.deepcopy(model).double(), policy())


@torch.no_grad()
def test_layers_that_the_configuration_leaves_out():
    """Some decoders run only as many layers as the configuration names."""
    case = load("llava")
    decoder = case.model.model.language_model
    layers = len(decoder.layers)
    with (
        rk.apply(case.model, rk.Policy([rk.Stage(1, 0.5)])),
        mock.patch.object(decoder.config, "num_hidden_layers", layers - 1),
        pytest.raises(RuntimeError, match=f"must run through all {layers} decoder layers"),
    ):
        case.model(**case.batch([case.prompt(1, 6, 15, seed=1)]))


@torch.no_grad()
def test_embeddings_on_a_filled_cache(model, inputs):
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    with rk.apply(model, policy()):
        cache = model(input_ids=torch.tensor([[5, 6, 7]]), use_cache=True).past_key_values
        with pytest.raises(ValueError, match="input_ids must be given to a routed model"):
            model(inputs_embeds=embeds, past_key_values=cache)


@torch.no_grad()
def test_merged_embeddings_on_a_routed_cache(model, inputs):
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    with rk.apply(model, policy()):
        cache = model(**inputs, use_cache=True).past_key_values
        with pytest.raises(ValueError, match=r"input_ids must be given to a routed model, .* on a cache"):
            model(inputs_embeds=embeds, past_key_values=cache)


@torch.no_grad()
def test_samples_that_keep_different_numbers_where_states_are_recurrent():
    case = load("qwen3_5")
    first = case.batch([case.prompt(0, 4, 30, seed=3)] * 2)
    one, two = case.prompt(1, 3, 8 + 45, seed=1), case.prompt(2, 3, 8, seed=2)
    later = case.batch([two, Prompt(one.ids[: len(two)], one.features)])
    later["attention_mask"] = torch.cat([first["attention_mask"], later["attention_mask"]], dim=1)
    message = r"must keep equally many tokens of each sample, got \d+, \d+ at layer 3"
    with rk.apply(case.model, policy(schedule=(rk.Stage(3, 0.3),))):
        case.model(**later | {"attention_mask": None})
        cache = case.model(**first, use_cache=True).past_key_values
        with pytest.raises(NotImplementedError, match=message):
            case.model(**later, past_key_values=cache)


@pytest.mark.parametrize("mode", ["guesses", "static"])
def test_ways_that_count_by_a_layer_that_is_routed(model, inputs, mode, monkeypatch):
    settings = {"guesses": {"prompt_lookup_num_tokens": 3}, "static": {"cache_implementation": "static"}}[mode]
    # As where transformers crops the cache to a length.
    read = calls.prompt_call
    monkeypatch.setattr(calls, "prompt_call", lambda core: replace(read(core), crops_by_count=False))
    message = {"guesses": "schedule must begin after .* assisted", "static": "must be a DynamicCache, got StaticCache"}
    with (
        rk.apply(model, policy(schedule=(rk.Stage(0, 0.5),))),
        pytest.raises(NotImplementedError, match=message[mode]),
    ):
        model.generate(**inputs, max_new_tokens=4, **settings)


@torch.no_grad()
def test_right_padding_beside_a_sample_that_sits_out(model, prompt):
    inputs = batch([prompt(1, 5, 12, seed=1), prompt(1, 5, 9, seed=1)], "right")
    inputs["attention_mask"][1] = 0
    inputs["attention_mask"][0, -1] = 0
    with (
        rk.apply(model, policy()),
        pytest.raises(NotImplementedError, match="on the left where a sample sits a prompt out"),
    ):
        model(**inputs)


@torch.no_grad()
def test_several_tokens_without_a_mask_after_a_decision_at_layer_0(model, inputs):
    with rk.apply(model, policy(schedule=(rk.Stage(0, 0.5),))):
        cache = model(**inputs, use_cache=True).past_key_values
        with pytest.raises(NotImplementedError, match="attention_mask of the whole conversation must be given"):
            model(input_ids=torch.tensor([[7, 8]]), past_key_values=cache)


@torch.no_grad()
def test_padding_on_the_right_that_sees_itself(model, prompt):
    """Its last token looks like one that stands alone behind padding, and would rank."""
    inputs = batch([prompt(1, 5, 12, seed=1), prompt(1, 5, 9, seed=1)], "right")
    valid, length = inputs["attention_mask"].bool(), inputs["input_ids"].shape[1]
    if "image_grid_thw" in inputs:
        inputs["position_ids"] = torch.arange(length).expand(3, 2, -1)
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    seen = (causal & valid[:, None])[:, None]
    itself = seen | torch.eye(length, dtype=torch.bool)
    shown = torch.cat([valid, torch.tensor([[True, True, True], [True, False, False]])], dim=1)
    later = torch.ones(3, length + 3, dtype=torch.bool).tril(length) & shown[:, None]
    later = (later | torch.eye(length + 3, dtype=torch.bool)[length:])[:, None]
    message = r"must be causal with padding .* differs from that in 1 places"
    with rk.apply(model, policy()) as routing:
        for mask in (itself, torch.zeros(itself.shape).masked_fill(~itself, torch.finfo(torch.float32).min)):
            with pytest.raises(NotImplementedError, match=message):
                model(**{**inputs, "attention_mask": mask})
        cache = model(**{**inputs, "attention_mask": seen}, use_cache=True).past_key_values
        assert [len(rows) for rows in routing.trace.stages[0].selected] == [
            int(count * routing.trace.stages[0].keep) for count in routing.trace.visual_counts
        ]
        with pytest.raises(NotImplementedError, match=message):
            model(input_ids=torch.tensor([[5, 6, 7]] * 2), attention_mask=later, past_key_values=cache)


@torch.no_grad()
def test_one_mask_for_layers_with_and_without_windows():
    """In all layers the model takes it as it is; those of a stage have windows."""
    case = load("aya_vision")
    inputs = case.batch([case.prompt(1, 6, 15, seed=1)])
    length = inputs["input_ids"].shape[1]
    window = case.model.config.text_config.sliding_window
    causal = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
    rows = torch.arange(length)
    masks = {"full_attention": causal, "sliding_attention": causal & (rows[:, None] - rows < window)}
    message = (
        r"attention_mask must have two dimensions, or be a dict of masks .*, got \(1, 1, \d+, \d+\) for \d+ tokens"
    )
    with rk.apply(case.model, policy(schedule=(rk.Stage(3, 0.4),))):
        expected = case.model(**inputs)
        for mask in (causal, torch.zeros(causal.shape).masked_fill(~causal, torch.finfo(torch.float32).min)):
            with pytest.raises(NotImplementedError, match=message):
                case.model(**{**inputs, "attention_mask": mask})
        torch.testing.assert_close(case.model(**{**inputs, "attention_mask": masks}).logits, expected.logits)
        cache = case.model(**inputs, use_cache=True).past_key_values
        later = torch.ones(1, 1, 2, length + 2, dtype=torch.bool).tril(length)
        with pytest.raises(NotImplementedError, match=message):
            case.model(input_ids=torch.tensor([[5, 6]]), attention_mask=later, past_key_values=cache)


@torch.no_grad()
def test_mask_of_four_dimensions_where_states_are_recurrent():
    """The layers with states are told nothing of its padding."""
    case = load("qwen3_5")
    inputs = case.batch([case.prompt(1, 6, 15, seed=1), case.prompt(1, 6, 9, seed=2)])
    length = inputs["input_ids"].shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril() & inputs["attention_mask"].bool()[:, None]
    inputs["position_ids"] = torch.arange(length).expand(3, 2, -1)
    with rk.apply(case.model, policy(schedule=(rk.Stage(3, 0.4),))):
        message = rf"attention_mask must be of shape \(2, {length}\) for a padded prompt .*, got \(2, 1, {length}, "
        with pytest.raises(NotImplementedError, match=message):
            case.model(**{**inputs, "attention_mask": causal[:, None]})
        one = case.batch([case.prompt(1, 6, 15, seed=1)]) | {"position_ids": inputs["position_ids"][:, :1]}
        expected = case.model(**one).logits
        torch.testing.assert_close(case.model(**{**one, "attention_mask": causal[:1, None]}).logits, expected)


@torch.no_grad()
def test_text_of_one_token_beside_a_prompt(model, prompt):
    """Padding on the left that sees itself is told from that on the right."""
    inputs = batch([prompt(1, 5, 12, seed=1), prompt(0, 0, 1, seed=2)])
    valid, length = inputs["attention_mask"].bool(), inputs["input_ids"].shape[1]
    if "image_grid_thw" in inputs:
        inputs["position_ids"] = torch.arange(length).expand(3, 2, -1)
    mask = torch.ones(length, length, dtype=torch.bool).tril() & valid[:, None]
    mask = (mask | torch.eye(length, dtype=torch.bool))[:, None]
    with rk.apply(model, policy()):
        expected = model(**inputs).logits[:, -1]
        torch.testing.assert_close(model(**{**inputs, "attention_mask": mask}).logits[:, -1], expected)
