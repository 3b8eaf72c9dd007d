"""Sum what tokens receive of an attention over its queries."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from ..checks import check_saliency
from ..precision import full_precision

# Weights of the attention that are held at a time.
WEIGHTS = 2**23


def column_saliency(
    query: Tensor,
    key: Tensor,
    cu_seqlens: Tensor | None = None,
    *,
    scale: float | None = None,
    query_reduction: str = "mean",
) -> Tensor:
    """See `reroute_kernels.ops.column_saliency`."""
    check_saliency(query, key, cu_seqlens, query_reduction)
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    saliency = torch.zeros(key.shape[:2], dtype=torch.float32, device=key.device)
    if cu_seqlens is None:
        blocks = [(slice(0, query.shape[1]), slice(0, key.shape[1]))]
    else:
        bounds = cu_seqlens.clamp(0, key.shape[1]).tolist()
        blocks = [(slice(start, end),) * 2 for start, end in pairwise(bounds)]
    for queries, keys in blocks:
        if queries.start < queries.stop and keys.start < keys.stop:
            received = _received(query[:, queries], key[:, keys], factor)
            saliency[:, keys] = received / (queries.stop - queries.start) if query_reduction == "mean" else received
    return saliency


def _received(query: Tensor, key: Tensor, factor: float) -> Tensor:
    """(B, L) float32, the sum over all queries (B, Q, Hq, D) of their attention to keys (B, L, Hkv, D)."""
    batch, _, heads, _ = query.shape
    length, kv_heads = key.shape[1:3]
    # Query heads h * G ... h * G + G - 1 share key head h: [B, Hkv, G, Q, D] and [B, Hkv, 1, D, L].
    query = query.unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4)
    key = key.float().permute(0, 2, 3, 1)[:, :, None]
    total = torch.zeros(batch, length, dtype=torch.float32, device=key.device)
    for part in query.split(max(1, WEIGHTS // max(1, batch * heads * length)), dim=3):
        with full_precision(key.device):
            logits = (part.float() * factor) @ key
        weights = logits.softmax(dim=-1).masked_fill(logits == -torch.inf, 0.0)
        total += weights.sum(dim=3).sum(dim=(1, 2))
    return total / heads
