"""Adapter between routing and a model. The class below fits decoders built like Llama's."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from functools import cached_property
from operator import attrgetter

import torch
from torch import Tensor, nn

from reroute_kernels.attention import Attention
from reroute_kernels.rankings import Norm
from reroute_kernels.versions import SUPPORTED

from .checkpointing import checkpointed
from .modules import Module, uncompiled
from .norms import known_norm
from .tensor_parallel import check_not_sharded
from .vision import ReducedVision

CACHE_NAMES = ("cache", "past_key_values")
"""Names of the argument that holds the KV cache: since transformers 5.24, and before."""


def cache_of(arguments: Mapping):
    """The KV cache among the arguments or the outputs of a model or a layer, under either name; None without one."""
    given = (arguments.get(name) for name in CACHE_NAMES)
    return next((cache for cache in given if cache is not None), None)


def cache_name(model: nn.Module) -> str:
    """The argument of a model that holds the KV cache."""
    parameters = inspect.signature(uncompiled(model).forward).parameters
    return next(name for name in CACHE_NAMES if name in parameters)


def visual_token_ids(config) -> list[int]:
    """Ids of the placeholders that image and video features replace."""
    found = (getattr(config, name, None) for name in ("image_token_id", "video_token_id"))
    return [token_id for token_id in found if token_id is not None]


def rotated(rows: Tensor, cos: Tensor, sin: Tensor, style: str) -> Tensor:
    """Rows (..., D) with their first R channels rotated by tables (..., R); style as in `ops.rank_tokens`."""
    first, rest = rows.split([cos.shape[-1], rows.shape[-1] - cos.shape[-1]], dim=-1)
    if style == "interleaved":
        turned = torch.stack([-first[..., 1::2], first[..., ::2]], dim=-1).flatten(-2)
    else:
        left, right = first.chunk(2, dim=-1)
        turned = torch.cat([-right, left], dim=-1)
    return torch.cat([first * cos + turned * sin, rest], dim=-1)


class Adapter:
    """The default adapter: Llama-like layers in a model that merges image and video features into its inputs.

    It fits LLaVA-OneVision, InternVL and Mistral 3. A family overrides the parts that differ. Arguments named `layer`
    are decoder layers.

    Args:
        model: the transformers model to route.

    Raises:
        AttributeError: the model lacks something that routing needs, which the message names.
    """

    text_model_types: tuple[str, ...] = (
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "aria_text",
        "deepseek_ocr2_text",
        "hyperclovax",
    )
    """Decoders that this family is known to come with."""

    decoder_name: str = "language_model"
    """Where the decoder is in `model.model`."""

    rotary_style: str = "rotate_half"
    """Which channels of a head are rotated together, as in `reroute_kernels.ops.rank_tokens`."""

    first_position: int = 0
    """Position of the first token, if the caller gives none."""

    position_axes: int = 1
    """How many position ids a token has."""

    vision: type[ReducedVision] | None = None
    """Access to the vision tower for reducers; None if this family supports none."""

    feature_layers: int = 0
    """After how many of the first layers the decoder adds features to visual tokens."""

    cuts_masks: bool = False
    """Whether masks depend on tokens, as where those of an image see each other in both directions: then masks of
    compact sequences are cut out of the model's own."""

    sees_prefix: bool = False
    """Whether the tokens of a prompt see all of it where layers are handed no mask."""

    reusing_layers: frozenset[int] = frozenset()
    """Layers that read the keys and values of an earlier layer and cache none."""

    rotates_by_kind: bool = False
    """Whether layers of each kind of attention have a rotary embedding of their own, or none."""

    cache_types: tuple[str, ...] = ()
    """Caches that this family brings along, beside those of transformers."""

    norm_name: str | None = "input_layernorm"
    """The norm that a layer begins with, by its name there; None if attention reads hidden states as they are."""

    layer_attributes: tuple[str, ...] = (
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.head_dim",
        "self_attn.scaling",
    )
    """Attributes of a decision layer that ranking reads."""

    feature_arguments: tuple[str, ...] = (
        "pixel_values",
        "pixel_values_images",
        "pixel_values_videos",
        "image_hidden_states",
        "mm_encoder_outputs",
    )
    """Arguments of `model.model` that bring images or videos, or their features."""

    core_arguments: tuple[str, ...] = (
        "input_ids",
        "inputs_embeds",
        "attention_mask",
        "position_ids",
        "cache",
    )
    """Arguments of `model.model.forward` from which a call is classified."""

    decoder_arguments: tuple[str, ...] = ("inputs_embeds", "attention_mask", "position_ids", "cache")
    """Arguments of the decoder, passed by name."""

    layer_arguments: tuple[str, ...] = ("attention_mask", "position_embeddings", "cache")
    """Arguments of its layers, passed by name behind the hidden states."""

    token_arguments: tuple[str, ...] = ()
    """Arguments of layers that have an entry or a row for each token, (B, L, ...), and follow the tokens that run."""

    def __init__(self, model: nn.Module):
        self.model: Module = model
        if not isinstance(getattr(model, "model", None), nn.Module):
            raise AttributeError(
                f"model must be a whole one with its head, such as LlavaForConditionalGeneration, got "
                f"{type(model).__name__}, which has no attribute 'model'"
            )
        self.core: Module = uncompiled(model.model)
        self.decoder: Module = uncompiled(self._require(self.core, self.decoder_name))
        self.layers: nn.ModuleList = self._require(self.decoder, "layers")
        check_not_sharded(model, self.core, self.decoder, *self.layers)
        self.layer_types: list[str] = self._layer_types()
        able = set(self.deciding_layers())
        required = self.layer_attributes if self.norm_name is None else (self.norm_name, *self.layer_attributes)
        for layer_idx, layer in enumerate(self.layers):
            for path in required if layer_idx in able else ():
                self._require(layer, path)
            self._require_arguments(layer, self.layer_arguments)
        self._require_arguments(self.core, self.core_arguments)
        self._require_arguments(self.decoder, self.decoder_arguments)
        self._require(model.config, "image_token_id")

    @property
    def visual_token_ids(self) -> list[int]:
        """Ids of the placeholders that image and video features replace, as the configuration has them now."""
        return visual_token_ids(self.model.config)

    @cached_property
    def own_cache(self) -> str | None:
        """The one of `cache_types` that this version of transformers brings along, if it does."""
        module = sys.modules[type(self.decoder).__module__]
        return next((name for name in self.cache_types if hasattr(module, name)), None)

    @cached_property
    def heads(self) -> tuple[int, int]:
        """Query and key heads of a decoder layer, of all processes."""
        config = self.decoder.config
        return config.num_attention_heads, getattr(config, "num_key_value_heads", None) or config.num_attention_heads

    def _require(self, owner: object, path: str):
        try:
            return attrgetter(path)(owner)
        except AttributeError:
            raise self._built_differently(f"{type(owner).__name__} has no attribute {path!r}") from None

    def _require_arguments(self, module: nn.Module, names: tuple[str, ...]) -> None:
        module = uncompiled(checkpointed(uncompiled(module)))
        parameters = inspect.signature(module.forward).parameters
        for name in names:
            if not parameters.keys() & (CACHE_NAMES if name == "cache" else {name}):
                raise self._built_differently(f"{type(module).__name__}.forward has no argument {name!r}")

    def _built_differently(self, how: str) -> AttributeError:
        import transformers

        return AttributeError(
            f"cannot route {type(self.model).__name__} of transformers {transformers.__version__}: {how} "
            f"(known to work: transformers {SUPPORTED['transformers']})"
        )

    def _layer_types(self) -> list[str]:
        """Type of attention of each layer, in the words of transformers' configurations."""
        config = self.decoder.config
        kinds = getattr(config, "layer_types", None)
        if kinds is None:
            sliding = getattr(config, "sliding_window", None) is not None
            kinds = ["sliding_attention" if sliding else "full_attention"] * len(self.layers)
        return list(kinds)[: len(self.layers)]

    def deciding_layers(self) -> list[int]:
        """Layers that can rank, and before which tokens can be selected: those with full attention."""
        return [layer_idx for layer_idx, kind in enumerate(self.layer_types) if kind == "full_attention"]

    def keep_rows(self, arguments: dict) -> bool:
        """Have the decoder run all tokens of a call through its layers, if it would leave some out by itself.

        Args:
            arguments: of the decoder, by name; changed if it would.

        Returns:
            Whether they were changed.
        """
        return False

    def cached_keys(self, cache, layer_idx: int) -> Tensor:
        """(B, Hkv, at least P, D), the rotated keys that a cache holds for a layer."""
        # Caches of hybrid models have lists of keys before transformers 5.6.
        return cache.key_cache[layer_idx] if hasattr(cache, "key_cache") else cache.layers[layer_idx].keys

    def states(self, layer: Module, hidden: Tensor) -> Tensor:
        """Hidden states as the attention of a layer reads them: after the norm that it begins with, if it has one."""
        return hidden if self.norm_name is None else getattr(layer, self.norm_name)(hidden)

    def queries(self, attention: Module, states: Tensor) -> Tensor:
        """(B, Q, Hq, D), as projected, of normalized states (B, Q, d)."""
        query = attention.q_proj(states).unflatten(-1, (-1, attention.head_dim))
        return attention.q_norm(query) if hasattr(attention, "q_norm") else query

    def keys(self, attention: Module, states: Tensor) -> Tensor:
        """(B, L, Hkv, D), as projected, of normalized states (B, L, d)."""
        key = self.unnormalized_keys(attention, states)
        return attention.k_norm(key) if hasattr(attention, "k_norm") else key

    def unnormalized_keys(self, attention: Module, states: Tensor) -> Tensor:
        """(B, L, Hkv, D), before the norm of keys, if the layer has one."""
        return attention.k_proj(states).unflatten(-1, (-1, attention.head_dim))

    def values(self, attention: Module, states: Tensor) -> Tensor:
        """(B, L, Hkv, D), as projected, of normalized states (B, L, d)."""
        return attention.v_proj(states).unflatten(-1, (-1, attention.head_dim))

    def rotated_keys(self, layer: Module, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(B, L, Hkv, D), keys as the layer caches them, of normalized states (B, L, d).

        Computed in their dtype, as layers do. A family whose layers do otherwise overrides it.

        Args:
            layer: of a stage.
            states: (B, L, d).
            cos, sin: (B, L, R).
        """
        return rotated(self.keys(layer.self_attn, states), cos[:, :, None], sin[:, :, None], self.rotary_style)

    def rotary(self, layer: Module, position_embeddings) -> tuple[Tensor, Tensor]:
        """cos and sin as (B or 1, L, R), from the position embeddings that the model hands its layers."""
        cos, sin = position_embeddings
        return cos, sin

    def tables(self, layer: Module, position_embeddings: object, batch: int) -> tuple[Tensor, ...]:
        """cos and sin of every sample, (batch, L, R), from the position embeddings that layers are handed."""
        return tuple(table.expand(batch, *table.shape[1:]) for table in self.rotary(layer, position_embeddings))

    def position_embeddings(self, cos: Tensor, sin: Tensor):
        """Position embeddings as the model passes them to its layers; inverse of `rotary`."""
        return cos, sin

    def take_layer_features(self, arguments: dict) -> list[Tensor]:
        """Take the features that the decoder would add to visual tokens between layers out of its arguments.

        Args:
            arguments: of the decoder, by name; changed if features are taken.

        Returns:
            (B, L, d) for each of the first layers, to be added to its output; empty if there is nothing to add.
        """
        return []

    def embeddings_at(self, hidden: Tensor, positions: Tensor, kind: str = "full_attention") -> object:
        """Position embeddings at positions (B, M) that count tokens, on the device of `hidden`.

        Args:
            hidden: (B, M, d).
            positions: (B, M) int64.
            kind: type of attention of the layers, which matters where `rotates_by_kind`.
        """
        axes, kinds = self.position_axes, (kind,) if self.rotates_by_kind else ()
        return self.decoder.rotary_emb(hidden, positions if axes == 1 else positions.expand(axes, -1, -1), *kinds)

    def norm(self, layer: Module, hidden: Tensor) -> Norm | None:
        """The norm that a layer begins with, if an operation can compute it in place of the module.

        Args:
            layer: the decision layer.
            hidden: hidden states of its dtype and on its device, (B, M, d).
        """
        return None if self.norm_name is None else known_norm(getattr(layer, self.norm_name), hidden)

    def ranking(
        self,
        layer: Module,
        hidden: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        valid: Tensor | None,
        positions: Tensor | None,
        states: Tensor | None = None,
    ) -> Attention:
        """Attention that tokens would pay to others in this layer.

        Args:
            layer: the decision layer.
            hidden: (B, L, d), its input.
            cos, sin: (B or 1, L, R); None if the ranking leaves the rotary position out.
            valid: (B, L) bool, or None if every token counts.
            positions: (B, Q) of the queries in the sequence, -1 for none; None for the last of each row.
            states: (B, L, d), the norm of `hidden` that the layer begins with, if it was computed.

        Returns:
            The argument of the operations that rank.
        """
        attention = layer.self_attn
        if states is None:
            states = self.states(layer, hidden)
        if positions is None:
            query_states = states[:, -1:]
        else:
            query_states = states.gather(1, positions.clamp(min=0)[:, :, None].expand(-1, -1, states.shape[2]))
        return Attention(
            self.queries(attention, query_states),
            self.keys(attention, states),
            cos,
            sin,
            key_mask=valid,
            query_index=positions,
            scale=attention.scaling,
            rotary_style=self.rotary_style,
        )
