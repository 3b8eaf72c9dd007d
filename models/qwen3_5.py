"""Qwen3.5 and Qwen3.5-MoE."""

from __future__ import annotations

from torch import Tensor, nn

from .adapter import Adapter


class Qwen3_5Adapter(Adapter):
    """`Qwen3_5ForConditionalGeneration`, `Qwen3_5MoeForConditionalGeneration`.

    Layers with linear attention stand between those with full attention, which alone can rank. The projection of the
    queries brings a gate along.
    """

    text_model_types = ("qwen3_5_text", "qwen3_5_moe_text")
    position_axes = 3
    cache_types = ("Qwen3_5DynamicCache", "Qwen3_5MoeDynamicCache")  # of transformers before 5.6

    def cached_keys(self, cache, number: int) -> Tensor:
        return cache.key_cache[number] if hasattr(cache, "key_cache") else super().cached_keys(cache, number)

    def queries(self, attention: nn.Module, states: Tensor) -> Tensor:
        query, _gate = attention.q_proj(states).unflatten(-1, (-1, 2 * attention.head_dim)).chunk(2, dim=-1)
        return attention.q_norm(query)
