"""The layers of a decoder under a policy: which stage each is in, and what it attends to."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

from torch import Tensor

from reroute_kernels.policy import Policy

from .adapter import Adapter
from .masks import FORMATS, attention_mask, is_flash_attention, mask_format

_KINDS = ("full_attention", "sliding_attention", "linear_attention")


class RoutedLayers:
    """Properties of the routed layers that do not change from call to call.

    Args:
        adapter: of the model.
        policy: of the routing.

    Attributes:
        kinds: type of attention of each layer, in the words of transformers' configurations.
        stages: indices of the layers of each stage.
        attention: indices of the layers that cache keys.
        pad_left: whether compact rows are left-padded, as sliding-window and recurrent layers require.
        length_is_routed: whether the first layer that caches keys, whose length transformers takes for the number of
            cached tokens, lies inside a stage.
        padding_is_hidden: whether the first full-attention layer, whose cache transformers checks for padding, lies
            inside a stage.
        has_states: whether any stage contains recurrent (linear-attention) layers.

    Raises:
        ValueError: the policy names layers that do not exist.
        NotImplementedError: a layer cannot do what the policy asks of it.
    """

    def __init__(self, adapter: Adapter, policy: Policy):
        self._config = adapter.decoder.config
        self._model_class = type(adapter.model).__name__
        self.kinds = adapter.layer_types
        self._check(policy)
        layers = policy.stage_layers
        first = layers[0]
        self.stages = [range(*ends) for ends in pairwise((*layers, len(self.kinds)))]
        self.attention = [number for number, kind in enumerate(self.kinds) if kind != "linear_attention"]
        self.pad_left = any(kind != "full_attention" for kind in self.kinds[first:])
        self.length_is_routed = first <= self.attention[0]
        self.padding_is_hidden = first == self.kinds.index("full_attention")
        self.has_states = "linear_attention" in self.kinds[first:]
        self._slides = "sliding_attention" in self.kinds[first:]
        self.check_attention()

    def _check(self, policy: Policy) -> None:
        if policy.stage_layers[-1] >= len(self.kinds):
            raise ValueError(
                f"schedule must stay below layer {len(self.kinds)} of this {self._model_class}, "
                f"got layer {policy.stage_layers[-1]}"
            )
        allowed = [number for number, kind in enumerate(self.kinds) if kind == "full_attention"]
        for stage in policy.schedule:
            if stage.layer not in allowed:
                raise NotImplementedError(
                    f"schedule must decide at layers with full attention, of this {self._model_class} "
                    f"{', '.join(map(str, allowed)) or 'none'}; got layer {stage.layer} of {self.kinds[stage.layer]!r}"
                )
            if policy.ranks_by_previous_layer and stage.layer - 1 not in allowed:
                raise NotImplementedError(
                    f"schedule must decide after layers with full attention where the previous layer ranks, got layer "
                    f"{stage.layer} after one of {self.kinds[stage.layer - 1]!r}"
                )
        for number in range(policy.stage_layers[0], len(self.kinds)):
            if self.kinds[number] not in _KINDS:
                raise NotImplementedError(
                    f"layers from the first decision on must be of type {', '.join(_KINDS)}, got "
                    f"{self.kinds[number]!r} at layer {number} of this {self._model_class}"
                )

    def check_attention(self) -> None:
        """Whether masks can be made for the attention implementation, which a user may change at any time.

        Raises:
            NotImplementedError: they cannot.
        """
        implementation = self._config._attn_implementation
        if self._mask_format is None:
            raise NotImplementedError(
                f"attn_implementation must be one for which transformers makes masks of the form {', '.join(FORMATS)}, "
                f"got {implementation!r}"
            )
        if self._slides and self.uses_flash_attention:
            # A window counts rows there, and rows of a compact sequence are not neighbours.
            raise NotImplementedError(
                "attn_implementation must not be flash attention for a text model with sliding windows, "
                f"got {implementation!r}"
            )

    def has_windows(self, total: int) -> bool:
        """Whether a layer of a stage sees a part of so many tokens only."""
        return self._slides and total > self._config.sliding_window

    @property
    def uses_flash_attention(self) -> bool:
        return is_flash_attention(self._config._attn_implementation)

    @property
    def _mask_format(self) -> str | None:
        return mask_format(self._config._attn_implementation)

    def mask(
        self,
        number: int,
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
            number: the layer.
            cache: of the call, or None.
            queries: M, its tokens that run.
            past: P, the keys that the layer has cached.
            total: tokens of the full sequence, those of the call included.
            valid: (B, P + M) bool, False at keys that hold no token; None where all do.
            positions: gives (B or 1, P + M), positions in the full sequence.
            hidden: the layer's input.
        """
        form = self._mask_format
        layers = getattr(cache, "layers", ())
        cached = layers[number] if number < len(layers) else None
        if self.kinds[number] == "sliding_attention" and total > self._config.sliding_window:
            # The window is one of positions, not of rows, and the cache of such a layer may hold the last rows only.
            window = self._config.sliding_window
            if getattr(cached, "is_sliding", False):
                past = min(past, window - 1)
            keys = past + queries
            places = positions()[:, -keys:]
            valid = valid[:, -keys:] if valid is not None else None
            return attention_mask(form, queries, past, keys, hidden, valid, places, window)
        keys = getattr(cached, "max_cache_len", past + queries)
        return attention_mask(form, queries, past, keys, hidden, valid)
