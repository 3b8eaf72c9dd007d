"""Score tokens by the attention that a few queries pay to them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..attention import Attention, takes_attention
from ..checks import check_ranking
from ..precision import full_precision

# Tokens whose keys are rotated at a time, so that no rotated copy of all keys is made.
TILE = 512


def last_queries(key: Tensor, key_mask: Tensor | None, queries: int) -> Tensor:
    """Positions of each sample's last valid tokens, ascending: (B, Q) int64; -1 if a sample has fewer."""
    batch, length = key.shape[:2]
    positions = torch.arange(length, device=key.device)
    if key_mask is None:
        return positions[length - queries :].expand(batch, queries)
    return torch.where(key_mask, positions, -1).topk(queries, dim=1).values.flip(1)


def rotate_half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of channel pairs (c, c + R / 2), on the first R of D channels.

    x: (..., D); cos, sin: (..., R), broadcastable to x.
    """
    rotary = cos.shape[-1]
    return _rotate(x, cos, sin, slice(rotary // 2), slice(rotary // 2, rotary))


def rotate_interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of channel pairs (2c, 2c + 1), on the first R of D channels; arguments as in `rotate_half`."""
    rotary = cos.shape[-1]
    return _rotate(x, cos, sin, slice(0, rotary, 2), slice(1, rotary, 2))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, first: slice, second: slice) -> Tensor:
    rotated = x.clone()
    rotated[..., : cos.shape[-1]] *= cos
    rotated[..., first].addcmul_(x[..., second], sin[..., first], value=-1)
    rotated[..., second].addcmul_(x[..., first], sin[..., second])
    return rotated


ROTATIONS = {"rotate_half": rotate_half, "interleaved": rotate_interleaved}


def visible_keys(
    query_index: Tensor, length: int, key_mask: Tensor | None, past_key: Tensor | None, past_mask: Tensor | None
) -> Tensor:
    """(B, Q, L + P) bool, the keys that each query sees: keys up to its own place, and keys of the past."""
    visible = torch.arange(length, device=query_index.device) <= query_index[:, :, None]
    if key_mask is not None:
        visible = visible & key_mask[:, None]
    if past_key is None:
        return visible
    past_visible = query_index[:, :, None].expand(-1, -1, past_key.shape[1]) >= 0
    if past_mask is not None:
        past_visible = past_visible & past_mask[:, None]
    return torch.cat([visible, past_visible], dim=-1)


@takes_attention
def rank_tokens(attention: Attention) -> Tensor:
    """See `reroute_kernels.ops.rank_tokens`."""
    check_ranking(attention)
    query, key, cos, sin, key_mask, query_index, past_key, past_mask, scale, *_names = attention
    batch, queries, heads, head_dim = query.shape
    length, kv_heads = key.shape[1:3]
    if batch * length == 0:
        return torch.empty(batch, length, dtype=torch.float32, device=key.device)
    # The last token of a sequence without padding sees everything.
    sees_all = queries == 1 and query_index is None and key_mask is None and past_mask is None
    if query_index is None:
        query_index = last_queries(key, key_mask, queries)

    rotate = ROTATIONS[attention.rotary_style]
    query = query.float() * (head_dim**-0.5 if scale is None else scale)
    if cos is not None and sin is not None:
        cos, sin = (table.expand(batch, -1, -1)[:, :, None] for table in (cos, sin))  # [B, L, 1, R]
        rows = query_index.clamp(0, length - 1)[:, :, None, None].expand(-1, -1, 1, cos.shape[-1])
        query = rotate(query, cos.gather(1, rows).float(), sin.gather(1, rows).float())
    # Query heads h * G ... h * G + G - 1 share key head h: [B, Hkv, Q * G, D].
    query = query.view(batch, queries, kv_heads, heads // kv_heads, head_dim).transpose(1, 2).flatten(2, 3)

    tiles = []
    for start in range(0, length, TILE):
        tile = slice(start, start + TILE)
        tile_key = key[:, tile].float()
        if cos is not None and sin is not None:
            tile_key = rotate(tile_key, cos[:, tile].float(), sin[:, tile].float())
        tiles.append(_logits(query, tile_key))
    if past_key is not None:
        past = past_key.shape[1]
        tiles += [_logits(query, past_key[:, start : start + TILE].float()) for start in range(0, past, TILE)]

    logits = tiles[0] if len(tiles) == 1 else torch.cat(tiles, dim=-1)  # [B, Hkv, Q * G, L + P]
    logits = logits.unflatten(2, (queries, -1)).transpose(1, 2).flatten(2, 3)  # [B, Q, Hq, L + P]
    hidden = logits == -torch.inf
    if not sees_all:
        hidden = hidden | ~visible_keys(query_index, length, key_mask, past_key, past_mask)[:, :, None]
        logits = logits.masked_fill(hidden, -torch.inf)
    weights = logits.softmax(dim=-1).masked_fill(hidden, 0.0)[..., :length]

    weights = weights.mean(dim=1) if attention.query_reduction == "mean" else weights.amax(dim=1)
    return weights.mean(dim=1) if attention.head_reduction == "mean" else weights.amax(dim=1)


def _logits(query: Tensor, key: Tensor) -> Tensor:
    """(B, Hkv, Q, L), products of queries (B, Hkv, Q, D) with keys (B, L, Hkv, D).

    Sample by sample, since the keys of one are read in place; those of a batch would be copied.
    """
    with full_precision(query.device):
        return torch.stack([torch.matmul(q, k.permute(1, 2, 0)) for q, k in zip(query, key, strict=True)])
