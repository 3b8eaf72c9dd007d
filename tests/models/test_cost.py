"""`rk.cost` counts the work of models: 7B shapes on the meta device, narrow ones for real, and every family."""

import copy
from functools import cache

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

import reroute_kernels as rk
from reroute_kernels.cost import DECODERS
from reroute_kernels.models.calls import PromptFacts
from reroute_kernels.rankings import AllText, KeyNorm, LastQuery, TextRaters
from reroute_kernels.reducers import Nuwa
from tests.models.families import CLIP, IDS, MODELS, VISION, load
from tests.models.prompts import IMAGE, batch, llava_prompt
from tests.models.test_rankings import RANKINGS

BEFORE, VISUAL, AFTER = 16, 576, 48
TEXT = BEFORE + AFTER
DTYPES = {"llava-1.5-7b": torch.float16, "qwen2.5-vl-7b": torch.bfloat16}
REFUSED = {"aya_vision": "sliding_attention", "qwen3_5": "linear_attention", "qwen3_5_moe": "linear_attention"}
FAMILIES = [name for name in MODELS if name not in REFUSED]

# Presets named -stagewise are the same policies as others, and so are counted once.
POLICIES = {(name.model, rk.preset(*name)): name for name in reversed(rk.presets())}
NAMES = list(reversed(POLICIES.values()))


@pytest.fixture(autouse=True)
def _no_features(monkeypatch):
    """Placeholders alone: features are merged by reading masks, and nothing can be read on the meta device."""
    monkeypatch.setattr(PromptFacts, "lacks_features", False)


def make_model(name, device, attention, **shape):
    """The model of a preset, with the shape of its decoder if no other is given."""
    decoder = DECODERS[name]
    text = {
        "hidden_size": decoder.hidden_size,
        "intermediate_size": decoder.mlp_weights[0] // decoder.hidden_size // 3,
        "num_hidden_layers": decoder.layers,
        "num_attention_heads": decoder.heads,
        "num_key_value_heads": decoder.kv_heads,
        "vocab_size": decoder.vocab_size,
        "max_position_embeddings": 1024,
    } | shape
    if name == "llava-1.5-7b":
        config = transformers.LlavaConfig(
            vision_config=transformers.CLIPVisionConfig(**CLIP),
            text_config=transformers.LlamaConfig(**text),
            image_token_index=IMAGE,
        )
        kind = transformers.LlavaForConditionalGeneration
    else:
        pairs = text["hidden_size"] // text["num_attention_heads"] // 2
        sections = [pairs - 2 * (3 * pairs // 8), 3 * pairs // 8, 3 * pairs // 8]
        config = transformers.Qwen2_5_VLConfig(
            vision_config=VISION,
            text_config={**text, "rope_parameters": {"rope_type": "default", "mrope_section": sections}},
            **IDS,
        )
        kind = transformers.Qwen2_5_VLForConditionalGeneration
    config._attn_implementation = attention
    with torch.device(device):
        model = kind._from_config(config, dtype=DTYPES[name]).eval()
    # Ids stay on the CPU, because routing reads from them which tokens are visual.
    model.get_input_embeddings().register_forward_pre_hook(lambda embedding, args: (args[0].to(device),))
    return model


@cache
def model_of_7b_shape(name):
    """On the meta device, with eager attention, whose products are counted."""
    return make_model(name, "meta", "eager")


@cache
def narrow_model(name):
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4 if name == "llava-1.5-7b" else 2}
    return make_model(
        name, "cpu", "sdpa", hidden_size=32, intermediate_size=16, vocab_size=512, max_position_embeddings=1024, **heads
    )


def prompt(model, batch=1, visual=VISUAL):
    device = model.get_input_embeddings().weight.device
    ids = torch.cat([torch.full((count,), token) for count, token in ((BEFORE, 3), (visual, IMAGE), (AFTER, 3))])
    positions = torch.arange(len(ids), device=device).expand(batch, -1)
    return {"input_ids": ids.expand(batch, -1), "position_ids": with_axes(model, positions)}


def with_axes(model, positions):
    return positions.expand(3, -1, -1) if model.config.model_type.startswith(("qwen", "glm4v")) else positions


@torch.no_grad()
def count(model, **inputs):
    """FLOPs of the decoder and of everything, and the cache after the call."""
    with FlopCounterMode(display=False) as counter:
        output = model(**inputs, use_cache=True, logits_to_keep=1)
    modules = counter.get_flop_counts()
    names = [f"{type(model).__name__}.model.{name}" for name in ("language_model", "text_model")]
    name = next(name for name in names if name in modules)
    # Before transformers 5.23 positions are multiplied by frequencies as matrices.
    tables = sum(modules.get(f"{name}.rotary_emb", {}).values())
    return sum(modules[name].values()) - tables, counter.get_total_flops() - tables, output.past_key_values


def cached_bytes(cache):
    return sum(
        tensor.nelement() * tensor.element_size() for layer in cache.layers for tensor in (layer.keys, layer.values)
    )


def check(model, policy, counted, batch=1, visual=VISUAL, steps=1):
    """FLOPs of the prompt and of decode steps, and bytes of the cache, to the last one."""
    decoder, everything, past = counted
    expected = rk.cost(model, policy, TEXT, visual, batch, model.dtype)
    assert decoder == expected.prefill_flops
    assert everything == expected.prefill_flops + expected.lm_head_flops
    assert cached_bytes(past) == expected.kv_bytes
    device = past.layers[0].keys.device
    for step in range(steps):
        length = TEXT + visual + step
        positions = with_axes(model, torch.full((batch, 1), length, device=device))
        decoder, everything, past = count(
            model, input_ids=torch.full((batch, 1), 3), position_ids=positions, past_key_values=past
        )
        assert decoder == expected.decode_flops(length)
        assert everything - decoder == expected.lm_head_flops


def check_routed(model, policy, batch=1, visual=VISUAL, steps=1):
    with rk.apply(model, policy):
        check(model, policy, count(model, **prompt(model, batch, visual)), batch, visual, steps)


def test_policies_of_all_presets():
    assert {(name.model, rk.preset(*name)) for name in rk.presets()} == set(POLICIES)
    assert len(POLICIES) == 24


@pytest.mark.parametrize("name", NAMES, ids=lambda name: "-".join(map(str, name)))
def test_presets_at_7b_shape(name):
    check_routed(model_of_7b_shape(name.model), rk.preset(*name))


@pytest.mark.parametrize("name", DECODERS)
def test_unrouted_at_7b_shape(name):
    model = model_of_7b_shape(name)
    check(model, None, count(model, **prompt(model)))
    assert rk.cost(model, None, 1, 2).decoder == DECODERS[name]


@pytest.mark.parametrize("method", ["pdrop", "reroute-pdrop"])
@pytest.mark.parametrize("name", DECODERS)
def test_batches(name, method):
    check_routed(model_of_7b_shape(name), rk.preset(name, method, 128), batch=3)


@pytest.mark.parametrize("name", NAMES, ids=lambda name: "-".join(map(str, name)))
@torch.no_grad()
def test_bytes_that_presets_cache(name):
    model, policy = narrow_model(name.model), rk.preset(*name)
    with rk.apply(model, policy):
        past = model(**prompt(model), use_cache=True, logits_to_keep=1).past_key_values
    expected = rk.cost(model, policy, TEXT, VISUAL, dtype=model.dtype)
    assert cached_bytes(past) == expected.kv_bytes
    text = rk.cost(model, None, TEXT, 0, dtype=model.dtype).kv_bytes
    assert expected.visual_kv_bytes == expected.kv_bytes - text


@pytest.mark.parametrize("action", ["reroute", "remove", "freeze"])
@pytest.mark.parametrize("name", FAMILIES)
def test_families(name, action):
    model = copy.deepcopy(load(name).model)
    model.set_attn_implementation("eager")
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    check(model, None, count(model, **prompt(model, visual=40)), visual=40)
    check_routed(model, rk.Policy([rk.Stage(1, 0.5), rk.Stage(4, 0.2)], action), visual=40, steps=2)


@pytest.mark.parametrize(("name", "kind"), REFUSED.items())
def test_other_attention_is_refused(name, kind):
    with pytest.raises(
        NotImplementedError, match=f"layers all have 'full_attention', got '.*' with '{kind}' at layer 0"
    ):
        rk.cost(load(name).model, None, 1, 1)


@pytest.mark.parametrize("action", ["reroute", "remove"])
@pytest.mark.parametrize("ranking", [each for each in RANKINGS if not isinstance(each, TextRaters)], ids=repr)
def test_rankings(ranking, action):
    model = copy.deepcopy(load("llava").model)
    model.set_attn_implementation("eager")
    check_routed(model, rk.Policy([rk.Stage(1, 0.5), rk.Stage(2, 0.4), rk.Stage(6, 0.2)], action, ranking), visual=40)


@pytest.mark.parametrize("action", ["reroute", "remove"])
@pytest.mark.parametrize("layer", ["previous", "this"])
def test_raters_are_counted_as_all_text(layer, action):
    """They are no more than it, and are searched for once, not at each decision."""
    model, visual = copy.deepcopy(load("llava").model), 40
    model.set_attn_implementation("eager")
    stages = [rk.Stage(1, 0.5), rk.Stage(2, 0.4), rk.Stage(6, 0.2)]
    raters, all_text = (rk.Policy(stages, action, ranking) for ranking in (TextRaters(layer), AllText(layer)))
    with rk.apply(model, raters):
        counted, _, _ = count(model, **prompt(model, 1, visual))
    expected, without = (rk.cost(model, each, TEXT, visual).prefill_flops for each in (raters, all_text))
    search = 2 * model.config.text_config.hidden_size * TEXT * (TEXT + visual)
    assert without < counted <= without + search
    assert counted <= expected <= without + 3 * search


@pytest.mark.parametrize("action", ["reroute", "remove"])
def test_rankings_of_stages(action):
    model = copy.deepcopy(load("llava").model)
    model.set_attn_implementation("eager")
    stages = [rk.Stage(1, 0.5), rk.Stage(2, 0.4, KeyNorm("previous")), rk.Stage(6, 0.2, AllText())]
    check_routed(model, rk.Policy(stages, action, LastQuery(queries=2)), visual=40)


@pytest.mark.parametrize("action", ["reroute", "remove", "freeze"])
@pytest.mark.parametrize("schedule", [(), (rk.Stage(3, 0.2), rk.Stage(7, 0.1))])
@torch.no_grad()
def test_reducers(schedule, action):
    model = copy.deepcopy(load("llava").model)
    model.set_attn_implementation("eager")
    policy = rk.Policy(schedule, action, LastQuery("previous"), reducer=Nuwa(keep=0.3, per_cell=2))
    inputs = batch([llava_prompt(1, BEFORE, AFTER - 3, seed=1)])  # three follow on the image
    visual = int((inputs["input_ids"] == IMAGE).sum())
    with rk.apply(model, policy):
        decoder, _, past = count(model, **inputs)
    expected = rk.cost(model, policy, TEXT, visual, dtype=model.dtype)
    assert (decoder, cached_bytes(past)) == (expected.prefill_flops, expected.kv_bytes)
