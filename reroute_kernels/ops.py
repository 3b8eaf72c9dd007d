"""The four operations: what they accept, and their registration with `torch.library`.

Each is one registered call, `torch.ops.reroute_kernels.*`, which runs on the backend that `backends.py` chooses.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from operator import index as as_integer

import torch
from torch import Tensor

from .backends import operations_for

REDUCTIONS = ("mean", "max")
FLOATING = (torch.float32, torch.float16, torch.bfloat16)
COPYABLE = (
    *FLOATING,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
)
_COPYABLE_NAMES = ", ".join(str(dtype).removeprefix("torch.") for dtype in COPYABLE)

_library = torch.library.Library("reroute_kernels", "DEF")


def _register(schema: str, function, fake) -> None:
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"reroute_kernels::{name}", fake, lib=_library)


def _rank(query, key, cos, sin, key_mask, query_index, scale, query_reduction, head_reduction):
    with _full_precision(key.device):
        return operations_for(key.device).rank_tokens(
            query,
            key,
            cos,
            sin,
            key_mask,
            query_index,
            scale=scale,
            query_reduction=query_reduction,
            head_reduction=head_reduction,
        )


def _full_precision(device):
    # Autocast would compute the reference's products in half precision.
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def _rank_fake(query, key, cos, sin, key_mask, query_index, scale, query_reduction, head_reduction):
    return key.new_empty(key.shape[:2], dtype=torch.float32)


def _select(scores, pool, pinned, keep, length):
    return operations_for(scores.device).select_tokens(scores, pool, pinned, keep, length)


def _select_fake(scores, pool, pinned, keep, length):
    return scores.new_empty((scores.shape[0], length), dtype=torch.int64)


def _gather(index, tensors):
    return list(operations_for(index.device).gather_tokens(index, *tensors))


def _gather_fake(index, tensors):
    return [tensor.new_empty((*index.shape, *tensor.shape[2:])) for tensor in tensors]


def _scatter(full, index, compact):
    operations_for(full.device).scatter_tokens_(full, index, compact)


def _scatter_fake(full, index, compact):
    return None


_register(
    "rank_tokens(Tensor query, Tensor key, Tensor? cos, Tensor? sin, Tensor? key_mask, Tensor? query_index, "
    "float scale, str query_reduction, str head_reduction) -> Tensor",
    _rank,
    _rank_fake,
)
_register(
    "select_tokens(Tensor scores, Tensor pool, Tensor pinned, Tensor keep, SymInt length) -> Tensor",
    _select,
    _select_fake,
)
_register("gather_tokens(Tensor index, Tensor[] tensors) -> Tensor[]", _gather, _gather_fake)
_register("scatter_tokens_(Tensor(a!) full, Tensor index, Tensor compact) -> ()", _scatter, _scatter_fake)


def _expect(condition: bool, name: str, tensor: Tensor, accepted: str) -> None:
    if not condition:
        got = f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
        raise ValueError(f"{name} must be {accepted}, got {got}")


def _expect_tensors(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")


def rank_tokens(
    query: Tensor,
    key: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    key_mask: Tensor | None = None,
    query_index: Tensor | None = None,
    *,
    scale: float | None = None,
    query_reduction: str = "mean",
    head_reduction: str = "mean",
) -> Tensor:
    """Score every token by the attention that a few queries pay to it.

    Only these queries' rows of the attention matrix are computed, in float32: softmax over the keys that a query sees,
    reduced over queries, then over heads. With one query and means this is the ranking of FastV (arXiv 2403.06764) and
    PyramidDrop (arXiv 2410.17247) as the Reroute paper's code runs them.

    Args:
        query: (B, Q, Hq, D), as projected; float32, float16 or bfloat16.
        key: (B, L, Hkv, D), as projected, same dtype as `query`; Hq is a multiple of Hkv, and query heads
            h * Hq / Hkv and following share key head h.
        cos, sin: (B or 1, L, R), rotary embedding of the L positions in the rotate-half form, on the first R of D
            channels, R even. It rotates `key` and, by the rows that `query_index` names, `query`. None: both come
            rotated, or need no rotation.
        key_mask: (B, L) bool, True at keys that count. None: all do.
        query_index: (B, Q) int64, the place of each query among the L tokens; a query sees keys up to its own place,
            and none at -1. Places of L or more are not checked for. None: the queries are the last Q tokens that
            `key_mask` admits.
        scale: factor on the logits. None: D ** -0.5.
        query_reduction, head_reduction: `"mean"` or `"max"`.

    Returns:
        (B, L) float32; 0 where no query sees the key. Not differentiable.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a shape, dtype, device or name is not accepted.
    """
    _expect_tensors(query=query, key=key)
    _expect(query.ndim == 4 and query.dtype in FLOATING, "query", query, "(B, Q, Hq, D) float32, float16 or bfloat16")
    _expect(key.ndim == 4 and key.dtype == query.dtype, "key", key, f"(B, L, Hkv, D) {query.dtype}, as query is")
    batch, queries, heads, head_dim = query.shape
    length, kv_heads = key.shape[1:3]
    _expect(
        key.shape[0] == batch and key.shape[3] == head_dim and key.device == query.device,
        "key",
        key,
        f"(B, L, Hkv, D) with B = {batch} and D = {head_dim} on {query.device}, as query is",
    )
    _expect(
        queries > 0 and head_dim > 0 and kv_heads > 0 and heads > 0 and heads % kv_heads == 0,
        "query",
        query,
        f"(B, Q, Hq, D) with Q and D above 0 and Hq a multiple of Hkv = {kv_heads}",
    )
    if (cos is None) != (sin is None):
        raise ValueError("cos and sin must be given together, got only one of them")
    if cos is not None:
        _expect_tensors(cos=cos, sin=sin)
        for name, table in (("cos", cos), ("sin", sin)):
            _expect(
                table.ndim == 3
                and table.shape[0] in (1, batch)
                and table.shape[1] == length
                and 0 < table.shape[2] <= head_dim
                and table.shape[2] % 2 == 0
                and table.dtype in FLOATING
                and table.shape == cos.shape
                and table.device == key.device,
                name,
                table,
                f"({batch} or 1, {length}, R) with R even and at most {head_dim}, floating point, on {key.device}",
            )
    if key_mask is not None:
        _expect_tensors(key_mask=key_mask)
        _expect_flags("key_mask", key_mask, (batch, length), key.device)
    if query_index is not None:
        _expect_tensors(query_index=query_index)
        _expect(
            query_index.shape == (batch, queries)
            and query_index.dtype == torch.int64
            and query_index.device == key.device,
            "query_index",
            query_index,
            f"({batch}, {queries}) int64 on {key.device}",
        )
    elif queries > length:
        raise ValueError(f"query must have at most L = {length} queries where query_index is None, got {queries}")
    for name, value in (("query_reduction", query_reduction), ("head_reduction", head_reduction)):
        if value not in REDUCTIONS:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, REDUCTIONS))}, got {value!r}")
    scale = head_dim**-0.5 if scale is None else float(scale)
    with torch.no_grad():
        return torch.ops.reroute_kernels.rank_tokens(
            query, key, cos, sin, key_mask, query_index, scale, query_reduction, head_reduction
        )


def _expect_flags(name: str, flags: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    _expect(
        flags.shape == shape and flags.dtype == torch.bool and flags.device == device,
        name,
        flags,
        f"{tuple(shape)} bool on {device}",
    )


def select_tokens(
    scores: Tensor, pool: Tensor, pinned: Tensor, keep: int | Sequence[int] | Tensor, length: int
) -> Tensor:
    """List the tokens that run: the pinned ones and the K best candidates of each sample.

    Exact and deterministic: ties go to the smaller position, -0.0 equals 0.0, and a NaN ranks below every number.

    Args:
        scores: (B, L) float32.
        pool: (B, L) bool, the candidates.
        pinned: (B, L) bool, tokens that run whatever their score; they are no candidates.
        keep: K, for all samples or one per sample; as a tensor (B,) of integers on the device of `scores` it costs no
            transfer. Where a pool is smaller than K, all of it is selected.
        length: M, the columns of the result. Choose it as large as the longest row, pinned tokens + K: places beyond
            M are cut off.

    Returns:
        (B, M) int64, the kept index: ascending positions, then -1 in the rows of samples with fewer.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a shape, dtype, device or number is not accepted.
    """
    _expect_tensors(scores=scores, pool=pool, pinned=pinned)
    _expect(scores.ndim == 2 and scores.dtype == torch.float32, "scores", scores, "(B, L) float32")
    _expect_flags("pool", pool, scores.shape, scores.device)
    _expect_flags("pinned", pinned, scores.shape, scores.device)
    batch = scores.shape[0]
    if not isinstance(keep, Tensor):
        values = list(keep) if isinstance(keep, Iterable) else [keep] * batch
        try:
            counts = [as_integer(k) for k in values if not isinstance(k, bool)]
        except TypeError:
            counts = []
        if len(counts) != len(values):
            raise TypeError(f"keep must be an integer, integers or a tensor, got {keep!r}")
        if len(counts) != batch or any(k < 0 for k in counts):
            raise ValueError(f"keep must be an integer of 0 or more, or {batch} of them, got {keep!r}")
        keep = torch.tensor(counts, dtype=torch.int64, device=scores.device)
    _expect(
        keep.shape == (batch,) and keep.dtype in (torch.int32, torch.int64) and keep.device == scores.device,
        "keep",
        keep,
        f"({batch},) int32 or int64 on {scores.device}",
    )
    if isinstance(length, bool) or not isinstance(length, (int, torch.SymInt)):
        raise TypeError(f"length must be an integer, got {length!r}")
    if length < 0:
        raise ValueError(f"length must be 0 or more, got {length}")
    return torch.ops.reroute_kernels.select_tokens(scores, pool, pinned, keep, length)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, index, *tensors):
        ctx.save_for_backward(index)
        ctx.length = tensors[0].shape[1]
        return tuple(torch.ops.reroute_kernels.gather_tokens(index, tensors))

    @staticmethod
    def backward(ctx, *gradients):
        (index,) = ctx.saved_tensors
        return None, *(
            scatter_tokens_(gradient.new_zeros(index.shape[0], ctx.length, *gradient.shape[2:]), index, gradient)
            if needed
            else None
            for gradient, needed in zip(gradients, ctx.needs_input_grad[1:], strict=True)
        )


def gather_tokens(index: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Compact any number of per-token tensors to the rows of a kept index, in one launch.

    Differentiable in the tensors: the gradient is a scatter.

    Args:
        index: (B, M) int64, as from `select_tokens`. Positions outside 0 ... L - 1, such as -1, give rows of zeros; a
            position appears at most once in a row.
        tensors: each (B, L, ...), of a dtype in `COPYABLE`; strided and expanded views are read in place.

    Returns:
        A tuple of one contiguous (B, M, ...) tensor for each of `tensors`.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a shape, dtype or device is not accepted, or there is nothing to gather.
    """
    _expect_tensors(index=index, **{f"tensors[{i}]": tensor for i, tensor in enumerate(tensors)})
    if not tensors:
        raise ValueError("tensors must hold at least one tensor, got none")
    _expect(index.ndim == 2 and index.dtype == torch.int64, "index", index, "(B, M) int64")
    for i, tensor in enumerate(tensors):
        _expect(
            tensor.ndim >= 2
            and tensor.shape[0] == index.shape[0]
            and tensor.shape[1] == tensors[0].shape[1]
            and tensor.dtype in COPYABLE
            and tensor.device == index.device,
            f"tensors[{i}]",
            tensor,
            f"(B, L, ...) with B = {index.shape[0]} and one L for all of them, on {index.device}, "
            f"of dtype {_COPYABLE_NAMES}",
        )
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return _Gather.apply(index, *tensors)
    return tuple(torch.ops.reroute_kernels.gather_tokens(index, tensors))


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, full, index, compact):
        ctx.save_for_backward(index)
        ctx.mark_dirty(full)
        torch.ops.reroute_kernels.scatter_tokens_(full, index, compact)
        return full

    @staticmethod
    def backward(ctx, gradient):
        (index,) = ctx.saved_tensors
        full_gradient = compact_gradient = None
        if ctx.needs_input_grad[0]:
            nothing = gradient.new_zeros(*index.shape, *gradient.shape[2:])
            full_gradient = scatter_tokens_(gradient.clone(), index, nothing)
        if ctx.needs_input_grad[2]:
            (compact_gradient,) = gather_tokens(index, gradient)
        return full_gradient, None, compact_gradient


def scatter_tokens_(full: Tensor, index: Tensor, compact: Tensor) -> Tensor:
    """Write compact rows back to their places in the full sequence, in place.

    Differentiable in `full` and `compact`: the gradient is a gather.

    Args:
        full: (B, L, ...) of a dtype in `COPYABLE`, written in place; no two elements may share memory.
        index: (B, M) int64, as from `select_tokens`. Rows at positions outside 0 ... L - 1, such as -1, are skipped;
            a position appears at most once in a row.
        compact: (B, M, ...), same trailing shape, dtype and device as `full`.

    Returns:
        `full`.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a shape, dtype, device or memory layout is not accepted.
    """
    _expect_tensors(full=full, index=index, compact=compact)
    _expect(full.ndim >= 2 and full.dtype in COPYABLE, "full", full, f"(B, L, ...) of dtype {_COPYABLE_NAMES}")
    _expect(
        index.ndim == 2
        and index.shape[0] == full.shape[0]
        and index.dtype == torch.int64
        and index.device == full.device,
        "index",
        index,
        f"({full.shape[0]}, M) int64 on {full.device}",
    )
    shape = (*index.shape, *full.shape[2:])
    _expect(
        compact.shape == shape and compact.dtype == full.dtype and compact.device == full.device,
        "compact",
        compact,
        f"{tuple(shape)} {full.dtype} on {full.device}",
    )
    if any(stride == 0 and size > 1 for stride, size in zip(full.stride(), full.shape, strict=True)):
        raise ValueError(
            f"full must not be an expanded view, got strides {full.stride()} for shape {tuple(full.shape)}"
        )
    if torch.is_grad_enabled() and (full.requires_grad or compact.requires_grad):
        return _Scatter.apply(full, index, compact)
    torch.ops.reroute_kernels.scatter_tokens_(full, index, compact)
    return full
