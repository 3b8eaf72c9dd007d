"""vLLM's Llama, Qwen2 and Qwen3 decoders, layer by layer; they have the same parts under the same names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from vllm import envs
from vllm.distributed import get_tp_group
from vllm.model_executor.layers.linear import QKVParallelLinear, UnquantizedLinearMethod
from vllm.model_executor.models.llama import LlamaModel
from vllm.model_executor.models.qwen2 import Qwen2Model
from vllm.model_executor.models.qwen3_moe import Qwen3MoeModel

from ..attention import Attention
from ..rankings import Norm, Rotary
from .step import RoutedStep

DECODERS = (LlamaModel, Qwen2Model, Qwen3MoeModel)
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


def run_routed(
    decoder: nn.Module, positions: Tensor, hidden: Tensor, step: RoutedStep, additions: Sequence[Tensor] = ()
) -> Tensor:
    """Run a step in which a prompt with visual tokens starts.

    Args:
        decoder: one that `check_decoder` accepts.
        positions: (T,) or (3, T) rotary positions of all tokens of the step.
        hidden: (T, d), their embeddings.
        step: the state of the step, which selects tokens.
        additions: (T, d) each, added to the hidden states of all tokens after the first layers, one after each.

    Returns:
        (T, d), hidden states of all tokens after the last norm; tokens that did not run show their last.
    """
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
        if layer_idx < len(additions):
            hidden = step.add(hidden, additions[layer_idx])
    return decoder.norm(step.finish(hidden + residual))


@dataclass(frozen=True)
class LayerProjection:
    """Queries and keys of one of vLLM's layers, for the tokens of one request, as rankings ask for them.

    The rotary tensors are positions here, (1, L) or (1, L, 3).
    """

    layer: nn.Module

    def norm(self, hidden: Tensor) -> Norm | None:
        """None: vLLM has fused norms of its own."""
        return None

    def attention(
        self,
        hidden: Tensor,
        rotary: Rotary | None,
        key_mask: Tensor | None,
        positions: Tensor | None,
        states: Tensor | None,
    ) -> Attention:
        if positions is None:
            positions = torch.full((1, 1), hidden.shape[1] - 1, device=hidden.device)
        attention, rows = self.layer.self_attn, positions[0].clamp(min=0)
        query, key = self._projected(hidden, rows)
        if rotary is None:
            query, key = self._in_heads(query), self._in_heads(key)
        else:
            places = _places(rotary)
            query, key = self._rotated(places[..., rows], query), self._rotated(places, key)
        return Attention(
            query,
            key,
            key_mask=key_mask,
            query_index=positions,
            scale=attention.scaling,
        )

    def keys(self, hidden: Tensor, rotary: Rotary, states: Tensor | None) -> Tensor:
        _, key = self._projected(hidden, torch.zeros(0, dtype=torch.int64, device=hidden.device))
        return self._rotated(_places(rotary), key)

    def _projected(self, hidden: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """(Q, Hq * D) of some tokens and (L, Hkv * D) of all, normed where the layer norms its heads."""
        attention = self.layer.self_attn
        states = self.layer.input_layernorm(hidden[0])
        weights = query_and_key_weights(attention, states)
        if weights is not None:
            of_query, of_key = weights
            query, key = linear(states[rows], *of_query), linear(states, *of_key)
        else:
            projected, _ = attention.qkv_proj(states)
            query, key, _ = projected.split([attention.q_size, attention.kv_size, attention.kv_size], dim=-1)
            query, key = query[rows], key.contiguous()
        return self._normed(query, "q_norm"), self._normed(key, "k_norm")

    def _normed(self, heads: Tensor, name: str) -> Tensor:
        """(N, H * D), each head by a norm of the attention; as they are where it has none."""
        norm = getattr(self.layer.self_attn, name, None)
        return heads if norm is None else norm(self._in_heads(heads)[0]).flatten(1)

    def _rotated(self, positions: Tensor, heads: Tensor) -> Tensor:
        """(1, N, H, D) of (N, H * D), which may be written to.

        vLLM's rotary embeddings take queries with keys, and some write to both: one head of zeros goes along.
        """
        attention = self.layer.self_attn
        rotated, _ = attention.rotary_emb(positions, heads, heads.new_zeros(len(heads), attention.head_dim))
        return self._in_heads(rotated)

    def _in_heads(self, heads: Tensor) -> Tensor:
        """(1, N, H, D) of (N, H * D)."""
        return heads.view(1, len(heads), -1, self.layer.self_attn.head_dim)


def _places(rotary: tuple[Tensor, ...]) -> Tensor:
    """Positions as vLLM's rotary embeddings take them, (L,) or (3, L)."""
    (positions,) = rotary
    return positions[0].T.contiguous() if positions.ndim == 3 else positions[0]


WeightAndBias: TypeAlias = tuple[Tensor, Tensor | None]


def query_and_key_weights(attention: nn.Module, states: Tensor) -> tuple[WeightAndBias, WeightAndBias] | None:
    """The rows of a fused projection that give queries, and those that give keys; they are views.

    A rank has the rows of its own heads: queries, keys, values. Keys and values of one head may be on several ranks.

    Args:
        attention: of one of vLLM's layers.
        states: (L, d), which the projection is to take.

    Returns:
        None if rows cannot be told apart: the layer is quantized, an adapter is around it, its weight is packed or
        elsewhere (vLLM's CPU build packs it where oneDNN is there), or it is not known. Then it must be called whole.
    """
    fused, sizes = attention.qkv_proj, [attention.q_size, attention.kv_size, attention.kv_size]
    if type(fused) is not QKVParallelLinear or type(fused.quant_method) is not UnquantizedLinearMethod:
        return None
    if envs.VLLM_BATCH_INVARIANT or fused.skip_bias_add or _is_wrapped(fused):
        return None
    if not _is_plain(fused.weight, (sum(sizes), states.shape[-1]), states):
        return None
    if fused.bias is not None and not _is_plain(fused.bias, (sum(sizes),), states):
        return None
    query, key, _ = fused.weight.split(sizes)
    query_bias, key_bias, _ = (None,) * 3 if fused.bias is None else fused.bias.split(sizes)
    return (query, query_bias), (key, key_bias)


def _is_wrapped(module: nn.Module) -> bool:
    """Calling the module does other things than its class says."""
    return bool("forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks)


def _is_plain(parameter: object, shape: tuple[int, ...], like: Tensor) -> bool:
    """A parameter holds numbers one by one, of the dtype and on the device of a tensor."""
    return (
        isinstance(parameter, nn.Parameter)
        and type(parameter.data) is Tensor
        and like.is_floating_point()
        and (parameter.shape, parameter.dtype, parameter.device) == (shape, like.dtype, like.device)
    )


def over_all_ranks(scores: Tensor, reduction: str) -> Tensor:
    """Scores (1, L) by the heads of all tensor-parallel ranks, from those by this rank's; the same on every rank."""
    of_ranks = get_tp_group().all_gather(scores.contiguous(), dim=0)
    return of_ranks.amax(dim=0, keepdim=True) if reduction == "max" else of_ranks.mean(dim=0, keepdim=True)
