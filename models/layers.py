"""The layers of a decoder under a policy: the stage and the attention mask of each."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

from torch import Tensor

from reroute_kernels.policy import Policy
from reroute_kernels.routing import on_device

from .adapter import Adapter
from .masks import FORMATS, attention_mask, is_flash_attention, mask_format, part_of_mask
from .refusals import ATTENTION_RULES, LAYER_RULES, refuse

_KINDS = ("full_attention", "sliding_attention", "linear_attention")


class RoutedLayers:
    """Properties of the routed layers that are the same in all calls.

    Args:
        adapter: of the model.
        policy: of the routing.

    Attributes:
        kinds: type of attention of each layer, in the words of transformers' configurations.
        stages: indices of the layers of each stage.
        groups: a number for each layer, the same for layers of a stage that are of one kind and share a mask.
        attention: indices of the layers that cache keys.
        pad_left: whether compact rows are left-padded, as sliding-window and recurrent layers require.
        length_is_routed: whether the first layer that caches keys, whose length transformers takes for the number of
            cached tokens, lies inside a stage that does not cache all tokens.
        padding_is_hidden: whether the first full-attention layer, whose cache transformers checks for padding, lies
            inside such a stage.
        has_states: whether any stage contains recurrent (linear-attention) layers.
        slides: whether any stage contains sliding-window layers.
        cuts_masks: whether masks of compact sequences are cut out of the model's own.
        sees_prefix: whether the tokens of a prompt see all of it where layers are handed no mask.
        first_position: position of the first token of a prompt for which the caller gives none.
        model_class: name of the model's class.

    Raises:
        ValueError: the policy names layers that do not exist.
        NotImplementedError: a layer does not support what the policy asks of it.
    """

    def __init__(self, adapter: Adapter, policy: Policy):
        self._config = adapter.decoder.config
        self.model_class = type(adapter.model).__name__
        self.kinds = adapter.layer_types
        self._adapter = adapter
        self._policy = policy
        self._able = adapter.deciding_layers()
        self.sees_prefix = adapter.sees_prefix
        refuse(self, LAYER_RULES)
        layers = policy.stage_layers
        first = layers[0]
        self.stages = [range(*ends) for ends in pairwise((*layers, len(self.kinds)))]
        of_stage = [-1] * first + [stage for stage, layers in enumerate(self.stages) for _ in layers]
        numbers: dict[tuple[int, str], int] = {}
        self.groups = [numbers.setdefault(pair, len(numbers)) for pair in zip(of_stage, self.kinds, strict=True)]
        self.attention = [
            layer_idx
            for layer_idx, kind in enumerate(self.kinds)
            if kind != "linear_attention" and layer_idx not in adapter.reusing_layers
        ]
        self.pad_left = any(kind != "full_attention" for kind in self.kinds[first:])
        caches_all = policy.action == "freeze" and policy.reducer is None
        self.length_is_routed = not caches_all and first <= self.attention[0]
        self.padding_is_hidden = not caches_all and first <= self.kinds.index("full_attention")
        self.has_states = "linear_attention" in self.kinds[first:]
        self.slides = "sliding_attention" in self.kinds[first:]
        self.cuts_masks = adapter.cuts_masks
        self.first_position = adapter.first_position
        self.check_attention()

    def cached_first(self, layers: range) -> list[int]:
        """The first of these layers that caches keys, if one does; a reducer's stage may begin before."""
        return [layer_idx for layer_idx in layers if layer_idx in self.attention][:1]

    # Facts that refusals.LAYER_RULES and refusals.ATTENTION_RULES read

    @property
    def num_layers(self) -> int:
        return len(self.kinds)

    @property
    def last_decision(self) -> int:
        return self._policy.stage_layers[-1]

    @property
    def bidirectional(self) -> object:
        """Which tokens see those behind them, in the words of Gemma's configurations."""
        return None if self.sees_prefix else getattr(self._config, "use_bidirectional_attention", None)

    @property
    def deciding_layers(self) -> str:
        """The layers that can decide, as text."""
        return ", ".join(map(str, self._able)) or "none"

    @property
    def unable_layer(self) -> int | None:
        """The first decision layer that cannot decide."""
        return next((stage.layer for stage in self._policy.schedule if stage.layer not in self._able), None)

    @property
    def unable_kind(self) -> str | None:
        return None if self.unable_layer is None else self.kinds[self.unable_layer]

    @property
    def unranked_layer(self) -> int | None:
        """The first decision layer for which the one before cannot rank, though it should."""
        ahead = self._policy.layers_ranking_ahead
        return next((layer_idx + 1 for layer_idx in ahead if layer_idx not in self._able), None)

    @property
    def unranked_kind(self) -> str | None:
        return None if self.unranked_layer is None else self.kinds[self.unranked_layer - 1]

    @property
    def unknown_layer(self) -> int | None:
        """The first layer of a stage whose kind of attention is not known here."""
        routed = range(self._policy.stage_layers[0], self.num_layers)
        return next((layer_idx for layer_idx in routed if self.kinds[layer_idx] not in _KINDS), None)

    @property
    def freezes(self) -> bool:
        return self._policy.action == "freeze"

    @property
    def unfrozen_layer(self) -> int | None:
        """The first layer from the first decision on in which no token can be frozen."""
        routed = range(self._policy.stage_layers[0], self.num_layers)
        return next((layer_idx for layer_idx in routed if self.freezes and layer_idx not in self._able), None)

    @property
    def unfrozen_kind(self) -> str | None:
        return None if self.unfrozen_layer is None else self.kinds[self.unfrozen_layer]

    @property
    def adapter_class(self) -> str:
        return type(self._adapter).__name__

    @property
    def caches_otherwise(self) -> bool:
        """Whether keys and values of frozen tokens may be others than those that the layers themselves would cache."""
        kind = type(self._adapter)
        ranks_otherwise = kind.ranking is not Adapter.ranking and kind.rotated_keys is Adapter.rotated_keys
        projects = kind.values is not Adapter.values or all(
            hasattr(self._adapter.layers[layer_idx].self_attn, "v_proj") for layer_idx in self._able
        )
        return self.freezes and (ranks_otherwise or not projects)

    @property
    def unknown_kind(self) -> str | None:
        return None if self.unknown_layer is None else self.kinds[self.unknown_layer]

    @property
    def accepted_kinds(self) -> str:
        return ", ".join(_KINDS)

    @property
    def kinds_in_words(self) -> str:
        return ", ".join(sorted(set(self.kinds)))

    @property
    def implementation(self) -> str:
        return self._config._attn_implementation

    @property
    def accepted_formats(self) -> str:
        return ", ".join(FORMATS)

    @property
    def mask_format(self) -> str | None:
        return mask_format(self.implementation)

    @property
    def uses_flash_attention(self) -> bool:
        return is_flash_attention(self.implementation)

    def check_attention(self) -> None:
        """Check that masks can be made for the attention implementation, which a user may change at any time.

        Raises:
            NotImplementedError: they cannot.
        """
        self._form = self.mask_format
        refuse(self, ATTENTION_RULES)

    def has_windows(self, total: int) -> bool:
        """Whether a layer of a stage sees only a part of `total` tokens."""
        return self.slides and total > self._config.sliding_window

    def mask(
        self,
        layer_idx: int,
        cache,
        queries: int,
        past: int,
        total: int,
        valid: Tensor | None,
        positions: Callable[[], Tensor],
        hidden: Tensor,
    ) -> object:
        """The attention mask of a layer.

        Args:
            layer_idx: the layer.
            cache: of the call, or None.
            queries: M, its tokens that run.
            past: P, the keys that the layer has cached.
            total: tokens of the full sequence, those of the call included.
            valid: (B, P + M) bool, False at keys that hold no token; None if all do.
            positions: gives (B or 1, P + M), positions in the full sequence.
            hidden: the layer's input.
        """
        form = self._form
        assert form is not None  # checked at the start of the call
        layers = getattr(cache, "layers", ())
        cached = layers[layer_idx] if layer_idx < len(layers) else None
        if self.kinds[layer_idx] == "sliding_attention" and total > self._config.sliding_window:
            # The window is one of positions, not of rows, and the cache of such a layer may hold the last rows only.
            window = self._config.sliding_window
            if getattr(cached, "is_sliding", False):
                past = min(past, window - 1)
            keys = past + queries
            seen = positions()[:, -keys:]
            valid = valid[:, -keys:] if valid is not None else None
            return attention_mask(form, queries, past, keys, hidden, valid, seen, window)
        keys = getattr(cached, "max_cache_len", past + queries)
        return attention_mask(form, queries, past, keys, hidden, valid)

    def mask_of_places(
        self, layer_idx: int, cache, places: Tensor, past: int, rows: int, valid: Tensor | None, hidden: Tensor
    ) -> object:
        """The attention mask of a layer that caches more tokens than run in it.

        Args:
            layer_idx: the layer, of full attention.
            cache: of the call, or None.
            places: (B, M), where the tokens that run stand among those that are cached; -1 for none.
            past: P, the keys that the layer has cached before.
            rows: S, those that it caches in this call.
            valid: (B, P + S) bool, False at keys that hold no token; None if all do.
            hidden: the layer's input.
        """
        assert self._form is not None  # checked at the start of the call
        layers = getattr(cache, "layers", ())
        cached = layers[layer_idx] if layer_idx < len(layers) else None
        keys = getattr(cached, "max_cache_len", past + rows)
        places = on_device(hidden.device, places).clamp(min=0)
        return attention_mask(self._form, places.shape[1], past, keys, hidden, valid, places=places)

    def part_of_mask(
        self,
        layer_idx: int,
        cache,
        given: object,
        queries: Tensor,
        cached: Tensor,
        hidden: Tensor,
        places: Tensor | None = None,
    ) -> object:
        """The attention mask of a layer, cut out of the model's own.

        Args:
            layer_idx: the layer.
            cache: of the call, or None; it holds no tokens yet.
            given: the model's mask of the full sequence for this layer.
            queries: (B, M), positions in the full sequence of the tokens that run, -1 for none.
            cached: (B, S), those of the tokens that the layer caches in this call.
            hidden: the layer's input.
            places: (B, M), where the tokens that run stand among those; None if they are the same.
        """
        assert self._form is not None  # checked at the start of the call
        places = None if places is None else places.clamp(min=0)
        keys = self._keys(cache, layer_idx, cached.shape[1])
        return part_of_mask(self._form, given, queries, cached, keys, hidden, places)

    @staticmethod
    def _keys(cache, layer_idx: int, filled: int) -> int:
        """How many keys a layer is handed: those that are filled, or all that a cache of fixed size has room for."""
        layers = getattr(cache, "layers", ())
        return getattr(layers[layer_idx], "max_cache_len", filled) if layer_idx < len(layers) else filled
