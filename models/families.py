"""Families of models: their differences from `Adapter`, the default for decoders built like Llama's."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from reroute_kernels.attention import Attention

from .adapter import Adapter, rotated
from .modules import Module
from .towers import Idefics3Vision, InternVision, PixtralVision, SiglipVision
from .vision import ClipVision, QwenVision, ReducedVision


class LlavaAdapter(Adapter):
    """`LlavaForConditionalGeneration`, `LlavaNextForConditionalGeneration`, whose CLIP towers can be reduced."""

    vision = ClipVision


class LlavaOnevisionAdapter(Adapter):
    """`LlavaOnevisionForConditionalGeneration`."""

    vision = SiglipVision


class InternVLAdapter(Adapter):
    """`InternVLForConditionalGeneration`."""

    vision = InternVision


class Mistral3Adapter(Adapter):
    """`Mistral3ForConditionalGeneration`."""

    vision = PixtralVision


class AyaVisionAdapter(Adapter):
    """`AyaVisionForConditionalGeneration`: most layers see a sliding window; the others do not rotate."""

    text_model_types = ("cohere2",)

    def ranking(self, *args, **kwargs) -> Attention:
        return super().ranking(*args, **kwargs)._replace(cos=None, sin=None)


class Idefics3Adapter(Adapter):
    """`Idefics3ForConditionalGeneration`, `SmolVLMForConditionalGeneration`, Idefics2, Emu3."""

    text_model_types = (*Adapter.text_model_types, "emu3_text_model")
    decoder_name = "text_model"
    vision = Idefics3Vision


class Qwen2VLAdapter(Adapter):
    """`Qwen2VLForConditionalGeneration`, `Qwen2_5_VLForConditionalGeneration`: rotary positions on three axes.

    So has PaddleOCR-VL, Cosmos 3 Edge, and the thinker of Qwen2.5-Omni, whose audio tokens are text here.
    """

    text_model_types = (
        "qwen2_vl_text",
        "qwen2_5_vl_text",
        "cosmos3_edge_text",
        "paddleocr_vl_text",
        "qwen2_5_omni_text",
    )
    position_axes = 3
    vision = QwenVision

    def __init__(self, model: nn.Module):
        super().__init__(model)
        self._axes_apart = False

    def rotary(self, layer: Module, position_embeddings) -> tuple[Tensor, Tensor]:
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


class Qwen3VLAdapter(Adapter):
    """`Qwen3VLForConditionalGeneration`, `Qwen3VLMoeForConditionalGeneration`, the thinker of Qwen3-Omni.

    DeepStack adds visual features after the first layers.
    """

    text_model_types: tuple[str, ...] = ("qwen3_vl_text", "qwen3_vl_moe_text", "qwen3_omni_moe_text")
    position_axes = 3
    vision: type[ReducedVision] | None = QwenVision
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
        positions = mask[:, :, None].to(embeds.device)
        return [
            torch.zeros_like(embeds).masked_scatter_(positions, feature.to(embeds.device, embeds.dtype))
            for feature in features
        ]


class CohereCompassAdapter(Qwen3VLAdapter):
    """`CohereCompassForConditionalGeneration`: layers of some kinds do not rotate, those of others on three axes."""

    text_model_types = ("cohere_compass_text",)
    rotates_by_kind = True
    vision = None


class GraniteDoclingAdapter(Qwen3VLAdapter):
    """`GraniteDoclingForConditionalGeneration`."""

    text_model_types = ("granite_docling_text",)
    decoder_name = "text_model"
    position_axes = 1
    vision = None


class Qwen3_5Adapter(Adapter):
    """`Qwen3_5ForConditionalGeneration`, `Qwen3_5MoeForConditionalGeneration`.

    Layers with linear attention stand between those with full attention, which alone can rank. The projection of the
    queries brings a gate along.
    """

    text_model_types = ("qwen3_5_text", "qwen3_5_moe_text")
    position_axes = 3
    vision = QwenVision
    cache_types = ("Qwen3_5DynamicCache", "Qwen3_5MoeDynamicCache")  # of transformers before 5.6

    def queries(self, attention: Module, states: Tensor) -> Tensor:
        query, _gate = attention.q_proj(states).unflatten(-1, (-1, 2 * attention.head_dim)).chunk(2, dim=-1)
        return attention.q_norm(query)


class Glm4vAdapter(Adapter):
    """`Glm4vForConditionalGeneration`, GLM-OCR: rotary embedding of neighbouring channels, on part of the head."""

    text_model_types = ("glm4v_text", "glm_ocr_text")
    position_axes = 3
    rotary_style = "interleaved"

    def __init__(self, model: nn.Module):
        super().__init__(model)
        # Before transformers 5.17 the layers put the entries of a table in the order of the channels, not the model.
        self._in_halves = not hasattr(self.decoder.rotary_emb, "recomposition_frequencies")

    def rotary(self, layer: Module, position_embeddings) -> tuple[Tensor, Tensor]:
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


class Exaone4_5Adapter(Adapter):
    """`Exaone4_5_ForConditionalGeneration`: norms behind attention; beside windows, full layers do not rotate."""

    text_model_types = ("exaone4",)
    norm_name = None

    def ranking(self, *args, **kwargs) -> Attention:
        attention = super().ranking(*args, **kwargs)
        if self.decoder.config.sliding_window is None:
            return attention
        return attention._replace(cos=None, sin=None)


class Apertus1p5Adapter(Adapter):
    """`Apertus1p5ForConditionalGeneration`: another name of the norm. Tokens of sound run always, as text does."""

    text_model_types = ("apertus1p5_text",)
    norm_name = "attention_layernorm"


class Lfm2VLAdapter(Adapter):
    """`Lfm2VlForConditionalGeneration`: layers of short convolutions stand between those with attention."""

    text_model_types = ("lfm2",)
    norm_name = "operator_norm"
    cache_types = ("Lfm2HybridConvCache",)  # of transformers before 5.6

    def _layer_types(self) -> list[str]:
        # They keep a state of the last tokens, as linear attention does.
        return ["linear_attention" if kind == "conv" else kind for kind in super()._layer_types()]

    def queries(self, attention: Module, states: Tensor) -> Tensor:
        return attention.q_layernorm(super().queries(attention, states))

    def keys(self, attention: Module, states: Tensor) -> Tensor:
        return attention.k_layernorm(super().keys(attention, states))


class Lfm3VLAdapter(Lfm2VLAdapter):
    """`Lfm3VlForConditionalGeneration`: windows, too, with a rotary embedding of their own; rotated in float32."""

    text_model_types = ("lfm3",)
    rotates_by_kind = True
    queries = Adapter.queries
    keys = Adapter.keys

    def rotated_keys(self, layer: Module, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        keys = self.keys(layer.self_attn, states)
        return rotated(keys.float(), cos[:, :, None], sin[:, :, None], self.rotary_style).to(keys.dtype)


class MuseAdapter(Adapter):
    """`MuseGlimmerForConditionalGeneration`, `MuseSparkForConditionalGeneration`: full layers do not rotate.

    Queries and keys have one norm without weights. Tokens of sound run always, as text does.
    """

    text_model_types = ("muse_glimmer_text", "muse_spark_text")
    rotates_by_kind = True
    layer_attributes = (*Adapter.layer_attributes, "self_attn.qk_norm", "self_attn.qk_scale_factor")

    def __init__(self, model: nn.Module):
        super().__init__(model)
        rotated = [bool(self.decoder.config.layer_rope_theta[layer_idx]) for layer_idx in self.deciding_layers()]
        if len(set(rotated)) > 1:
            raise self._built_differently("some layers of full attention rotate, and some do not")

    def embeddings_at(self, hidden: Tensor, positions: Tensor, kind: str = "full_attention") -> object:
        return self.decoder.rotary_emb(hidden, positions)

    def queries(self, attention: Module, states: Tensor) -> Tensor:
        return attention.qk_norm(super().queries(attention, states)) * attention.qk_scale_factor

    def keys(self, attention: Module, states: Tensor) -> Tensor:
        return attention.qk_norm(super().keys(attention, states))


class KimiAdapter(Adapter):
    """`Kimi_K25ForConditionalGeneration`: latent attention, whose keys are projected twice and cached in between.

    Rankings are handed the channels that rotate before the others; the layers have them behind.
    """

    text_model_types = ("deepseek_v3",)
    layer_attributes = (
        "self_attn.kv_a_proj_with_mqa",
        "self_attn.kv_a_layernorm",
        "self_attn.kv_b_proj",
        "self_attn.expand_kv",
        "self_attn.qk_nope_head_dim",
        "self_attn.scaling",
    )

    def __init__(self, model: nn.Module):
        super().__init__(model)
        # Neighbouring channels are rotated together, by tables in two equal halves, and then put in two halves.
        self._neighbours = bool(self.decoder.config.rope_interleave)
        self.rotary_style = "interleaved" if self._neighbours else "rotate_half"

    @property
    def heads(self) -> tuple[int, int]:
        return (self.decoder.config.num_attention_heads,) * 2

    def rotary(self, layer: Module, position_embeddings) -> tuple[Tensor, Tensor]:
        cos, sin = position_embeddings
        if self._neighbours:
            cos, sin = (table.chunk(2, dim=-1)[0].repeat_interleave(2, dim=-1) for table in (cos, sin))
        return cos, sin

    def position_embeddings(self, cos: Tensor, sin: Tensor):
        if self._neighbours:
            cos, sin = (torch.cat([table[..., ::2]] * 2, dim=-1) for table in (cos, sin))
        return cos, sin

    def queries(self, attention: Module, states: Tensor) -> Tensor:
        if attention.q_proj is None:
            query = attention.q_b_proj(attention.q_a_layernorm(attention.q_a_proj(states)))
        else:
            query = attention.q_proj(states)
        return self._rotating_first(attention, query.unflatten(-1, (-1, attention.qk_head_dim)))

    def unnormalized_keys(self, attention: Module, states: Tensor) -> Tensor:
        sizes = attention.kv_lora_rank, attention.qk_rope_head_dim
        latent, rotating = attention.kv_a_proj_with_mqa(states)[:, None].split(sizes, dim=-1)
        key, _value = attention.expand_kv(attention.kv_a_layernorm(latent), rotating)
        return self._rotating_first(attention, key.transpose(1, 2))

    def cached_keys(self, cache, layer_idx: int) -> Tensor:
        layer: Module = self.layers[layer_idx]
        attention, cached = layer.self_attn, cache.layers[layer_idx]
        key, _value = attention.expand_kv(cached.keys, cached.values)
        key = self._rotating_first(attention, key)
        if not self._neighbours:
            return key
        rotated, rest = key.split([attention.qk_rope_head_dim, attention.qk_nope_head_dim], dim=-1)
        return torch.cat([torch.stack(rotated.chunk(2, dim=-1), dim=-1).flatten(-2), rest], dim=-1)

    @staticmethod
    def _rotating_first(attention: Module, rows: Tensor) -> Tensor:
        rest, rotating = rows.split([attention.qk_nope_head_dim, attention.qk_rope_head_dim], dim=-1)
        return torch.cat([rotating, rest], dim=-1)


class Ernie4_5VLMoeAdapter(Adapter):
    """`Ernie4_5_VLMoeForConditionalGeneration`: visual tokens have experts of their own; rotated in float32."""

    text_model_types = ("ernie4_5_vl_moe_text",)
    position_axes = 3
    rotary_style = "interleaved"
    token_arguments = ("moe_mm_token_type_ids",)

    def rotated_keys(self, layer: Module, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        keys = self.keys(layer.self_attn, states)
        return rotated(keys.float(), cos[:, :, None], sin[:, :, None], self.rotary_style).to(keys.dtype)


class Granite4VisionAdapter(Adapter):
    """`Granite4VisionForConditionalGeneration`: visual features are added before any of the layers."""

    text_model_types = ("granite4_vision_text",)
    decoder_arguments = (*Adapter.decoder_arguments, "vision_mask", "deepstack_features")

    def __init__(self, model: nn.Module):
        super().__init__(model)
        layers = [layer for _, layer in self._require(model.config, "deepstack_layer_map")]
        targets = layers + list(self._require(model.config, "spatial_target_layers"))
        reached = (layer for layer in targets if layer < len(self.layers))
        self.feature_layers = max(reached, default=0)

    def take_layer_features(self, arguments: dict) -> list[Tensor]:
        features = arguments.get("deepstack_features")
        if features is None:
            return []
        embeds, mask = arguments["inputs_embeds"], arguments["vision_mask"]
        # Those of layer 0 belong to the embeddings. Those of later ones are added behind the layer before.
        arguments["deepstack_features"] = {layer: feature for layer, feature in features.items() if layer == 0}
        positions = mask.to(embeds.device).expand_as(embeds)
        added = [torch.zeros_like(embeds) for _ in range(self.feature_layers)]
        for layer, feature in features.items():
            if 0 < layer <= self.feature_layers:
                added[layer - 1].masked_scatter_(positions, feature.to(embeds.device, embeds.dtype))
        return added
