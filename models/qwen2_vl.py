"""Qwen2-VL and Qwen2.5-VL."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .adapter import Adapter
from .vision import QwenVision


class Qwen2VLAdapter(Adapter):
    """`Qwen2VLForConditionalGeneration`, `Qwen2_5_VLForConditionalGeneration`: rotary positions on three axes."""

    text_model_types = ("qwen2_vl_text", "qwen2_5_vl_text")
    position_axes = 3

    def __init__(self, model: nn.Module):
        super().__init__(model)
        self._axes_apart = False

    def rotary(self, layer: nn.Module, position_embeddings) -> tuple[Tensor, Tensor]:
        cos, sin = position_embeddings
        self._axes_apart = cos.ndim == 4
        if self._axes_apart:  # before transformers 5.17 the layers mix the axes, not the model
            sections = layer.self_attn.config.rope_parameters["mrope_section"] * 2
            cos, sin = (
                torch.cat([part[i % 3] for i, part in enumerate(table.split(sections, dim=-1))], dim=-1)
                for table in (cos, sin)
            )
        return cos, sin

    def position_embeddings(self, cos: Tensor, sin: Tensor):
        if self._axes_apart:  # mixing three equal axes gives the same table again
            cos, sin = cos.expand(3, *cos.shape), sin.expand(3, *sin.shape)
        return cos, sin


class Qwen2_5VLAdapter(Qwen2VLAdapter):
    """`Qwen2_5_VLForConditionalGeneration`, whose vision tower can be reduced."""

    vision = QwenVision
