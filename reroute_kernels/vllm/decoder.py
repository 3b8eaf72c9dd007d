"""vLLM's Llama and Qwen2 decoders, layer by layer; both have the same parts under the same names."""

from __future__ import annotations

from functools import partial

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
    for number, layer in enumerate(decoder.layers):
        missing = [part for part in _PARTS if not hasattr(layer.self_attn, part)]
        if missing:
            raise NotImplementedError(f"layer {number} must have self_attn.{missing[0]}, and has none")
        if getattr(layer.self_attn, "qk_norm", False):
            raise NotImplementedError(f"layer {number} must have no norm of queries and keys, got qk_norm")
        if layer.self_attn.attn.sliding_window is not None:
            raise NotImplementedError(
                f"layer {number} must have full attention, got a window of {layer.self_attn.attn.sliding_window}"
            )


def run_routed(decoder: nn.Module, positions: Tensor, hidden: Tensor, step: RoutedStep) -> Tensor:
    """The hidden states of all tokens of a step behind the last norm, (T, d); what did not run shows its last one."""
    # [T] or [3, T] -> [T, ...]: what is per token comes first.
    tables = positions.T if positions.ndim == 2 else positions
    residual = None
    for number, layer in enumerate(decoder.layers):
        if number in step.decision_layers:
            hidden = hidden if residual is None else hidden + residual
            residual = None
            combine = over_all_ranks if get_tp_group().world_size > 1 else None
            hidden, tables = step.decide(hidden, tables, partial(project, layer), combine)
            positions = tables.T.contiguous() if tables.ndim == 2 else tables
        hidden, residual = layer(positions, hidden, residual)
    return decoder.norm(step.finish(hidden + residual))


def project(
    layer: nn.Module,
    hidden: Tensor,
    tables: tuple[Tensor, ...],
    key_mask: Tensor | None = None,
    places: Tensor | None = None,
    keys_alone: bool = False,
) -> Attention | Tensor:
    """Attention that scores the tokens of one request by a layer's own weights; with `keys_alone` the keys.

    Args:
        layer: that decides.
        hidden: (1, L, d).
        tables: its positions, (1, L) or (1, L, 3).
        key_mask: (1, L) bool, or None.
        places: (1, Q), the queries, -1 where there is none; None for the last token alone.
        keys_alone: whether only the key is asked for.
    """
    attention = layer.self_attn
    (positions,) = (table[0].T.contiguous() if table.ndim == 3 else table[0] for table in tables)
    projected, _ = attention.qkv_proj(layer.input_layernorm(hidden[0]))
    query, key, _ = projected.split([attention.q_size, attention.kv_size, attention.kv_size], dim=-1)
    query, key = attention.rotary_emb(positions, query.contiguous(), key.contiguous())
    key = key.view(1, -1, attention.num_kv_heads, attention.head_dim)
    if keys_alone:
        return key
    if places is None:
        places = torch.full((1, 1), hidden.shape[1] - 1, device=hidden.device)
    query = query.view(-1, attention.num_heads, attention.head_dim)[places.clamp(min=0)]
    return Attention(query, key, key_mask=key_mask, query_index=places, scale=attention.scaling)


def over_all_ranks(scores: Tensor, reduction: str) -> Tensor:
    """Scores (1, L) by the heads of all tensor-parallel ranks, from those by this rank's; the same on every rank."""
    of_ranks = get_tp_group().all_gather(scores.contiguous(), dim=0)
    return of_ranks.amax(dim=0, keepdim=True) if reduction == "max" else of_ranks.mean(dim=0, keepdim=True)
