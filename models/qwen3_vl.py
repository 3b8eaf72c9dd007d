"""Qwen3-VL and Qwen3-VL-MoE."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .adapter import Adapter


class Qwen3VLAdapter(Adapter):
    """`Qwen3VLForConditionalGeneration`, `Qwen3VLMoeForConditionalGeneration`.

    DeepStack adds visual features after the first layers.
    """

    text_model_types = ("qwen3_vl_text", "qwen3_vl_moe_text")
    position_axes = 3
    decoder_arguments = (*Adapter.decoder_arguments, "visual_pos_masks", "deepstack_visual_embeds")

    def __init__(self, model: nn.Module):
        super().__init__(model)
        self.feature_layers = len(self._require(model.config, "vision_config.deepstack_visual_indexes"))

    def take_layer_features(self, arguments: dict) -> list[Tensor]:
        features = arguments.get("deepstack_visual_embeds")
        if features is None:
            return []
        mask = arguments["visual_pos_masks"]
        embeds = arguments["inputs_embeds"]
        arguments["deepstack_visual_embeds"] = None
        places = mask[:, :, None].to(embeds.device)
        return [
            torch.zeros_like(embeds).masked_scatter_(places, feature.to(embeds.device, embeds.dtype))
            for feature in features
        ]
