"""Linear layers of vLLM's CPU build as they are on a GPU: with oneDNN it packs their weights, and keeps none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

from torch.utils.flop_counter import FlopCounterMode
from vllm import _custom_ops
from vllm.model_executor.layers.linear import QKVParallelLinear

from reroute_kernels.vllm.decoder import LayerProjection


@contextmanager
def unpacked() -> Iterator[None]:
    """Models that are loaded in the block keep the weights of their linear layers."""
    with patch.object(_custom_ops, "_supports_onednn", False):
        yield


@contextmanager
def recorded() -> Iterator[list[dict[str, int]]]:
    """Decisions in the block: FLOPs of what each projects, those that it needs, and calls of the whole projection."""
    made, attend, project = [], LayerProjection.attention, QKVParallelLinear.forward

    def attention(projection, hidden, rotary, key_mask, positions, states):
        layer, queries = projection.layer.self_attn, 1 if positions is None else positions.shape[1]
        of = {"tokens": hidden.shape[1], "queries": queries, "whole": 0}
        of["needed"] = 2 * hidden.shape[2] * (of["tokens"] * layer.kv_size + queries * layer.q_size)

        def forward(fused, states):
            of["whole"] += fused is layer.qkv_proj
            return project(fused, states)

        with patch.object(QKVParallelLinear, "forward", forward), FlopCounterMode(display=False) as counted:
            attended = attend(projection, hidden, rotary, key_mask, positions, states)
        made.append(of | {"flops": counted.get_total_flops()})
        return attended

    with patch.object(LayerProjection, "attention", attention):
        yield made
