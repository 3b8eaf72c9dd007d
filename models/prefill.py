"""States of a routed call: a prompt on its way through the layers, and new tokens on a cache that one filled."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial

import torch
from torch import Tensor

from reroute_kernels import ops
from reroute_kernels.routing import RoutedForward, on_device

from .adapter import cache_of
from .cached import CachedPrompt, CacheState, begin_record, set_record
from .layers import RoutedLayers


class Prefill:
    """A routed prompt on its way through the layers.

    Args:
        layers: of the decoder.
        forward: the routed prefill.
        past: contents of the cache before, or None.
        generates: whether `generate` makes the call.
    """

    def __init__(self, layers: RoutedLayers, forward: RoutedForward, past: CacheState | None, generates: bool):
        self.forward = forward
        self.past = past
        self.generates = generates
        self.cache = None
        self.finished = False
        self.layer_features: list[Tensor] = []  # (B, L, d), added after the first layers
        self.position_embeddings: dict[str, object] = {}  # of the stage, by kind of layer
        self._layers = layers
        self._last_position: Tensor | None = None
        self._masks: dict[int, object] = {}

    @property
    def stage(self) -> int:
        """Index of the stage that runs, or of the next one before its decision is made."""
        return len(self.forward.kept)

    def mask(self, stage: int, layer_idx: int, hidden: Tensor, given: object) -> object:
        """The mask of a layer that is handed `hidden`; all layers of a stage and a kind share one.

        given: the model's mask of the full sequence for this layer.
        """
        group = self._layers.groups[layer_idx]
        if group not in self._masks:
            self._masks[group] = self._new_mask(stage, layer_idx, hidden, given)
        return self._masks[group]

    def _new_mask(self, stage: int, layer_idx: int, hidden: Tensor, given: object) -> object:
        forward, past, layers = self.forward, self.past, self._layers
        if layers.sees_prefix and given is None:
            length = forward.prompt.length
            given = torch.ones(1, 1, length, length, dtype=torch.bool, device=hidden.device)
        if layers.cuts_masks and given is not None:
            cached, _ = forward.cached(stage)
            places = forward.frozen().places if forward.freezes(stage) else None
            return layers.part_of_mask(layer_idx, self.cache, given, forward.kept[stage], cached, hidden, places)
        if forward.freezes(stage):
            return self._mask_of_places(stage, layer_idx, hidden)
        kept, ragged = forward.kept[stage], forward.is_ragged(stage)
        # Rows without a token that stand after all others are kept out by causality alone.
        own = kept >= 0 if ragged and forward.pad_left else None
        if layers.kinds[layer_idx] == "linear_attention":
            return own
        queries, total = hidden.shape[1], forward.prompt.length
        if past is None:
            return layers.mask(layer_idx, self.cache, queries, 0, total, own, lambda: kept, hidden)
        valid, positions = past.extended(stage, past.seen(stage), kept, ragged)
        before = past.lengths[stage]
        return layers.mask(
            layer_idx, self.cache, queries, before, past.length + total, valid, lambda: positions, hidden
        )

    def _mask_of_places(self, stage: int, layer_idx: int, hidden: Tensor) -> object:
        """The mask of a layer in which frozen tokens are cached beside those that run."""
        forward, past = self.forward, self.past
        cached, ragged = forward.cached(stage)
        valid = cached >= 0 if ragged else None
        if past is not None:
            valid, _ = past.extended(stage, past.seen(stage), cached, ragged)
        before = 0 if past is None else past.lengths[stage]
        places, rows = forward.frozen().places, cached.shape[1]
        return self._layers.mask_of_places(layer_idx, self.cache, places, before, rows, valid, hidden)

    def of_tokens(self, stage: int, values: Tensor | None) -> Tensor | None:
        """Entries (B, M, ...) of the tokens that run in a stage, of those (B, L, ...) of the full sequence.

        Those at padding are any; None stays None.
        """
        if values is None:
            return None
        kept = on_device(values.device, self.forward.kept[stage])
        return values.gather(1, kept.clamp(min=0)) if values.ndim == 2 else ops.gather_tokens(kept, values)[0]

    def fill(self, cache) -> None:
        """Begin a stage, whose layers fill a cache. Rows left there by a failed call are not mistaken for a prompt."""
        self.cache = cache
        if cache is not None:
            begin_record(cache)

    def note_positions(self, positions: Tensor | None) -> None:
        """Record the last token's position if later calls cannot infer it.

        They cannot if the cache whose length transformers reads is routed, or if the prompt is right-padded.

        Args:
            positions: position_ids of the decoder, (..., B or 1, L), or None if they count from its cache on.
        """
        prompt = self.forward.prompt
        if not prompt.right_padded and not self._layers.length_is_routed:
            return
        batch, device = prompt.visual.shape[0], prompt.visual.device
        if positions is None:
            positions = torch.arange(prompt.length, device=device)[None] + (self.past.length if self.past else 0)
        positions = positions.expand(*positions.shape[:-2], batch, -1)
        if prompt.end is None:
            last = positions[..., -1:]
        else:
            index = prompt.end.clamp(min=0)[:, None].expand(*positions.shape[:-1], 1)
            last = positions.gather(-1, index)
        if positions.ndim == 3 and not (self.generates and prompt.right_padded):
            # Positions on three axes: later tokens stand behind the furthest one (a fourth axis counts the tokens). In
            # `generate`, which adds one on each axis, they stand behind the last token.
            axes = positions[-3:]
            if prompt.valid is not None:
                axes = axes.masked_fill(~prompt.valid, 0)
            furthest = axes.amax(dim=(0, 2))[None, :, None].expand(3, -1, -1)
            last = torch.cat([last[:-3], furthest])
        self._last_position = last

    def record(self) -> None:
        """Leave the record that later calls need with the cache."""
        self.finished = True
        if self.cache is not None:
            set_record(self.cache, CachedPrompt.of(self.forward, self.past, self._last_position))


class Continuation:
    """New tokens on a cache that a routed prompt filled.

    Args:
        layers: of the decoder.
        prompt: record of the routed prompt in the cache.
        batch: samples of the call.
        queries: new tokens of the call.
        new_tokens: after the prompt, those of the call included.
        mask: (batch, all tokens), False at padding; None without one.
        has_positions: whether the caller gave position_ids.
    """

    def __init__(
        self,
        layers: RoutedLayers,
        prompt: CachedPrompt,
        batch: int,
        queries: int,
        new_tokens: int,
        mask: Tensor | None,
        has_positions: bool,
    ):
        self._layers = layers
        self._prompt = prompt
        self._batch = batch
        self._queries = queries
        self._new_tokens = new_tokens
        self._mask = mask
        self._has_positions = has_positions
        self._masks: dict[int, object] = {}
        self._embeddings: dict[int, object] = {}

    @cached_property
    def _visible(self) -> Tensor | None:
        """(batch, all tokens) bool, False at padding; None without one. Most calls do not need it."""
        return None if self._mask is None else self._mask.bool()

    def mask(self, stage: int, layer_idx: int, hidden: Tensor, kwargs: dict) -> object:
        """The mask of a layer that is handed `hidden` and `kwargs`; all layers of a stage and a kind share one."""
        group = self._layers.groups[layer_idx]
        if group in self._masks:
            return self._masks[group]
        if self._layers.kinds[layer_idx] == "linear_attention":
            mask = kwargs.get("attention_mask")  # of the new tokens alone
        else:
            if kwargs.get("attention_mask") is None and not self._layers.padding_is_hidden:
                self._mask = None  # the model looked for padding and found none
            past = self._prompt.past
            mask = self._layers.mask(
                layer_idx,
                cache_of(kwargs),
                self._queries,
                past.lengths[stage] + self._new_tokens - self._queries,
                past.length + self._new_tokens,
                self._prompt.valid_keys(stage, self._batch, self._visible, self._new_tokens),
                partial(self._prompt.key_positions, stage, self._batch, self._new_tokens),
                hidden,
            )
        self._masks[group] = mask
        return mask

    def position_ids(self, given: Tensor | None) -> Tensor | None:
        """Positions of the new tokens, (..., batch, queries), if those of the caller must be replaced; else None."""
        last = self._prompt.last_position
        if last is None or (self._has_positions and not self._prompt.right_padded):
            return None
        last = last.repeat_interleave(self._batch // self._prompt.batch, dim=-2)
        if given is not None and given.ndim == last.ndim == 3:
            last = last[last.shape[0] - given.shape[0] :]
        if last.ndim == 2 and not self._prompt.right_padded:
            # A model with one axis that is given no positions counts the tokens in its cache, padding included.
            later = (
                self._layers.first_position
                + self._prompt.past.length
                + torch.arange(self._new_tokens, device=last.device)
            )
            return later[None, -self._queries :].expand(self._batch, -1)
        return last + 1 + self._offsets(last.device)

    def position_embeddings(self, stage: int, layer_idx: int, embeddings_at: Callable[[Tensor], object]) -> object:
        """Those of a layer whose stage numbers its tokens from 0; `embeddings_at` takes positions (batch, queries)."""
        group = self._layers.groups[layer_idx]
        if group not in self._embeddings:
            rows = self._prompt.rows[stage].repeat_interleave(self._batch // self._prompt.batch)
            self._embeddings[group] = embeddings_at(rows[:, None] + self._offsets(rows.device))
        return self._embeddings[group]

    def _offsets(self, device: torch.device) -> Tensor:
        """(queries,) or (batch, queries), how many tokens stand between the prompt and each new one."""
        if self._visible is None:
            offsets = torch.arange(self._new_tokens, device=device)
        else:
            later = self._visible[:, self._prompt.past.length :]
            offsets = (later.to(device).cumsum(dim=1) - 1).clamp(min=0)
        return offsets[..., -self._queries :]
