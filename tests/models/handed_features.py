"""Types that differ in their vision towers alone: tiny models that are handed features of images as pixels."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module

import torch
import transformers
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from tests.models.prompts import IMAGE, VIDEO, VISION_END, VISION_START

TOKENS = 24
"""Visual tokens of an image."""

CLIP = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
GRID = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64}
SAM = {
    "hidden_size": 32,
    "output_channels": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 64,
    "mlp_dim": 32,
    "global_attn_indexes": [0],
}
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 512,
    "max_position_embeddings": 1024,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


class Features:
    """In place of `get_image_features`: the pixels, (images, tokens, channels), are the features.

    Args:
        listed: whether the model takes a tensor for each image, not one of all.
        packed: whether all images are in one row.
        output: class of the output, and what it holds beside them.
    """

    def __init__(self, listed: bool, packed: bool, output: Callable):
        self.listed, self.packed, self.output = listed, packed, output

    def __call__(
        self,
        pixel_values=None,
        image_grid_thw=None,
        target_sizes=None,
        high_res_pixel_values=None,
        pixel_values_images=None,
        **_settings,
    ):
        return self._handed(pixel_values if pixel_values_images is None else pixel_values_images)

    def _handed(self, pixels: Tensor):
        images = pixels[0].split(TOKENS) if self.packed else pixels
        return self.output(pooler_output=list(images) if self.listed else images)


class VideoFeatures(Features):
    """In place of `get_video_features`."""

    def __call__(self, pixel_values_videos=None, *_sizes, **_settings):
        return self._handed(pixel_values_videos)


@dataclass(frozen=True)
class Handed:
    """How a type is built, and what its calls bring.

    Args:
        kind: beginning of the names of its classes.
        text: of its text configuration, beside `TEXT`.
        vision: its vision configuration.
        config: of the whole.
        brings: arguments of a call with an image, beside its pixels: those of an image with `TOKENS` tokens.
        output: as in `Features`.
        prepared: applied to the model.
    """

    kind: str
    text: dict
    vision: dict
    config: dict
    brings: Callable[[], dict[str, Tensor]] = dict
    output: Callable = BaseModelOutputWithPooling
    prepared: Callable[[torch.nn.Module], object] = lambda model: None

    @property
    def config_class(self):
        """None before the transformers that has it."""
        return getattr(transformers, f"{self.kind}Config", None)

    @property
    def can_be_called(self) -> bool:
        """Whether this transformers builds the type without timm, and hands on the pixels that it is given."""
        if self.kind == "PerceptionLM":
            return hasattr(self.config_class, "sub_configs_defaults")
        if self.kind == "Emu3":
            return "pixel_values=pixel_values" in inspect.getsource(transformers.Emu3ForConditionalGeneration.forward)
        return True

    @property
    def packs_images(self) -> bool:
        """Whether all images of a call are one row."""
        return "target_sizes" in self.brings()

    def build(self) -> torch.nn.Module:
        config = self.config_class(text_config=TEXT | self.text, vision_config=self.vision, **self.config)
        model = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
        core = model.model
        listed = "torch.cat(" in inspect.getsource(type(core).forward)
        settings = listed, self.packs_images, self.output
        core.get_image_features, core.get_video_features = Features(*settings), VideoFeatures(*settings)
        self.prepared(model)
        return model


def _of(kind, text="llama", vision=None, image="image_token_id", **config):
    made = {name: config.pop(name) for name in ("brings", "output", "prepared") if name in config}
    text = {"model_type": text} if isinstance(text, str) else text
    config = {image: IMAGE, **config}
    return Handed(kind, text, CLIP if vision is None else vision, config, **made)


def _hybrid(**more):
    """A text model of Qwen3.5."""
    return {
        "model_type": "qwen3_5_text",
        "initializer_range": 0.1,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "rope_parameters": {
            "rope_type": "default",
            "mrope_section": [1, 1, 2],
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
        },
        "layer_types": ["linear_attention", "full_attention"] * 3,
        **more,
    }


def _siglip(**more):
    return CLIP | {"model_type": "siglip_vision_model", "vision_use_head": False, **more}


def _sizes():
    return {"target_sizes": torch.tensor([[4, TOKENS // 4]])}


def _with_indicators(**features):
    from transformers.models.ovis2.modeling_ovis2 import BaseModelOutputWithVisualIndicatorFeatures

    indicators = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    return BaseModelOutputWithVisualIndicatorFeatures(**features, visual_indicator_features=indicators)


def _grid():
    return {"image_grid_thw": torch.tensor([[1, 8, TOKENS // 2]])}


def _mrope(*sections, **rope):
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(sections), **rope}


def _added(module, layers):
    """Output with features that are added at layers: those of its images, each time on another scale."""

    def output(pooler_output):
        kind = import_module(f"transformers.models.{module}")
        made = next(value for name, value in vars(kind).items() if name in _OUTPUTS_WITH_ADDITIONS)
        scaled = [[features * (layer + 1) for features in pooler_output] for layer in layers]
        if "Granite4" in made.__name__:
            return made(deepstack_features=list(zip(layers, scaled, strict=True)))
        return made(pooler_output=pooler_output, deepstack_features=scaled)

    return output


_OUTPUTS_WITH_ADDITIONS = (
    "BaseModelOutputWithDeepstackFeatures",
    "Granite4VisionImageFeaturesOutput",
    "GraniteDoclingImageFeaturesOutput",
)


def scattered(model):
    """Make weights random that begin as zeros or ones, so that leaving one out shows."""
    for name, weight in model.model.language_model.named_parameters():
        if "norm" in name:
            weight.data.add_(torch.randn_like(weight), alpha=0.2)


def _prepared4(model):
    """Attention of Gemma 4 is not scaled: of random queries it is so sharp that rounding shows."""
    scattered(model)
    for layer in model.model.language_model.layers:
        layer.layer_scalar.fill_(0.8)
        layer.self_attn.q_norm.weight.data.mul_(0.3)


WINDOW = 20
"""Of Gemma's sliding layers: shorter than an image."""
_WINDOWS = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"] * 3}
_GEMMA3 = {"model_type": "gemma3_text", "query_pre_attn_scalar": 25, **_WINDOWS}
_GEMMA4 = {
    **_WINDOWS,
    "global_head_dim": 32,
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.5, "rope_theta": 1000.0},
    },
}


def _gemma4(kind, text, vision):
    text = {**_GEMMA4, **text}
    config = {"video_token_id": VIDEO, "audio_token_id": 504, "audio_config": None}
    return _of(kind, text, vision, prepared=_prepared4, **config)


def _muse(kind, **text):
    """Layers see a window and rotate, or see all and do not."""
    rotates = {"sliding_window": WINDOW, "layer_types": _WINDOWS["layer_types"], "layer_rope_theta": [10_000.0, 0] * 3}
    vision = {**CLIP, "pos_emb_height": 2, "pos_emb_width": 2}
    return partial(_of, kind, {**rotates, **text}, vision, projector_hidden_size=32, brings=_grid)


HANDED: dict[str, Handed] = {
    "aria": _of(
        "Aria",
        {"model_type": "aria_text", "moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1},
        CLIP | {"model_type": "idefics3_vision"},
        image="image_token_index",
        projector_patch_to_query_dict={"4": 4},
    ),
    "apertus1p5": _of(
        "Apertus1p5",
        {"model_type": "apertus1p5_text", "vocab_size": 4608},
        {"base_channels": 32, "codebook_size": 4, "embed_dim": 8, "latent_channels": 8},
        audio_token_id=504,
        image_token_offset=400,
        audio_token_offset=404,
    ),
    "ernie4_5_vl_moe": _of(
        "Ernie4_5_VLMoe",
        {
            "model_type": "ernie4_5_vl_moe_text",
            "rope_parameters": _mrope(3, 3, 2),
            "moe_intermediate_size": [32, 24],
            "moe_k": 2,
            "moe_num_experts": 4,
            "moe_num_shared_experts": 1,
            "mlp_layer_types": ["dense", "sparse"] * 3,
        },
        GRID,
        brings=_grid,
        video_token_id=VIDEO,
        image_start_token_id=VISION_START,
        image_end_token_id=VISION_END,
    ),
    "exaone4_5": _of(
        "Exaone4_5_",
        {
            "model_type": "exaone4",
            "sliding_window": 24,
            "sliding_window_pattern": 2,
            "layer_types": ["sliding_attention", "full_attention"] * 3,
        },
        GRID,
        video_token_id=VIDEO,
    ),
    "granite4_vision": _of(
        "Granite4Vision",
        {"model_type": "granite4_vision_text", "attention_multiplier": 0.2, "embedding_multiplier": 1.5},
        CLIP | {"model_type": "siglip_vision_model", "hidden_size": 64},
        image="image_token_index",
        downsample_rate="1/2",
        deepstack_layer_map=[[-1, 0], [-1, 2]],
        spatial_target_layers=[1, 3, 4, 5],
        output=_added("granite4_vision.modeling_granite4_vision", [0, 2, 1, 3, 4, 5]),
    ),
    "qwen3_omni_moe_thinker": _of(
        "Qwen3OmniMoeThinker",
        {
            "model_type": "qwen3_omni_moe_text",
            "rope_parameters": _mrope(2, 3, 3),
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
        },
        GRID | {"deepstack_visual_indexes": [0, 0, 0]},
        brings=_grid,
        output=_added("qwen3_omni_moe.modeling_qwen3_omni_moe", [0, 1, 2]),
        video_token_id=VIDEO,
        audio_token_id=504,
        audio_config={
            "encoder_layers": 1,
            "d_model": 32,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 32,
            "output_dim": 64,
            "num_mel_bins": 16,
            "downsample_hidden_size": 32,
        },
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        vision_token_id=505,
        audio_start_token_id=506,
        audio_end_token_id=507,
    ),
    "lfm2_vl": _of(
        "Lfm2Vl",
        {"model_type": "lfm2", "layer_types": ["conv", "full_attention"] * 3, "initializer_range": 0.1},
        CLIP | {"model_type": "siglip2_vision_model"},
    ),
    "cosmos3_edge": _of(
        "Cosmos3Edge",
        {"rope_parameters": _mrope(2, 3, 3)},
        CLIP,
        brings=_grid,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
    ),
    "deepseek_ocr2": _of(
        "DeepseekOcr2",
        {
            "model_type": "deepseek_ocr2_text",
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_shared_experts": 1,
            "moe_intermediate_size": 32,
            "mlp_layer_types": ["dense", "sparse"] * 3,
        },
        {
            "sam_config": SAM,
            "encoder_config": {
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
            },
        },
    ),
    "emu3": _of(
        "Emu3",
        {"attention_dropout": 0.0},
        vocabulary_map={"<image>": IMAGE, "<|visual token 000000|>": 1},
        vq_config={"base_channels": 32, "codebook_size": 4, "embed_dim": 8, "latent_channels": 8, "hidden_size": 32},
    ),
    "gemma3": _of("Gemma3", _GEMMA3, _siglip(), image="image_token_index", prepared=scattered),
    # Experts, keys that are values in layers of full attention, heads of two sizes, images that see themselves.
    "gemma4": _gemma4(
        "Gemma4",
        {
            "model_type": "gemma4_text",
            "hidden_size_per_layer_input": 0,
            "use_bidirectional_attention": "vision",
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 1,
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 32,
            "initializer_range": 0.1,
        },
        CLIP,
    ),
    # An input of each layer for each token; the last three layers read keys and values of others. Causal.
    "gemma4-e": _gemma4(
        "Gemma4",
        {
            "model_type": "gemma4_text",
            "num_hidden_layers": 8,
            "layer_types": ["sliding_attention", "full_attention"] * 4,
            "num_kv_shared_layers": 3,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 512,
            "initializer_range": 0.1,
        },
        CLIP,
    ),
    "gemma4_unified": _gemma4(
        "Gemma4Unified",
        {"model_type": "gemma4_unified_text", "attention_k_eq_v": True},
        {"patch_size": 4, "pooling_kernel_size": 2, "mm_embed_dim": 32, "mm_posemb_size": 64, "output_proj_dims": 32},
    ),
    "glm_ocr": _of(
        "GlmOcr",
        {"model_type": "glm_ocr_text", "rope_parameters": _mrope(1, 1, 2, partial_rotary_factor=0.5)},
        GRID,
        brings=_grid,
        video_token_id=VIDEO,
        image_start_token_id=VISION_START,
        image_end_token_id=VISION_END,
    ),
    "idefics2": _of(
        "Idefics2",
        {"model_type": "mistral", "sliding_window": None},
        CLIP,
        perceiver_config={
            "hidden_size": 64,
            "resampler_n_latents": 4,
            "resampler_depth": 1,
            "resampler_n_heads": 2,
            "resampler_head_dim": 16,
            "num_key_value_heads": 2,
        },
    ),
    "paddleocr_vl": _of(
        "PaddleOCRVL",
        {"model_type": "paddleocr_vl_text", "rope_parameters": _mrope(2, 3, 3)},
        CLIP,
        brings=_grid,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
    ),
    "qwen2_5_omni_thinker": _of(
        "Qwen2_5OmniThinker",
        {"model_type": "qwen2_5_omni_text", "rope_parameters": _mrope(2, 3, 3)},
        GRID | {"depth": 1},
        image="image_token_index",
        brings=_grid,
        video_token_index=VIDEO,
        audio_token_index=504,
        audio_config={
            "encoder_layers": 1,
            "d_model": 32,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 32,
            "output_dim": 64,
            "num_mel_bins": 16,
        },
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        vision_token_id=505,
        audio_start_token_id=506,
        audio_end_token_id=507,
    ),
    "cohere2_vision": _of(
        "Cohere2Vision",
        {
            "model_type": "cohere2",
            "sliding_window": 24,
            "layer_types": ["sliding_attention", "full_attention"] * 3,
            "logit_scale": 1.0,
        },
        _siglip(),
    ),
    "cohere_compass": _of(
        "CohereCompass",
        {
            "model_type": "cohere_compass_text",
            **_WINDOWS,
            "rope_parameters": {"sliding_attention": _mrope(2, 3, 3), "full_attention": None},
        },
        GRID | {"deepstack_visual_indexes": [0, 0, 0]},
        brings=_grid,
        output=_added("cohere_compass.modeling_cohere_compass", [0, 1, 2]),
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
    ),
    "deepseek_vl": _of("DeepseekVL", vision=_siglip()),
    "deepseek_vl_hybrid": _of(
        "DeepseekVLHybrid",
        vision=_siglip(),
        high_res_vision_config=SAM,
        brings=lambda: {"high_res_pixel_values": torch.zeros(1, 3, 8, 8)},
    ),
    "fast_vlm": _of("FastVlm", "qwen2", CLIP | {"model_type": "clip_vision_model"}, image="image_token_index"),
    "got_ocr2": _of("GotOcr2", "qwen2", SAM, image="image_token_index"),
    "granite_docling": _of(
        "GraniteDocling",
        {"model_type": "granite_docling_text", "attention_multiplier": 0.2, "embedding_multiplier": 1.5},
        CLIP | {"out_hidden_size": 64, "scale_factor": 2, "deepstack_visual_indexes": [0, 0, 0]},
        output=_added("granite_docling.modeling_granite_docling", [0, 1, 2]),
    ),
    "hyperclovax_vision_v2": _of(
        "HyperCLOVAXVisionV2",
        {"model_type": "hyperclovax", "attention_multiplier": 0.2, "embedding_multiplier": 2.0},
        GRID | {"model_type": "qwen2_5_vl_vision"},
        video_token_id=VIDEO,
    ),
    "janus": _of(
        "Janus",
        vision=CLIP | {"projection_dim": 64, "num_image_tokens": 4},
        vq_config={"base_channels": 32, "num_embeddings": 16, "projection_dim": 64, "image_token_embed_dim": 64},
    ),
    "kimi_k25": _of(
        "Kimi_K25",
        {
            "model_type": "deepseek_v3",
            "num_key_value_heads": 4,
            "head_dim": 8,
            "q_lora_rank": 24,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 12,
            "qk_rope_head_dim": 8,
            "v_head_dim": 16,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "moe_intermediate_size": 32,
            "first_k_dense_replace": 1,
        },
        CLIP | {"pos_emb_height": 4, "pos_emb_width": 4},
        brings=_grid,
        projection_hidden_size=32,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
    ),
    "lfm3_vl": _of(
        "Lfm3Vl",
        {
            "model_type": "lfm3",
            "layer_types": ["conv", "full_attention", "conv", "full_attention", "sliding_attention", "full_attention"],
            "sliding_window": WINDOW,
            "initializer_range": 0.1,
        },
        {**CLIP, "num_key_value_heads": 2},
        brings=_grid,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
    ),
    "lighton_ocr": _of("LightOnOcr", "qwen3", CLIP | {"model_type": "pixtral", "head_dim": 16}),
    "llava_next_video": _of(
        "LlavaNextVideo",
        vision=CLIP | {"model_type": "clip_vision_model"},
        image="image_token_index",
        video_token_index=VIDEO,
    ),
    "minicpm_ocr": _of(
        "MiniCPMOcr",
        _hybrid(),
        CLIP | {"insert_layer_id": 0},
        brings=_sizes,
        video_token_id=VIDEO,
        insert_layer_id=0,
    ),
    "minicpmv4_6": _of(
        "MiniCPMV4_6",
        _hybrid(),
        CLIP | {"insert_layer_id": 0},
        brings=_sizes,
        video_token_id=VIDEO,
        insert_layer_id=0,
    ),
    "minicpmv4_7": _of(
        "MiniCPMV4_7",
        _hybrid(),
        CLIP | {"insert_layer_id": 0},
        brings=lambda: {"target_sizes": torch.tensor([[16, TOKENS]])},  # 16 patches a token
        video_token_id=VIDEO,
        insert_layer_id=0,
        image_start_id=VISION_START,
        image_end_id=VISION_END,
        slice_start_id=505,
        slice_end_id=506,
        newline_id=507,
    ),
    "muse_glimmer": _muse("MuseGlimmer", model_type="muse_glimmer_text")(video_token_id=VIDEO, out_hidden_size=64),
    "muse_spark": _muse(
        "MuseSpark",
        model_type="muse_spark_text",
        num_local_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        moe_hidden_size=32,
        mlp_layer_types=["dense", "sparse"] * 3,
    )(
        video_token_id=VIDEO,
        out_hidden_size=64,
        audio_token_id=504,
        audio_config={
            "patch_sizes": [4],
            "hidden_sizes": [16],
            "depths": [1],
            "num_hidden_layers": 1,
            "out_hidden_size": 64,
        },
    ),
    "ovis2": _of(
        "Ovis2",
        "qwen2",
        CLIP | {"vocab_size": 32, "num_visual_indicator_tokens": 2},
        visual_indicator_token_ids=[VISION_START, VISION_END],
        hidden_size=64,
        vocab_size=512,
        output=_with_indicators,
    ),
    # All of a prompt sees all of it.
    "paligemma": _of("PaliGemma", "gemma", _siglip(), image="image_token_index", projection_dim=64, prepared=scattered),
    "perception_lm": _of(
        "PerceptionLM",
        vision=CLIP | {"model_type": "clip_vision_model", "model_args": {"embed_dim": 32}},
        video_token_id=VIDEO,
    ),
    "pp_chart2table": _of("PPChart2Table", "qwen2", SAM, image="image_token_index"),
    "qianfan_ocr": _of("QianfanOCR", "qwen3", CLIP | {"image_size": [28, 28], "patch_size": [14, 14]}),
    "shieldgemma2": _of("ShieldGemma2", _GEMMA3, _siglip(), image="image_token_index", prepared=scattered),
    "video_llama_3": _of("VideoLlama3", "qwen2", CLIP, video_token_id=VIDEO),
    "video_llava": _of(
        "VideoLlava",
        vision=CLIP | {"model_type": "clip_vision_model"},
        image="image_token_index",
        video_token_index=VIDEO,
    ),
    "vipllava": _of(
        "VipLlava",
        vision=CLIP | {"model_type": "clip_vision_model"},
        image="image_token_index",
        vision_feature_layers=[-1],
    ),
}
