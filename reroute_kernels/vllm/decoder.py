"""vLLM's Llama and Qwen2 decoders, layer by layer; both have the same parts under the same names."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from vllm.distributed import get_tp_group
from vllm.model_executor.models.llama import LlamaModel
from vllm.model_executor.models.qwen2 import Qwen2Model

from ..attention import Attention
from .step import RoutedStep

DECODERS = (LlamaModel, Qwen2Model)
_PARTS = ("qkv_proj", "rotary_emb", "q_size", "kv_size", "num_heads", "num_kv_heads", "head_dim", "scaling")


def check_decoder(decoder: nn.Module) -> None:
    """Make sure that a decoder is one that can be driven.

    Raises:
        NotImplementedError: it is not.
    """
    if not isinstance(decoder, DECODERS):
        accepted = " or ".join(each.__name__ for each in DECODERS)
        raise NotImplementedError(f"the decoder must be {accepted}, got {type(decoder).__name__}")
    for layer_idx, layer in enumerate(decoder.layers):
        missing = [part for part in _PARTS if not hasattr(layer.self_attn, part)]
        if missing:
            raise NotImplementedError(f"layer {layer_idx} must have self_attn.{missing[0]}, and has none")
        if getattr(layer.self_attn, "qk_norm", False):
            raise NotImplementedError(f"layer {layer_idx} must have no norm of queries and keys, got qk_norm")
        if layer.self_attn.attn.sliding_window is not None:
            raise NotImplementedError(
                f"layer {layer_idx} must have full attention, got a window of {layer.self_attn.attn.sliding_window}"
            )


def run_routed(decoder: nn.Module, positions: Tensor, hidden: Tensor, step: RoutedStep) -> Tensor:
    """Hidden states of all tokens of a step after the last norm, (T, d); tokens that did not run show their last."""
    # [T] or [3, T] -> [T, ...]: tokens along the first axis.
    by_token = positions.T if positions.ndim == 2 else positions
    residual = None
    for layer_idx, layer in enumerate(decoder.layers):
        if layer_idx in step.decision_layers:
            hidden = hidden if residual is None else hidden + residual
            residual = None
            combine = over_all_ranks if get_tp_group().world_size > 1 else None
            hidden, by_token = step.decide(hidden, by_token, LayerProjection(layer), combine)
            positions = by_token.T.contiguous() if by_token.ndim == 2 else by_token
        hidden, residual = layer(positions, hidden, residual)
    return decoder.norm(step.finish(hidden + residual))


@dataclass(frozen=True)
class LayerProjection:
    """Queries and keys of one of vLLM's layers, for the tokens of one request, as rankings ask for them.

    The rotary tensors are positions here, (1, L) or (1, L, 3).
    """

    layer: nn.Module

    def attention(
        self, hidden: Tensor, rotary: tuple[Tensor, ...], key_mask: Tensor | None, positions: Tensor | None
    ) -> Attention:
        query, key = self._projected(hidden, rotary)
        if positions is None:
            positions = torch.full((1, 1), hidden.shape[1] - 1, device=hidden.device)
        attention = self.layer.self_attn
        query = query.view(-1, attention.num_heads, attention.head_dim)[positions.clamp(min=0)]
        return Attention(query, key, key_mask=key_mask, query_index=positions, scale=attention.scaling)

    def keys(self, hidden: Tensor, rotary: tuple[Tensor, ...]) -> Tensor:
        return self._projected(hidden, rotary)[1]

    def _projected(self, hidden: Tensor, rotary: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """(L, Hq * D) and (1, L, Hkv, D), rotated."""
        attention = self.layer.self_attn
        (positions,) = (axes[0].T.contiguous() if axes.ndim == 3 else axes[0] for axes in rotary)
        projected, _ = attention.qkv_proj(self.layer.input_layernorm(hidden[0]))
        query, key, _ = projected.split([attention.q_size, attention.kv_size, attention.kv_size], dim=-1)
        query, key = attention.rotary_emb(positions, query.contiguous(), key.contiguous())
        return query, key.view(1, -1, attention.num_kv_heads, attention.head_dim)


def over_all_ranks(scores: Tensor, reduction: str) -> Tensor:
    """Scores (1, L) by the heads of all tensor-parallel ranks, from those by this rank's; the same on every rank."""
    of_ranks = get_tp_group().all_gather(scores.contiguous(), dim=0)
    return of_ranks.amax(dim=0, keepdim=True) if reduction == "max" else of_ranks.mean(dim=0, keepdim=True)
