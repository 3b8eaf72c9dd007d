"""Gemma's families as tiny models with random weights, and prompts for them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import transformers
from torch import Tensor

from tests.models.families import CLIP, TEXT, Family, tiny
from tests.models.prompts import IMAGE, VISION_END, VISION_START, Prompt, batch

WINDOW = 24
"""Of sliding layers: shorter than an image."""

GEMMA = {**TEXT, "head_dim": 16, "sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"] * 3}


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


MODELS: dict[str, Callable] = {"gemma3": gemma3}


class GemmaFamily(Family):
    """A tiny model and its prompts."""

    def _picture(self, generator) -> dict[str, Tensor]:
        return {"pixel_values": torch.randn(1, 3, 168, 168, generator=generator)}

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
        inputs["token_type_ids"] = (inputs["input_ids"] == IMAGE).long()
        return inputs | self._merged([prompt.features for prompt in prompts], dim=0)


@cache
def load(name: str) -> GemmaFamily:
    """One model for all tests of a process; they leave it as it was."""
    torch.manual_seed(0)
    return GemmaFamily(name, MODELS[name]().eval())
