"""Gemma's families as tiny models with random weights, and prompts for them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import transformers
from torch import Tensor

from tests.models.families import CLIP, TEXT, Family, tiny
from tests.models.prompts import IMAGE, VIDEO, VISION_END, VISION_START, Prompt, batch

AUDIO = 504
SIDES = {"gemma3": 168, "paligemma": 84}
"""Pixels of images that a family takes as pixels, not as patches."""
WINDOW = 24
"""Of sliding layers: shorter than an image."""

GEMMA = {**TEXT, "head_dim": 16, "sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"] * 3}


def has(name: str) -> bool:
    """Whether this transformers has a family."""
    return hasattr(transformers, {"gemma4_unified": "Gemma4UnifiedConfig"}.get(name, "Gemma4Config"))


def scattered(model):
    """The model with random weights where it begins with zeros or ones, so that leaving one out shows."""
    for name, weight in model.named_parameters():
        if "norm" in name and "vision_tower" not in name:
            weight.data.add_(torch.randn_like(weight), alpha=0.2)
        elif name.endswith("mm_input_projection_weight"):
            weight.data.normal_()
    return model


def gemma3(kind="Gemma3"):
    """Two rotary embeddings that differ much; layers see a window, or all."""
    return scattered(
        tiny(
            kind,
            vision_config={**CLIP, "model_type": "siglip_vision_model", "image_size": 168, "vision_use_head": False},
            text_config={**GEMMA, "query_pre_attn_scalar": 25},
            image_token_index=IMAGE,
            mm_tokens_per_image=36,
        )
    )


def shieldgemma2():
    """A classifier around Gemma 3."""
    config = transformers.ShieldGemma2Config(**load("gemma3").model.config.to_dict() | {"model_type": "shieldgemma2"})
    config.yes_token_index, config.no_token_index = 7, 8
    return scattered(transformers.ShieldGemma2ForImageClassification(config))


GEMMA4 = {
    **GEMMA,
    "global_head_dim": 32,
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.5, "rope_theta": 1000.0},
    },
}
VISION4 = {
    **CLIP,
    "head_dim": 16,
    "num_key_value_heads": 2,
    "patch_size": 4,
    "pooling_kernel_size": 2,
    "position_embedding_size": 64,
}


def gemma4(**text):
    """Experts, keys that are values in layers of full attention, heads of two sizes, images that see themselves."""
    experts = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32}
    large = {"hidden_size_per_layer_input": 0, "use_bidirectional_attention": "vision", **experts}
    text = text or {**large, "attention_k_eq_v": True, "num_global_key_value_heads": 1}
    model = tiny(
        "Gemma4",
        vision_config=VISION4,
        text_config={**GEMMA4, **text},
        audio_config=None,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        audio_token_id=AUDIO,
    )
    for layer in model.model.language_model.layers:
        layer.layer_scalar.fill_(0.8)
    return scattered(model)


def gemma4_e():
    """An input of each layer for each token; the last three layers read keys and values of others. Causal."""
    kinds = ["sliding_attention", "full_attention"] * 4
    inputs = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 512}
    # With 0.2 the unrouted model alone differs by 1e-4 between paddings.
    inputs["initializer_range"] = 0.1
    return gemma4(num_hidden_layers=8, layer_types=kinds, num_kv_shared_layers=3, **inputs)


def gemma4_unified():
    config = {"patch_size": 4, "pooling_kernel_size": 2, "mm_embed_dim": 32, "mm_posemb_size": 64}
    return scattered(
        tiny(
            "Gemma4Unified",
            vision_config=config | {"output_proj_dims": 32},
            text_config={**GEMMA4, "attention_k_eq_v": True},
            audio_config=None,
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            audio_token_id=AUDIO,
        )
    )


def paligemma():
    """All of a prompt sees all of it."""
    return scattered(
        tiny(
            "PaliGemma",
            vision_config={**CLIP, "model_type": "siglip_vision_model", "image_size": 84, "vision_use_head": False},
            text_config={**TEXT, "model_type": "gemma", "head_dim": 16},
            image_token_index=IMAGE,
            projection_dim=64,
        )
    )


MODELS: dict[str, Callable] = {
    "gemma3": gemma3,
    "gemma4": gemma4,
    "gemma4_e": gemma4_e,
    "gemma4_unified": gemma4_unified,
    "paligemma": paligemma,
}
MODELS = {name: make for name, make in MODELS.items() if "gemma4" not in name or has(name)}


class GemmaFamily(Family):
    """A tiny model and its prompts."""

    def _picture(self, generator) -> dict[str, Tensor]:
        if self.name in SIDES:
            side = SIDES[self.name]
            return {"pixel_values": torch.randn(1, 3, side, side, generator=generator)}
        side, patch = (6, 3 * 8 * 8) if self.name == "gemma4_unified" else (12, 3 * 4 * 4)
        places = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="xy"), dim=-1)
        pixels = torch.rand(1, side * side, patch, generator=generator)
        return {"pixel_values": pixels, "image_position_ids": places.reshape(1, -1, 2)}

    def prompt(self, images: int, before: int, after: int, seed: int, video: bool = False) -> Prompt:
        generator = torch.Generator().manual_seed(seed)

        def text(count: int) -> Tensor:
            return torch.randint(3, 400, (count,), generator=generator)

        parts, features = [text(before)], []
        for _ in range(images):
            features.append(self._picture(generator))
            parts += [torch.tensor([VISION_START]), torch.full((self._count(features[-1]),), IMAGE)]
            parts += [torch.tensor([VISION_END]), text(3)]
        parts.append(text(after))
        return Prompt(torch.cat(parts), self._merged(features, dim=1))

    def batch(self, prompts: list[Prompt], side: str = "left") -> dict[str, Tensor]:
        inputs = batch([Prompt(prompt.ids, {}) for prompt in prompts], side)
        images = (inputs["input_ids"] == IMAGE).long()
        if self.name == "paligemma":  # 0 is the prefix, 1 an answer
            inputs["token_type_ids"] = torch.zeros_like(images)
        else:
            inputs["token_type_ids" if self.name == "gemma3" else "mm_token_type_ids"] = images
        return inputs | self._merged([prompt.features for prompt in prompts], dim=0)


@cache
def load(name: str) -> GemmaFamily:
    """One model for all tests of a process; they leave it as it was."""
    torch.manual_seed(0)
    return GemmaFamily(name, MODELS[name]().eval())
