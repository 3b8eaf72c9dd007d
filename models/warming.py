"""Compile the kernels of a policy's decisions before the first prompt needs them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from reroute_kernels.policy import Policy
from reroute_kernels.prompt import Prompt
from reroute_kernels.routing import RoutedForward

from .adapter import Adapter
from .frozen import FrozenRows
from .layers import RoutedLayers
from .offload import onloaded
from .projection import LayerProjection

TEXT = 16
"""Text tokens of the prompts that are made up here, if they are long enough."""


def make_decisions(adapter: Adapter, policy: Policy, lengths: Iterable[int], batch_size: int) -> None:
    """Make the decisions of made-up prompts; see `reroute_kernels.warm_up`."""
    layers = RoutedLayers(adapter, policy)
    with torch.no_grad():
        for length in _representatives(lengths):
            for padded in (False, True):
                _decide(adapter, policy, layers, _prompt(adapter, length, batch_size, padded))


def _representatives(lengths: Iterable[int]) -> list[int]:
    """The shortest and the longest of the lengths between two powers of two: kernels differ by these alone."""
    classes: dict[int, list[int]] = {}
    for length in lengths:
        if isinstance(length, bool) or not isinstance(length, int):
            raise TypeError(f"lengths must be integers, got {length!r}")
        if length < 2:
            raise ValueError(f"lengths must be 2 or more, got {length}")
        classes.setdefault((length - 1).bit_length(), []).append(length)
    return sorted({choose(found) for found in classes.values() for choose in (min, max)})


def _weight(adapter: Adapter, layer: Any) -> Tensor:
    """(d,), which tells where a layer runs, and in which dtype."""
    return getattr(layer, adapter.norm_name or "post_attention_layernorm").weight


def _prompt(adapter: Adapter, length: int, batch_size: int, padded: bool) -> Prompt:
    device = _weight(adapter, adapter.layers[0]).device
    visual = torch.zeros(batch_size, length, dtype=torch.bool, device=device)
    text = min(TEXT, length // 2)
    visual[:, 1 : length - text] = True
    valid = None
    if padded:
        valid = torch.ones_like(visual)
        valid[0, -1] = False
    return Prompt(visual, valid)


def _decide(adapter: Adapter, policy: Policy, layers: RoutedLayers, prompt: Prompt) -> None:
    """Make every decision, and in place of the layers between them nothing."""
    forward = RoutedForward(policy, prompt, pad_left=layers.pad_left)
    batch, length = prompt.visual.shape
    for stage, layer_indices in enumerate(layers.stages):
        layer = adapter.layers[layer_indices.start]
        weight = _weight(adapter, layer)
        if stage == 0:
            hidden = forward.inputs = weight.new_zeros(batch, length, weight.shape[0])
            positions = torch.arange(length, device=weight.device).expand(batch, -1)
            embeddings = adapter.embeddings_at(hidden, positions)
        rotary = adapter.tables(layer, embeddings, batch)
        projection = LayerProjection(adapter, layer_indices.start)
        if layer_indices.start - 1 in policy.layers_ranking_ahead:
            forward.score(hidden, rotary, projection)
        hidden = forward.decide(hidden, rotary, projection)
        if forward.freezes(stage):
            _cache_frozen(adapter, layer, forward, hidden)
    forward.finish(hidden)


def _cache_frozen(adapter: Adapter, layer: Any, forward: RoutedForward, hidden: Tensor) -> None:
    """Make the keys and values of a layer as its attention does, and put those of frozen tokens beside them."""
    with onloaded(layer, layer.self_attn):
        states = adapter.states(layer, hidden)
        key, value = adapter.keys(layer.self_attn, states), adapter.values(layer.self_attn, states)
        FrozenRows(adapter, layer, forward.frozen(), None).update(key.transpose(1, 2), value.transpose(1, 2))
