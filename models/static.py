"""A prefill in fixed buffers: no shape depends on data and nothing is read from the device, as a graph requires it.

A prompt is padded on the right to the length of its bucket. The rows that fill it up hold no token: they rank nothing,
are selected by none, and stand behind all others, so that causality keeps them out. How many rows a stage runs depends
on the bucket and on the number of visual tokens alone; what a shorter prompt has less of them is cut off afterwards.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from reroute_kernels.policy import Policy
from reroute_kernels.prompt import Prompt
from reroute_kernels.routing import RoutedForward
from reroute_kernels.trace import DecisionScores

from .adapter import Adapter, cache_name
from .masks import attention_mask
from .modules import Module
from .projection import LayerProjection


class Counts(NamedTuple):
    """Numbers of each sample: its tokens, the visual ones, those of them that the first decision may select, and those
    that do not run whatever their score."""

    tokens: Sequence[int] = ()
    visual: Sequence[int] = ()
    pool: Sequence[int] = ()
    skippable: Sequence[int] = ()

    @classmethod
    def of(cls, prompt: Prompt) -> Counts:
        skippable = list(map(operator.sub, prompt.valid_counts, prompt.pinned_counts))
        return cls(prompt.valid_counts, prompt.visual_counts, prompt.pool_counts, skippable)


class PrefillKey(NamedTuple):
    """Properties of a prefill that its shapes and its code depend on.

    batch: samples; length: tokens of a row, the bucket; tokens, visual, pool, skippable: `Counts` of the samples, the
    tokens in buckets, too; padded: whether the prompt has padding of its own; features: how many layers are followed by
    an addition; dtype, device: of the hidden states; form: of the attention masks, as in masks.py; settings: names of
    the attention, of the experts and of the backend.
    """

    batch: int
    length: int
    tokens: tuple[int, ...]
    visual: tuple[int, ...]
    pool: tuple[int, ...]
    skippable: tuple[int, ...]
    padded: bool
    features: int
    dtype: torch.dtype
    device: torch.device
    form: str
    settings: tuple[str | None, ...]


@dataclass(eq=False)
class _StaticPrompt:
    """A prompt in buffers, as `RoutedForward` reads one; tensors are (B, L), `last` is (B,)."""

    length: int
    visual_counts: Sequence[int]
    pool_counts: Sequence[int]
    pinned_counts: Sequence[int]
    """At most so many: padding and fill are no tokens."""
    pool: Tensor
    pinned: Tensor
    visible: Tensor
    last: Tensor
    ranks_within: bool = False
    right_padded: bool = False
    end: None = None

    @property
    def visual(self) -> Tensor:
        return self.pool

    @property
    def unranked_counts(self) -> list[int]:
        return [0] * len(self.visual_counts)

    @property
    def most_text(self) -> int:
        return max(self.pinned_counts)


class _StaticForward(RoutedForward):
    """A routed forward whose rows may end before `lengths`, where the device alone tells.

    Args:
        policy: what to route.
        prompt: in buffers.
    """

    def __init__(self, policy: Policy, prompt: _StaticPrompt):
        super().__init__(policy, prompt)  # type: ignore[arg-type]
        self.lasts = self._last = self._last.clone()

    def is_ragged(self, stage: int) -> bool:
        return True

    def anew(self) -> _StaticForward:
        """The same before its first decision. Its counts are on the device already."""
        forward = copy.copy(self)
        forward.kept, forward.scored, forward._memory = [], [], None
        return forward

    @staticmethod
    def lasts_of(forward: RoutedForward) -> Tensor:
        """(stages, B) int64, the place of the ranking token in the rows of each stage."""
        return forward._last


class _Recorder:
    """Takes the keys and values of each layer as a cache does, and keeps the tensors as they are."""

    def __init__(self) -> None:
        self.layers: list[tuple[Tensor, Tensor]] = []

    def update(self, key: Tensor, value: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        self.layers.append((key, value))
        return key, value


@dataclass(eq=False)
class Result:
    """Output of a prefill, which the next run overwrites.

    hidden: (B, L, d), normalized; cached: keys and values (B, Hkv, L or M, D) of each layer; kept: (B, M) of each
    stage, -1 at rows without a token; scored: of each decision, None for what a reducer left; most_text: how many text
    tokens may have ranked.
    """

    hidden: Tensor
    cached: list[tuple[Tensor, Tensor]]
    kept: list[Tensor] = field(default_factory=list)
    scored: list[DecisionScores | None] = field(default_factory=list)
    most_text: int = 0

    @property
    def tensors(self) -> list[Tensor]:
        """All of them."""
        scores = [scored.scores for scored in self.scored if scored is not None]
        return [self.hidden, *(tensor for pair in self.cached for tensor in pair), *self.kept, *scores]


class StaticPrefill:
    """One prefill in buffers that are filled before each run.

    Args:
        key: what its shapes depend on.
        adapter: of the model.
        policy: what to route; None if every token runs in every layer.
        tables: of the rotary embedding of any prompt, (B or 1, L, R), for their sizes and dtypes.

    Attributes:
        result: of the latest run; None before the first one.
    """

    def __init__(self, key: PrefillKey, adapter: Adapter, policy: Policy | None, tables: Sequence[Tensor]):
        self.key = key
        self.result: Result | None = None
        self._adapter, self._policy = adapter, policy
        self._cache_name = cache_name(adapter.core)
        rows = key.batch, key.length

        def zeros(*size: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(*size, dtype=dtype, device=key.device)

        width = adapter.decoder.config.hidden_size
        self._embeds = zeros(*rows, width, dtype=key.dtype)
        self._tables = tuple(zeros(*rows, table.shape[-1], dtype=table.dtype) for table in tables)
        self._features = [zeros(*rows, width, dtype=key.dtype) for _ in range(key.features)]
        self._valid = zeros(*rows, dtype=torch.bool)
        self._prepared: _StaticForward | None = None
        if policy is not None:
            self._prepared = _StaticForward(policy, self._empty_prompt(zeros))
        self._decisions = {} if policy is None else {layer: stage for stage, layer in enumerate(policy.stage_layers)}
        self._ranks_ahead = set() if policy is None else set(policy.layers_ranking_ahead)

    def _empty_prompt(self, zeros) -> _StaticPrompt:
        key, size = self.key, (self.key.batch, self.key.length)
        return _StaticPrompt(
            length=key.length,
            visual_counts=key.visual,
            pool_counts=key.pool,
            pinned_counts=list(map(operator.sub, key.tokens, key.skippable)),
            pool=zeros(*size, dtype=torch.bool),
            pinned=zeros(*size, dtype=torch.bool),
            visible=self._valid,
            last=zeros(key.batch, dtype=torch.int64),
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers."""
        buffers = [self._embeds, *self._tables, *self._features, self._valid]
        if self._prepared is not None:
            prompt = self._prepared.prompt
            buffers += [prompt.pool, prompt.pinned]
        return sum(buffer.nbytes for buffer in buffers)

    # Filled

    def load(
        self,
        embeds: Tensor,
        tables: Sequence[Tensor],
        features: Sequence[Tensor] = (),
        valid: Tensor | None = None,
        forward: RoutedForward | None = None,
    ) -> None:
        """Fill the buffers with a prompt.

        Args:
            embeds: (B, L, d), not longer than the bucket.
            tables: (B or 1, L, R) of the rotary embedding.
            features: (B, L, d), added after the first layers.
            valid: (B, L) bool, False at padding; None without one.
            forward: that would route the prompt without a graph; None if every token runs in every layer.
        """
        length = embeds.shape[1]
        _fill(self._embeds, embeds)
        for buffers, tensors in ((self._tables, tables), (self._features, features)):
            for buffer, tensor in zip(buffers, tensors, strict=True):
                _fill(buffer, tensor)
        if valid is None:
            self._valid[:, :length] = True
            self._valid[:, length:] = False
        else:
            _fill(self._valid, valid)
        if self._prepared is not None and forward is not None:
            prompt, given = self._prepared.prompt, forward.prompt
            _fill(prompt.pool, given.pool)
            _fill(prompt.pinned, given.pinned)
            assert prompt.last is not None
            if given.last is None:
                prompt.last.fill_(length - 1)
            else:
                prompt.last.copy_(given.last)
            self._prepared.lasts.copy_(self._prepared.lasts_of(forward))

    def load_any(self) -> None:
        """Fill the buffers with some prompt of this key, to be captured before one is known."""
        key = self.key
        positions = torch.arange(key.length, device=key.device)
        pool, skippable = (torch.tensor(counts, device=key.device)[:, None] for counts in (key.pool, key.skippable))
        self._valid.fill_(True)
        if self._prepared is not None:
            prompt = self._prepared.prompt
            prompt.pool.copy_(positions < pool)
            prompt.pinned.copy_(positions >= skippable)
            assert prompt.last is not None
            prompt.last.fill_(key.length - 1)

    # Run

    @torch.no_grad()
    def run(self) -> None:
        """Run all layers on what the buffers hold, and leave the result."""
        forward = None if self._prepared is None else self._prepared.anew()
        cache = _Recorder()
        hidden, tables = self._embeds, self._tables
        mask: object = self._mask(hidden, self._valid if self.key.padded else None)
        for layer_idx, layer in enumerate(self._adapter.layers):
            if forward is not None:
                if layer_idx in self._decisions:
                    hidden, tables = self._decide(forward, layer_idx, hidden)
                    mask = self._mask(hidden, None)
                if layer_idx in self._ranks_ahead:
                    forward.score(hidden, self._tables, LayerProjection(self._adapter, layer_idx))
            hidden = self._run_layer(layer, hidden, tables, mask, cache)
            if layer_idx < self.key.features:
                feature = self._features[layer_idx]
                hidden = hidden + feature if forward is None else forward.add(hidden, feature)
        if forward is None:
            self.result = Result(self._adapter.decoder.norm(hidden), cache.layers)
        else:
            hidden = self._adapter.decoder.norm(forward.finish(hidden))
            self.result = Result(hidden, cache.layers, forward.kept, forward.scored, forward.prompt.most_text)

    def _decide(self, forward: _StaticForward, layer_idx: int, hidden: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        hidden = forward.decide(hidden, self._tables, LayerProjection(self._adapter, layer_idx))
        if forward.policy.positions == "contiguous":
            adapter, positions = self._adapter, forward.position_ids(hidden.device)
            embeddings = adapter.embeddings_at(hidden, positions)
            forward.rotary = adapter.tables(adapter.layers[0], embeddings, hidden.shape[0])
        return hidden, forward.rotary

    def _mask(self, hidden: Tensor, valid: Tensor | None) -> Any:
        queries = hidden.shape[1]
        return attention_mask(self.key.form, queries, 0, queries, hidden, valid)

    def _run_layer(
        self, layer: Module, hidden: Tensor, tables: tuple[Tensor, ...], mask: object, cache: _Recorder
    ) -> Tensor:
        # Not by `__call__`: hooks of the routing wait there for what is not captured.
        return layer.forward(
            hidden,
            attention_mask=mask,
            position_embeddings=self._adapter.position_embeddings(*tables),
            position_ids=None,
            use_cache=True,
            **{self._cache_name: cache},
        )


def tables_of(adapter: Adapter, embeds: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
    """cos and sin, (B, L, R), of tokens (B, L, d) at positions (..., B or 1, L), as the decoder makes them."""
    return adapter.tables(adapter.layers[0], adapter.decoder.rotary_emb(embeds, positions), embeds.shape[0])


def decoder_positions(adapter: Adapter, positions: Tensor | None, embeds: Tensor) -> Tensor:
    """Positions (..., B or 1, L) that a decoder rotates by, from its argument, which may be None."""
    batch, length = embeds.shape[:2]
    if positions is None:
        positions = torch.arange(length, device=embeds.device)[None]
    if adapter.position_axes == 1:
        return positions
    if positions.ndim == 2:
        return positions.expand(adapter.position_axes, batch, -1)
    return positions[-adapter.position_axes :]  # a fourth counts the tokens


def _fill(buffer: Tensor, tensor: Tensor) -> None:
    """Write (B or 1, L, ...) into the first L tokens of a buffer; the others become zero, for they run, too."""
    length = tensor.shape[1]
    buffer[:, :length] = tensor
    if length < buffer.shape[1]:
        buffer[:, length:] = 0
