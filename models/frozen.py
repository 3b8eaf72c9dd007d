"""Frozen tokens: they skip the queries and the MLPs of a stage, and write their keys and values in each of its layers.

A layer runs on the compact sequence, as under the other actions. Its attention hands the keys and values that it made
to a cache, and goes on with those that the cache gives back. In that place stands `FrozenRows` for the time of a call:
it makes the keys and values of the frozen tokens by the layer's own modules, puts all rows in the order of the
sequence, and passes them on to the caller's cache, if there is one. So that cache holds what an unrouted call leaves
there, row by row, and any attention that takes a mask sees all tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reroute_kernels import ops
from reroute_kernels.routing import FrozenTokens, on_device

from .adapter import CACHE_NAMES, Adapter
from .modules import Module


class FrozenRows:
    """Stands in the place of a layer's cache, and completes the rows that the layer caches.

    Args:
        adapter: of the model.
        layer: of a stage.
        tokens: that do not run there.
        cache: of the call, or None.
    """

    def __init__(self, adapter: Adapter, layer: Module, tokens: FrozenTokens, cache: Any):
        self._adapter = adapter
        self._layer = layer
        self._tokens = tokens
        self._cache = cache

    def update(self, key: Tensor, value: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        """Keys and values that the attention is to see, from those (B, Hkv, M, D) of the tokens that run.

        Further arguments are those of the cache's own method.
        """
        tokens, layer = self._tokens, self._layer
        hidden, order, *rotary = (on_device(key.device, each) for each in (tokens.hidden, tokens.order, *tokens.rotary))
        states = self._adapter.states(layer, hidden)
        keys = self._adapter.rotated_keys(layer, states, *rotary)
        values = self._adapter.values(layer.self_attn, states)
        own = key.transpose(1, 2), value.transpose(1, 2)
        together = [torch.cat(rows, dim=1) for rows in zip(own, (keys, values), strict=True)]
        key, value = (rows.transpose(1, 2) for rows in ops.gather_tokens(order, *together))
        return (key, value) if self._cache is None else self._cache.update(key, value, *args, **kwargs)


def cache_frozen(adapter: Adapter, layer: Module, tokens: FrozenTokens, kwargs: dict) -> None:
    """Have a layer cache frozen tokens, too: put `FrozenRows` in the place of the cache among its arguments."""
    name = next(name for name in CACHE_NAMES if name in kwargs)
    kwargs[name] = FrozenRows(adapter, layer, tokens, kwargs[name])
