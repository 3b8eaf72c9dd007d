"""Attention masks of a compact sequence, in the form that each attention implementation takes."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from reroute_kernels.routing import on_device

FORMATS = ("eager", "flash_attention", "flex_attention", "sdpa")
"""Forms of a mask: additive, the valid keys, a BlockMask, boolean."""


@cache
def _module(name: str) -> Any:
    """A module of transformers, imported when it is needed first: an import statement takes longer each time."""
    return import_module(name)


def is_flash_attention(implementation: str) -> bool:
    """Whether transformers takes an attention implementation for a kind of flash attention."""
    return _module("transformers.utils.generic").is_flash_attention_requested(
        requested_attention_implementation=implementation
    )


def mask_format(implementation: str) -> str | None:
    """The form of the masks that transformers makes for an attention implementation, one of `FORMATS`.

    Names are looked up in transformers' registry of masks, in which kernels from the hub and users' attention functions
    stand beside its own. None if its mask has no form that is known here.
    """
    masking_utils = _module("transformers.masking_utils")
    registry = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS
    if implementation in registry:
        known = {getattr(masking_utils, f"{name}_mask"): name for name in FORMATS}
        return known.get(registry[implementation])
    # Kernels that are not loaded yet are not registered. Paged ones have no sequence that could be compacted.
    if is_flash_attention(implementation) and "|" not in implementation:
        return "flash_attention"
    return None


def _with_room(rows: Tensor | None, keys: int) -> Tensor | None:
    """The mask of cached rows, padded to `keys` columns if the cache has room left."""
    if rows is None or rows.shape[1] == keys:
        return rows
    return torch.nn.functional.pad(rows, (0, keys - rows.shape[1]))


def attention_mask(
    form: str,
    queries: int,
    past: int,
    keys: int,
    like: Tensor,
    valid: Tensor | None = None,
    positions: Tensor | None = None,
    window: int | None = None,
    places: Tensor | None = None,
):
    """Mask for queries that stand behind `past` keys, each seeing itself and the tokens before it.

    Args:
        form: one of `FORMATS`, as `mask_format` gives it.
        queries, past: their numbers.
        keys: how many keys the layer is handed: past + queries, or more if a cache has room left.
        like: a tensor with the dtype and the device of the hidden states.
        valid: (B, past + queries) bool, False at keys that hold no token; None if all do.
        positions: (B or 1, past + queries) int64, positions in the full sequence; needed with a window only.
        window: a query sees keys less than this many positions back; None for all.
        places: (B, queries) int64, where each query stands among the keys behind the past, which are more than the
            queries then; any for rows without a token. `valid` has an entry for each key. None: they are the last
            ones, in order.

    Returns:
        (B or 1, 1, queries, keys): boolean for sdpa, additive for eager, a BlockMask for flex attention; (B, keys) for
        flash attention, which is causal by itself. None if none is needed.

    Raises:
        ValueError: flash attention with a window, or with room left in the cache, or with other places.
    """
    if form == "flash_attention":
        if window is not None or keys > past + queries or places is not None:
            raise ValueError(f"flash attention takes no window and no room in the cache, got {window} and {keys} keys")
        return on_device(like.device, valid)
    sees_all = valid is None and window is None and keys == past + queries and places is None
    if sees_all and (queries == 1 or (form == "sdpa" and past == 0)):
        return None
    valid, positions = on_device(like.device, valid), on_device(like.device, positions)
    valid, positions = (_with_room(rows, keys) for rows in (valid, positions))

    def row(table: Tensor, sample: Tensor) -> Tensor:
        return sample if table.shape[0] > 1 else torch.zeros_like(sample)

    def allowed(sample: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        own = past + (query if places is None else places[row(places, sample), query])
        seen = key <= own
        if window is not None and positions is not None:
            place = row(positions, sample)
            seen = seen & (positions[place, own] - positions[place, key] < window)
        if valid is not None:
            seen = seen & valid[row(valid, sample), key]
        # A row without a token sees itself, so that no softmax is over nothing.
        return seen | (key == own)

    batch = next((rows.shape[0] for rows in (valid, positions, places) if rows is not None and rows.shape[0] > 1), 1)
    return _made(form, allowed, (batch, 1, queries, keys), like)


def part_of_mask(
    form: str, given: Any, queries: Tensor, cached: Tensor, keys: int, like: Tensor, places: Tensor | None = None
):
    """Mask of a compact sequence, cut out of the model's own mask of the full one.

    A query sees the keys that it sees in the full sequence, of those that are there.

    Args:
        form: one of `FORMATS` but flash attention, as `mask_format` gives it.
        given: the model's mask of the full sequence, in that form; (B or 1, 1, L, at least L) if it is a tensor.
        queries: (B, M) int64, positions of the queries in the full sequence, -1 for none.
        cached: (B, S) int64, those of the keys.
        keys: how many keys the layer is handed: S, or more if a cache has room left.
        like: a tensor with the dtype and the device of the hidden states.
        places: (B, M) int64, where each query stands among the keys; any for rows without a token. None: in order.

    Returns:
        (B, 1, M, keys): boolean for sdpa, additive for eager, a BlockMask for flex attention.
    """
    device = like.device
    queries, cached = on_device(device, queries), on_device(device, cached)
    places = on_device(device, places)
    cached = torch.nn.functional.pad(cached, (0, keys - cached.shape[1]), value=-1)
    rows, columns, holds = queries.clamp(min=0), cached.clamp(min=0), cached >= 0
    if form != "flex_attention":
        given = on_device(device, given)
        given = (given if given.dtype == torch.bool else given == 0)[:, 0].expand(len(rows), -1, -1)

    def allowed(sample: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        row, column = rows[sample, query], columns[sample, key]
        seen = given.mask_mod(sample, head, row, column) if form == "flex_attention" else given[sample, row, column]
        # A row without a token sees itself, so that no softmax is over nothing.
        return (seen & holds[sample, key]) | (key == (query if places is None else places[sample, query]))

    return _made(form, allowed, (len(rows), 1, rows.shape[1], keys), like)


def _made(form: str, allowed: Callable[..., Tensor], shape: tuple[int, int, int, int], like: Tensor):
    """A mask (B, 1, Q, K) of a form, from a function that tells which query sees which key."""
    batch, _, queries, keys = shape
    device = like.device
    if form == "flex_attention":
        from torch.nn.attention.flex_attention import create_block_mask

        return create_block_mask(allowed, batch, None, queries, keys, device=device)
    sample = torch.arange(batch, device=device)[:, None, None, None]
    query, key = torch.arange(queries, device=device)[:, None], torch.arange(keys, device=device)
    mask = allowed(sample, sample, query, key).expand(shape)
    if form == "sdpa":
        return mask
    return torch.zeros(shape, dtype=like.dtype, device=device).masked_fill_(~mask, torch.finfo(like.dtype).min)
