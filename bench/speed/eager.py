"""Routing as it is commonly written: the whole attention matrix, boolean masks, and `nonzero`.

The baseline of the benchmarks. It takes one sample, like the code that it stands for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reroute_kernels.ref.rank import rotate_half


def rank_tokens(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(1, L) scores from the L x L attention of every head; `query` holds all L queries, (1, L, Hq, D)."""
    query, key = (
        rotate_half(query, cos[:, :, None], sin[:, :, None]),
        rotate_half(key, cos[:, :, None], sin[:, :, None]),
    )
    query, key = query.transpose(1, 2), key.transpose(1, 2)
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    logits = query.float() @ key.float().transpose(2, 3) * query.shape[-1] ** -0.5
    causal = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).tril()
    return logits.masked_fill(~causal, -torch.inf).softmax(dim=-1).mean(dim=1)[:, -1]


def select_tokens(scores: Tensor, pool: Tensor, pinned: Tensor, keep: int) -> Tensor:
    """(1, M) positions of the pinned tokens and the `keep` best of the pool, by a mask and `nonzero`."""
    candidates = pool[0].nonzero(as_tuple=True)[0]
    best = candidates[scores[0, candidates].topk(keep).indices]
    kept = pinned[0].clone()
    kept[best] = True
    return kept.nonzero(as_tuple=True)[0][None]


def gather_tokens(index: Tensor, *tensors: Tensor) -> list[Tensor]:
    """One indexing operation per tensor; `index` is (M,)."""
    return [tensor[:, index] for tensor in tensors]


def scatter_tokens_(full: Tensor, index: Tensor, compact: Tensor) -> Tensor:
    """A copy of the full sequence with the rows at `index` (M,) replaced."""
    full = full.clone()
    full[:, index] = compact
    return full


def norm_tokens(full: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm as modules of transformers compute it."""
    wide = full.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(full.dtype)
