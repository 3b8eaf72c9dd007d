"""Every type of transformers' image-text-to-text models: routed, or refused for a reason that is true."""

import copy
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as ALL_TYPES

import reroute_kernels as rk
from reroute_kernels.cost import deciding_layers, layer_types
from reroute_kernels.models import ADAPTERS, refused
from reroute_kernels.models.refused import REFUSED
from reroute_kernels.presets import model_of
from tests.models.families import ALIKE, MODELS, OTHERS, load
from tests.models.handed_features import HANDED
from tests.models.prompts import selections
from tests.models.slow_way import SlowWay
from tests.models.test_ways import GREEDY, policies, turns

FEW = {**GREEDY, "max_new_tokens": 3}


SOURCES = Path(transformers.__file__).parent / "models"
FOLDERS = {
    "instructblipvideo": "instructblip",
    "inkling2_loop": "inkling2",
    "inkling_mm_model": "inkling",
    "kosmos-2": "kosmos2",
    "kosmos-2.5": "kosmos2_5",
    "qwen2_5_omni_thinker": "qwen2_5_omni",
    "qwen3_omni_moe_thinker": "qwen3_omni_moe",
    "fuyu": "persimmon",
    "florence2": "bart",
    "shieldgemma2": "gemma3",
}
"""Where the source of a type is, if not in a folder of its name."""

EVIDENCE = {
    refused.BIDIRECTIONAL: r"block_sequence_ids|token_type_ids_mask_function",
    refused.CROSS_ATTENTION: r"CrossAttention|cross_attn",
    refused.ENCODER_DECODER: r"encoder_hidden_states|EncoderDecoder",
    refused.QUERY_TRANSFORMER: r"QFormer",
    refused.ACTIONS: r"denois|flow",
    refused.DIFFUSION: r"BlockDiffusion",
    refused.BEFORE_TEXT: r"torch.cat\(\(projected_visual_features, embedding_output\), dim=1\)",
    refused.MARKED_BY_MASK: r"image_embeds_position_mask",
    refused.FUSED_PROJECTION: r"self.query_key_value = ",
    refused.NO_DECODER: r"class ChameleonModel\(.*?self.layers = nn.ModuleList",
    refused.HEAD_INSIDE: r"chunked_attention.*self.language_model = Llama4ForCausalLM|create_chunked_causal_mask",
    refused.MAMBA: r"self.language_model = AutoModelForCausalLM",
    refused.PER_LAYER_INPUTS: r"per_layer_input",
    refused.SHORT_CONVOLUTIONS: r"ShortConv",
    refused.SCALED_BY_POSITION: r"\* get_llama_4_attn_scale\(",
    refused.INDEXER: r"self.indexer = ",
    refused.HEADS_DIFFER: r"num_attention_heads_per_layer",
    refused.REFERENCE_WINDOW: r"reference_sliding_attention",
    refused.NUMBERED_OVER_BATCH: r"image_index = 0.*for batch_idx.*image_index \+= 1",
    refused.TOWER: r"class PixtralVisionModel",
}
"""Patterns of source code that show a reason to be true."""


def test_every_type_is_routed_or_refused():
    unknown = sorted(set(ALL_TYPES) - set(ADAPTERS) - set(REFUSED))
    assert not unknown, (
        f"transformers {transformers.__version__} has types that are not known here: {', '.join(unknown)}. Read how "
        "each masks image tokens, numbers them and adds features to them. Then enter it in ADAPTERS of "
        "models/__init__.py, with a tiny model in tests/models/handed_features.py, or in REFUSED of "
        "models/refused.py, with the reason. `python -m bench.pages` writes docs/models.md."
    )
    assert not set(ADAPTERS) & set(REFUSED)
    assert set(EVIDENCE) == set(REFUSED.values())


def test_every_routed_type_has_a_tiny_model():
    assert set(ADAPTERS) <= {name.split("-")[0] for name in (*MODELS, *ALIKE, *HANDED)}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_type_is_told_its_reason(name):
    model = torch.nn.Module()
    model.config = SimpleNamespace(model_type=name)
    with pytest.raises(NotImplementedError, match="model must be one whose decoder reads image tokens") as caught:
        rk.apply(model, "3:0.25")
    assert str(caught.value).endswith(f"got {name!r}, {REFUSED[name]}")


@pytest.mark.parametrize("name", [name for name in REFUSED if name in ALL_TYPES])
def test_reason_is_true(name):
    folder = SOURCES / FOLDERS.get(name, re.sub(r"\W", "_", name))
    source = "\n".join(path.read_text() for path in sorted(folder.glob("modeling_*.py")))
    assert re.search(EVIDENCE[REFUSED[name]], source, re.DOTALL)


def test_unknown_type_is_told_what_is_supported():
    model = torch.nn.Module()
    model.config = SimpleNamespace(model_type="my_vlm")
    with pytest.raises(ValueError, match=r"model must be of a supported type \(.*llava.*\), got 'my_vlm'"):
        rk.apply(model, "3:0.25")


@pytest.mark.parametrize("name", OTHERS)
@torch.no_grad()
def test_routed_type_equals_the_slow_way(name):
    """A batch of a prompt with an image and a longer one with two, through a prefill and a few greedy tokens."""
    case = load(name)
    prompts = [case.prompt(1, 6, 15, seed=1), case.prompt(2, 4, 9, seed=2)]
    inputs = case.batch(prompts)
    length = inputs["input_ids"].shape[1]
    plain = case.model(**inputs).logits[:, -1]
    this = policies(case)[0]
    with rk.apply(case.model, this) as routing:
        output = case.model.generate(**inputs, **FEW)
        trace = routing.trace
    for row, prompt in enumerate(prompts):
        with SlowWay(case.model, this) as slow:
            expected = case.model.generate(**case.batch([prompt]), **FEW)
        assert selections(trace, row, length - len(prompt)) == slow.selected
        assert output.sequences[row, length:].tolist() == expected.sequences[0, len(prompt) :].tolist()
        actual = torch.stack(output.logits)[:, row]
        torch.testing.assert_close(actual, torch.stack(expected.logits)[:, 0], atol=1e-4, rtol=0)
        assert (actual[0] - plain[row]).abs().max() > 1e-3  # something was deferred


@pytest.mark.skipif("kimi_k25" not in OTHERS, reason="this transformers does not have the type")
@pytest.mark.parametrize("text", [{"q_lora_rank": None}, {"rope_interleave": False}], ids=str)
@torch.no_grad()
def test_other_shapes_of_latent_attention(text):
    """Queries that are projected once; rotated channels in halves. A new image ranks keys of the turn before, too."""
    case = load("kimi_k25")
    case = replace(case, model=replace(case.handed, text=case.handed.text | text).build().eval())
    this = policies(case)[0]
    prompts = [case.prompt(1, 3, 8, seed=7)], [case.prompt(1, 6, 15, seed=1)]
    with SlowWay(case.model, this) as slow:
        expected = turns(case, *prompts)
    with rk.apply(case.model, this) as routing:
        logits = turns(case, *prompts)
        assert selections(routing.trace) == slow.selected
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


SIZES = {
    "gemma3-4b": {"num_hidden_layers": 34},
    "gemma3-12b": {"num_hidden_layers": 48},
    "gemma3-27b": {"num_hidden_layers": 62},
    "gemma4-e2b": {
        "num_hidden_layers": 35,
        "num_kv_shared_layers": 20,
        "layer_types": (["sliding_attention"] * 4 + ["full_attention"]) * 7,
    },
    "gemma4-e4b": {"num_hidden_layers": 42, "num_kv_shared_layers": 18},
    "gemma4-31b": {"num_hidden_layers": 60},
    "gemma4_unified-12b": {"num_hidden_layers": 48},
    "shieldgemma2-4b": {"num_hidden_layers": 34},
}
"""Published sizes beside that of the default configuration, of the types whose first decision is late."""

IMAGE_TOKENS = {"gemma3": 256, "gemma4": 280, "gemma4_unified": 280, "paligemma": 256, "shieldgemma2": 256}
"""Visual tokens of an image that configurations fix at other numbers than 576."""


@pytest.mark.parametrize("name", [name for name in (*ADAPTERS, *SIZES) if name.split("-")[0] in ALL_TYPES])
def test_presets_stay_within_the_budget(name):
    """Of types at their size; windows, if all layers have one by default, are left out, as checkpoints do.

    Published configurations are named after a budget that they exceed here and there, unless they are matched.
    """
    model_type = name.split("-")[0]
    text = {"text_config": SIZES[name]} if name in SIZES else {}
    config = transformers.AutoConfig.for_model(model_type, **text)
    text = config.get_text_config()
    if "full_attention" not in layer_types(text):
        text.sliding_window, text.layer_types = None, None
    able, count, tokens = deciding_layers(text), text.num_hidden_layers, IMAGE_TOKENS.get(model_type, 576)
    assert count == SIZES.get(name, {}).get("num_hidden_layers", count)
    for method in ("fastv", "pdrop", "reroute-fastv", "reroute-pdrop"):
        for avg_tokens in (64, 200):
            policy = rk.preset(config, method, avg_tokens, matched=model_of(config) is not None)
            assert {stage.layer for stage in policy.schedule} <= set(able)
            reached = rk.cost.average_visual_tokens(policy, count, tokens)
            assert avg_tokens - tokens / count / 4 < reached <= avg_tokens
    assert rk.Policy.parse("reroute-fastv/200", config) == rk.preset(config, "reroute-fastv", 200)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cohere_compass", "cuda_graph needs a decoder with one rotary embedding for all layers, got a CohereCompass"),
        ("ernie4_5_vl_moe", "cuda_graph needs a decoder that takes embeddings alone, got .* 'moe_mm_token_type_ids'"),
        ("granite4_vision", r"cuda_graph needs .*, got one that multiplies them by 1\.5"),
        ("hyperclovax_vision_v2", r"cuda_graph needs .*, got one that multiplies them by 2\.0"),
    ],
)
def test_graphs_refuse_decoders_that_do_more(name, message):
    """They would run the layers alone, silently without what the decoder does before them."""
    if name not in OTHERS:
        pytest.skip("this transformers does not have the type")
    model = copy.deepcopy(load(name).model)
    model.config.get_text_config().layer_types = ["full_attention"] * 6
    with pytest.raises(NotImplementedError, match=message):
        rk.apply(model, policies(load(name))[0], cuda_graph="require")
