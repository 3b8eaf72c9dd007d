"""Models beside the golden ones, with tiny random weights: routed as the slow way routes, and through `generate`."""

import pytest
import torch
import transformers

import reroute_kernels as rk
from tests.models.prompts import ACTIONS, IMAGE, VIDEO, VISION_END, VISION_START, policy, selections
from tests.models.test_slow_way import check

CLIP = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
}
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 1024,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
STAGES = (rk.Stage(1, 0.4), rk.Stage(3, 0.3), rk.Stage(4, 0.2))


def llava_next():
    config = transformers.LlavaNextConfig(
        vision_config={**CLIP, "model_type": "clip_vision_model"},
        text_config={**TEXT, "model_type": "mistral", "sliding_window": None},
        image_token_index=IMAGE,
        image_grid_pinpoints=[[56, 56], [56, 112]],
    )
    # Two images of different shapes: one tile, and two beside each other with the overview of both.
    pixels = {"pixel_values": torch.randn(2, 3, 3, 56, 56), "image_sizes": torch.tensor([[56, 112], [56, 100]])}
    return transformers.LlavaNextForConditionalGeneration(config), pixels, IMAGE, None


def llava_onevision(video=False):
    config = transformers.LlavaOnevisionConfig(
        vision_config={**CLIP, "model_type": "siglip_vision_model"},
        text_config={**TEXT, "model_type": "qwen2"},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        image_grid_pinpoints=[[56, 56], [56, 112]],
    )
    model = transformers.LlavaOnevisionForConditionalGeneration(config)
    if video:
        # Four tokens a frame, and one at the end, which some versions add after the features are asked for.
        return model, {"pixel_values_videos": torch.randn(1, 5, 3, 56, 56)}, VIDEO, 5 * 4 + 1
    return model, {"pixel_values": torch.randn(1, 3, 3, 56, 56), "image_sizes": torch.tensor([[56, 112]])}, IMAGE, None


def qwen2_vl(video=False):
    config = transformers.Qwen2VLConfig(
        vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2},
        text_config={**TEXT, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
    )
    name, grid = ("video", (3, 8, 12)) if video else ("image", (1, 8, 12))
    pixels = torch.randn(grid[0] * grid[1] * grid[2], 1176)
    features = {"pixel_values_videos" if video else "pixel_values": pixels, f"{name}_grid_thw": torch.tensor([grid])}
    return transformers.Qwen2VLForConditionalGeneration(config), features, VIDEO if video else IMAGE, None


def qwen3_vl(video=False, kind="Qwen3VL", **text):
    config = getattr(transformers, f"{kind}Config")(
        vision_config={
            "depth": 3,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_heads": 2,
            "out_hidden_size": 64,
            "deepstack_visual_indexes": [0, 1, 2],
        },
        text_config={
            **TEXT,
            "head_dim": 16,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0},
            **text,
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
    )
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(config)
    # Random features are small beside the states that they are added to: an addition left out must show.
    for merger in model.model.visual.deepstack_merger_list:
        merger.linear_fc2.weight.data *= 30
    grid = (1, 8, 12)  # a video stands in the prompt frame by frame, with text between them: this is one of them
    pixels = torch.randn(grid[0] * grid[1] * grid[2], 1536)
    if video:
        return model, {"pixel_values_videos": pixels, "video_grid_thw": torch.tensor([grid])}, VIDEO, None
    return model, {"pixel_values": pixels, "image_grid_thw": torch.tensor([grid])}, IMAGE, None


def glm4v(kind="Glm4v", **text):
    config = getattr(transformers, f"{kind}Config")(
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_heads": 2,
            "out_hidden_size": 64,
            "image_size": 112,
        },
        text_config={
            **TEXT,
            "head_dim": 16,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [1, 1, 2],
                "partial_rotary_factor": 0.5,
            },
            **text,
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        image_start_token_id=VISION_START,
        image_end_token_id=VISION_END,
    )
    features = {"pixel_values": torch.randn(96, 1176), "image_grid_thw": torch.tensor([[1, 8, 12]])}
    return getattr(transformers, f"{kind}ForConditionalGeneration")(config), features, IMAGE, None


def internvl(text="qwen2"):
    config = transformers.InternVLConfig(
        vision_config=CLIP | {"image_size": [112, 112], "patch_size": [14, 14]},
        text_config={**TEXT, "model_type": text, "head_dim": 16},
        image_token_id=IMAGE,
    )
    return (
        transformers.InternVLForConditionalGeneration(config),
        {"pixel_values": torch.randn(2, 3, 112, 112)},
        IMAGE,
        None,
    )


def mistral3():
    config = transformers.Mistral3Config(
        vision_config=CLIP | {"model_type": "pixtral", "image_size": 112},
        text_config={**TEXT, "model_type": "mistral", "sliding_window": None, "head_dim": 16},
        image_token_index=IMAGE,
    )
    pixels = {"pixel_values": torch.randn(2, 3, 112, 112), "image_sizes": torch.tensor([[112, 112], [112, 56]])}
    return transformers.Mistral3ForConditionalGeneration(config), pixels, IMAGE, None


def idefics3(kind="Idefics3"):
    config = getattr(transformers, f"{kind}Config")(
        vision_config=CLIP, text_config={**TEXT, "model_type": "llama"}, image_token_id=IMAGE, scale_factor=2
    )
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(config)
    return model, {"pixel_values": torch.randn(1, 7, 3, 56, 56)}, IMAGE, None  # an image as seven tiles


FAMILIES = {
    "glm4v": glm4v,
    "glm4v_moe": lambda: glm4v(
        "Glm4vMoe", n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, first_k_dense_replace=1
    ),
    "idefics3": idefics3,
    "internvl": internvl,
    "internvl-llama": lambda: internvl("llama"),
    "internvl-qwen3": lambda: internvl("qwen3"),
    "mistral3": mistral3,
    "qwen3_vl": qwen3_vl,
    "qwen3_vl-video": lambda: qwen3_vl(video=True),
    "qwen3_vl_moe": lambda: qwen3_vl(kind="Qwen3VLMoe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32),
    "smolvlm": lambda: idefics3("SmolVLM"),
    "llava_next": llava_next,
    "llava_onevision": llava_onevision,
    "llava_onevision-video": lambda: llava_onevision(video=True),
    "qwen2_vl": qwen2_vl,
    "qwen2_vl-video": lambda: qwen2_vl(video=True),
}


@pytest.fixture(params=FAMILIES, scope="module")
def case(request):
    return make_case(request.param)


def make_case(name):
    """A model, and a prompt whose placeholders are as many as its vision tower gives features."""
    torch.manual_seed(0)
    model, features, token, count = FAMILIES[name]()
    model.eval()
    if count is None:
        with torch.no_grad():
            ask = model.model.get_video_features if token == VIDEO else model.model.get_image_features
            count = sum(len(each.reshape(-1, 64)) for each in ask(*features.values()).pooler_output)
    visual = torch.full((count,), token)
    text = torch.randint(3, 400, (21,), generator=torch.Generator().manual_seed(1))
    parts = [text[:6], torch.tensor([VISION_START]), visual, torch.tensor([VISION_END]), text[6:]]
    ids = torch.cat(parts)[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **features}
    if name.startswith(("qwen", "glm")):
        inputs["mm_token_type_ids"] = (ids == IMAGE) * 1 + (ids == VIDEO) * 2
    assert len(visual) >= 20
    return model, inputs


@pytest.mark.parametrize("action", ACTIONS)
def test_equals_the_slow_way(case, action):
    check(*case, policy(action, STAGES))


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("layers", [(0, 2), (1, 2, 3), (2, 4), (3, 5)], ids=str)
def test_deepstack_reaches_deferred_tokens(layers, action):
    """Features are added after layers 0, 1 and 2, whether a token runs there or not."""
    model, inputs = make_case("qwen3_vl")
    stages = tuple(rk.Stage(layer, keep) for layer, keep in zip(layers, (0.4, 0.3, 0.2), strict=False))
    check(model, inputs, policy(action, stages))


@torch.no_grad()
def test_deepstack_matters():
    """What shows that the test above would see an addition left out."""
    model, inputs = make_case("qwen3_vl")
    this = policy("reroute", (rk.Stage(1, 0.4), rk.Stage(3, 0.3)))
    with rk.apply(model, this) as routing:
        expected = model(**inputs).logits
        routing._adapter.take_layer_features = lambda arguments: (
            arguments.update(deepstack_visual_embeds=None) or [torch.zeros_like(arguments["inputs_embeds"])]
        )
        assert (model(**inputs).logits - expected).abs().max() > 1e-2


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_generate_grows_the_cache_of_every_stage(case, attention):
    """The first token is that of the routed prompt, and the cache of every stage grows by one token a step."""
    model, inputs = case
    model.set_attn_implementation(attention)
    this = policy("reroute", STAGES)
    with rk.apply(model, this) as routing:
        logits = model(**inputs).logits[0, -1]
        output = model.generate(
            **inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False, return_dict_in_generate=True
        )
        stages = routing.trace.stages
    assert output.sequences[0, inputs["input_ids"].shape[1]] == logits.argmax()
    assert routing.trace.visual_counts == [int(((inputs["input_ids"] == IMAGE) | (inputs["input_ids"] == VIDEO)).sum())]
    lengths = [output.past_key_values.get_seq_length(layer) for layer in (0, 1, 3, 4, 5)]
    prompt = inputs["input_ids"].shape[1]
    assert lengths == [length + 5 for length in (prompt, *(stage.tokens for stage in stages), stages[-1].tokens)]
    assert stages[0].tokens < prompt


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("action", ACTIONS)
@torch.no_grad()
def test_beside_a_shorter_prompt_of_text(case, action, side):
    model, inputs = case
    length = inputs["input_ids"].shape[1]
    text = torch.zeros_like(inputs["input_ids"])
    kept = slice(length - 9, length) if side == "left" else slice(0, 9)
    text[:, kept] = torch.arange(20, 29)
    both = inputs | {
        "input_ids": torch.cat([inputs["input_ids"], text]),
        "attention_mask": torch.cat([inputs["attention_mask"], (text > 0).long()]),
    }
    if "mm_token_type_ids" in inputs:
        both["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(text)])
    alone = model(input_ids=text[:, kept]).logits[0, -1]
    with rk.apply(model, policy(action, STAGES)) as routing:
        expected = model(**inputs).logits[0, -1]
        selected = selections(routing.trace)
        logits = model(**both).logits
    assert selections(routing.trace) == selected
    assert routing.trace.visual_counts[1] == 0
    torch.testing.assert_close(logits[0, -1], expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(logits[1, kept.stop - 1], alone, atol=1e-4, rtol=0)


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
