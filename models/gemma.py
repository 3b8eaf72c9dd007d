"""Gemma's families: sliding windows, rotary embeddings by kind of layer, image tokens that see each other."""

from __future__ import annotations

from torch import Tensor, nn

from .adapter import Adapter


class Gemma3Adapter(Adapter):
    """`Gemma3ForConditionalGeneration`: the tokens of an image see each other in every layer."""

    text_model_types = ("gemma3_text",)
    cuts_masks = True
    rotates_by_kind = True

    def embeddings_at(self, hidden: Tensor, positions: Tensor, kind: str = "full_attention") -> object:
        return self.decoder.rotary_emb(hidden, positions, kind)


class ShieldGemma2Adapter(Gemma3Adapter):
    """`ShieldGemma2ForImageClassification`, which answers by the logits of the Gemma 3 that it holds."""

    def __init__(self, model: nn.Module):
        inside = getattr(model, "model", None)
        super().__init__(inside if isinstance(getattr(inside, "model", None), nn.Module) else model)
