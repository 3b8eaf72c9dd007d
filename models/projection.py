"""Queries and keys of a layer, as rankings ask for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reroute_kernels.attention import Attention
from reroute_kernels.rankings import Norm, Rotary
from reroute_kernels.routing import on_device

from .adapter import Adapter
from .modules import Module
from .offload import onloaded
from .prefill import Prefill
from .tensor_parallel import check_heads


@dataclass(eq=False)
class LayerProjection:
    """Queries and keys of one layer, and the keys that its cache holds, as rankings ask for them."""

    adapter: Adapter
    layer_idx: int
    head_group: Any = None
    """The process group over which heads are split, if they are."""
    call: Prefill | None = None
    """The routed call whose cache holds earlier keys, if there is one."""

    @property
    def layer(self) -> Module:
        return self.adapter.layers[self.layer_idx]

    def norm(self, hidden: Tensor) -> Norm | None:
        return self.adapter.norm(self.layer, hidden)

    @torch.no_grad()
    def attention(
        self,
        hidden: Tensor,
        rotary: Rotary | None,
        key_mask: Tensor | None,
        positions: Tensor | None,
        states: Tensor | None,
    ) -> Attention:
        cos, sin = (None, None) if rotary is None else rotary
        layer = self.layer
        with onloaded(layer, layer.self_attn):
            attention = self.adapter.ranking(layer, hidden, cos, sin, key_mask, positions, states)
        check_heads(attention.query, attention.key, self.adapter.heads, self.head_group)
        call = self.call
        past = None if call is None else call.past
        if call is None or past is None or rotary is None:
            return attention
        keys = self.adapter.cached_keys(call.cache, self.layer_idx)[:, :, : past.lengths[call.stage]]
        valid = past.seen(call.stage)
        return attention._replace(
            past_key=on_device(hidden.device, keys).transpose(1, 2),
            past_mask=None if valid is None else on_device(hidden.device, valid).expand(hidden.shape[0], -1),
        )

    @torch.no_grad()
    def keys(self, hidden: Tensor, rotary: Rotary, states: Tensor | None) -> Tensor:
        layer = self.layer
        with onloaded(layer, layer.self_attn):
            if states is None:
                states = self.adapter.states(layer, hidden)
            key = self.adapter.unnormalized_keys(layer.self_attn, states)
        check_heads(None, key, self.adapter.heads, self.head_group)
        return key
