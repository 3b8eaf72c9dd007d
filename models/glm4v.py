"""GLM-4.1V and GLM-4.5V."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .adapter import Adapter


class Glm4vAdapter(Adapter):
    """`Glm4vForConditionalGeneration`: rotary embedding of neighbouring channels, on part of the head."""

    text_model_types = ("glm4v_text",)
    position_axes = 3
    rotary_style = "interleaved"

    def __init__(self, model: nn.Module):
        super().__init__(model)
        # Before transformers 5.17 the layers put the entries of a table in the order of the channels, not the model.
        self._in_halves = not hasattr(self.decoder.rotary_emb, "recomposition_frequencies")

    def rotary(self, layer: nn.Module, position_embeddings) -> tuple[Tensor, Tensor]:
        cos, sin = position_embeddings
        if self._in_halves:
            cos, sin = (table.chunk(2, dim=-1)[0].repeat_interleave(2, dim=-1) for table in (cos, sin))
        return cos, sin

    def position_embeddings(self, cos: Tensor, sin: Tensor):
        if self._in_halves:
            cos, sin = (torch.cat([table[..., ::2]] * 2, dim=-1) for table in (cos, sin))
        return cos, sin


class Glm4vMoeAdapter(Adapter):
    """`Glm4vMoeForConditionalGeneration`, whose channels are rotated as Llama's are."""

    text_model_types = ("glm4v_moe_text",)
    position_axes = 3
