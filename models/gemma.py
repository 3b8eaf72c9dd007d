"""Gemma's families: sliding windows, rotary embeddings by kind of layer, image tokens that see each other."""

from __future__ import annotations

from functools import cached_property

from torch import Tensor, nn

from reroute_kernels.cost import deciding_layers

from .adapter import Adapter
from .modules import Module


class Gemma3Adapter(Adapter):
    """`Gemma3ForConditionalGeneration`: the tokens of an image see each other in every layer."""

    text_model_types: tuple[str, ...] = ("gemma3_text",)
    cuts_masks = True
    rotates_by_kind = True


class Gemma4Adapter(Gemma3Adapter):
    """`Gemma4ForConditionalGeneration`, `Gemma4UnifiedForConditionalGeneration`.

    The tokens of an image see each other in the layers with sliding windows, if `use_bidirectional_attention` of the
    text model is "vision". Layers with full attention have heads of another size. The smaller models have an input of
    each layer for each token, and the last layers read the keys and values of the last layer of their kind before them.
    """

    text_model_types = ("gemma4_text", "gemma4_unified_text")

    def __init__(self, model: nn.Module):
        super().__init__(model)
        config = self.decoder.config
        self.cuts_masks = config.use_bidirectional_attention == "vision"
        self.reusing_layers = frozenset(range(self._unshared(), len(self.layers)))
        if getattr(config, "hidden_size_per_layer_input", None):
            self.token_arguments = ("per_layer_input",)
        needed = (*self.token_arguments, *(["shared_kv_states"] if self.reusing_layers else []))
        self._require_arguments(self.layers[0], needed)

    def _unshared(self) -> int:
        """How many of the first layers have keys and values of their own."""
        return len(self.layers) - (getattr(self.decoder.config, "num_kv_shared_layers", None) or 0)

    def deciding_layers(self) -> list[int]:
        return deciding_layers(self.decoder.config)

    def keep_rows(self, arguments: dict) -> bool:
        # Layers that cache nothing would be handed the last tokens alone. The head takes those in any case.
        if not self.reusing_layers or arguments.get("logits_to_keep") is None:
            return False
        arguments["logits_to_keep"] = 0
        return True

    @cached_property
    def heads(self) -> tuple[int, int]:
        queries = self.decoder.config.num_attention_heads
        layer: Module = self.layers[self.deciding_layers()[0]]
        attention = layer.self_attn
        return queries, queries // attention.num_key_value_groups

    def values(self, attention: Module, states: Tensor) -> Tensor:
        project = attention.k_proj if attention.v_proj is None else attention.v_proj
        return attention.v_norm(project(states).unflatten(-1, (-1, attention.head_dim)))


class PaliGemmaAdapter(Adapter):
    """`PaliGemmaForConditionalGeneration`: the image and the text of a prompt see each other, what follows is causal.

    The text model of PaliGemma 2 caps its logits of attention, which rankings do not: it is refused.
    """

    text_model_types = ("gemma",)
    cuts_masks = True
    sees_prefix = True
    first_position = 1


class ShieldGemma2Adapter(Gemma3Adapter):
    """`ShieldGemma2ForImageClassification`, which answers by the logits of the Gemma 3 that it holds."""

    def __init__(self, model: nn.Module):
        inside: Module = getattr(model, "model", None)
        super().__init__(inside if isinstance(getattr(inside, "model", None), nn.Module) else model)
