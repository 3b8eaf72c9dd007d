"""FLOP counts of the registered operations for `torch.utils.flop_counter`; importing this module registers it.

That counter imports triton if it is installed, so this module is imported with the adapters, beside
transformers, which does the same.
"""

from __future__ import annotations

import torch
from torch.utils.flop_counter import register_flop_formula


@register_flop_formula([torch.ops.reroute_kernels.rank_tokens, torch.ops.reroute_kernels.route_tokens])
def ranking_flops(query, key, cos, sin, key_mask, query_index, past_key, *arguments, **options) -> int:
    """2 * B * Q * Hq * D * (L + P): the logits. Arguments are shapes, or None."""
    batch, queries, heads, head_dim = query
    keys = key[1] + (past_key[1] if past_key is not None else 0)
    return 2 * batch * queries * heads * head_dim * keys
