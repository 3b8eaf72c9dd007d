"""The operations: what they accept, what they return, and their gradients.

Each checks its arguments and makes one registered call, see `library.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from numbers import Real
from operator import index as as_integer

import torch
from torch import Tensor

from . import library  # noqa: F401 (registers the operations)

REDUCTIONS = ("mean", "max")
ROTARY_STYLES = ("rotate_half", "interleaved")
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


def expect_one_of(**given: tuple[object, tuple]) -> None:
    """Refuse values, by the names of their arguments, that are none of those accepted."""
    for name, (value, accepted) in given.items():
        if value not in accepted:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, accepted))}, got {value!r}")


def _refused(name: str, tensor: Tensor, accepted: str) -> ValueError:
    got = f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
    return ValueError(f"{name} must be {accepted}, got {got}")


def _expect_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.layout != torch.strided:
        raise ValueError(f"{name} must be a dense tensor, got layout {value.layout}")


def _expect_flags(name: str, flags: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    _expect_tensor(name, flags)
    if flags.shape != shape or flags.dtype != torch.bool or flags.device != device:
        raise _refused(name, flags, f"{tuple(shape)} bool on {device}")


def _ranking(
    query,
    key,
    cos,
    sin,
    key_mask,
    query_index,
    past_key,
    past_mask,
    scale,
    query_reduction,
    head_reduction,
    rotary_style,
) -> tuple:
    """The arguments as the registered operations take them."""
    _expect_tensor("query", query)
    _expect_tensor("key", key)
    if query.ndim != 4 or query.dtype not in FLOATING:
        raise _refused("query", query, "(B, Q, Hq, D) float32, float16 or bfloat16")
    if key.ndim != 4 or key.dtype != query.dtype:
        raise _refused("key", key, f"(B, L, Hkv, D) {query.dtype}, as query is")
    batch, queries, heads, head_dim = query.shape
    length, kv_heads = key.shape[1:3]
    device = query.device
    if key.shape[0] != batch or key.shape[3] != head_dim or key.device != device:
        raise _refused("key", key, f"(B, L, Hkv, D) with B = {batch} and D = {head_dim} on {device}, as query is")
    if queries == 0 or head_dim == 0 or kv_heads == 0 or heads == 0 or heads % kv_heads:
        raise _refused("query", query, f"(B, Q, Hq, D) with Q and D above 0 and Hq a multiple of Hkv = {kv_heads}")
    if (cos is None) != (sin is None):
        raise ValueError("cos and sin must be given together, got only one of them")
    if cos is not None:
        _check_table("cos", cos, batch, length, head_dim, device)
        _check_table("sin", sin, batch, length, head_dim, device)
        if sin.shape != cos.shape:
            raise _refused("sin", sin, f"{tuple(cos.shape)}, as cos is")
    if key_mask is not None:
        _expect_flags("key_mask", key_mask, (batch, length), device)
    if query_index is not None:
        _expect_tensor("query_index", query_index)
        if query_index.shape != (batch, queries) or query_index.dtype != torch.int64 or query_index.device != device:
            raise _refused("query_index", query_index, f"({batch}, {queries}) int64 on {device}")
    elif queries > length:
        raise ValueError(f"query must have at most L = {length} queries where query_index is None, got {queries}")
    if past_key is not None:
        _expect_tensor("past_key", past_key)
        if (
            past_key.ndim != 4
            or past_key.shape[0] != batch
            or past_key.shape[2:] != key.shape[2:]
            or past_key.dtype != key.dtype
            or past_key.device != device
        ):
            raise _refused(
                "past_key", past_key, f"({batch}, P, {kv_heads}, {head_dim}) {key.dtype} on {device}, as key is"
            )
    if past_mask is not None:
        if past_key is None:
            raise ValueError("past_mask must come with past_key, got it alone")
        _expect_flags("past_mask", past_mask, (batch, past_key.shape[1]), device)
    expect_one_of(
        query_reduction=(query_reduction, REDUCTIONS),
        head_reduction=(head_reduction, REDUCTIONS),
        rotary_style=(rotary_style, ROTARY_STYLES),
    )
    if scale is None:
        scale = head_dim**-0.5
    elif not isinstance(scale, (Real, torch.SymFloat)):
        raise TypeError(f"scale must be a real number or None, got {scale!r}")
    reductions = (query_reduction, head_reduction)
    tensors = (query, key, cos, sin, key_mask, query_index, past_key, past_mask)
    return (*tensors, float(scale), *reductions, rotary_style)


def _check_table(name: str, table: Tensor, batch: int, length: int, head_dim: int, device: torch.device) -> None:
    _expect_tensor(name, table)
    if (
        table.ndim != 3
        or table.shape[0] not in (1, batch)
        or table.shape[1] != length
        or not 0 < table.shape[2] <= head_dim
        or table.shape[2] % 2
        or table.dtype not in FLOATING
        or table.device != device
    ):
        raise _refused(
            name,
            table,
            f"({batch} or 1, {length}, R) float32, float16 or bfloat16, R even and at most {head_dim}, on {device}",
        )


def rank_tokens(
    query: Tensor,
    key: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    key_mask: Tensor | None = None,
    query_index: Tensor | None = None,
    past_key: Tensor | None = None,
    past_mask: Tensor | None = None,
    *,
    scale: float | None = None,
    query_reduction: str = "mean",
    head_reduction: str = "mean",
    rotary_style: str = "rotate_half",
) -> Tensor:
    """Score every token by the attention that a few queries pay to it.

    Only these queries' rows of the attention matrix are computed, in float32: softmax over the keys that a query sees,
    reduced over queries, then over heads. With one query and means this is the ranking of FastV (arXiv 2403.06764) and
    PyramidDrop (arXiv 2410.17247) as the Reroute paper's code runs them.

    Args:
        query: (B, Q, Hq, D), as projected; float32, float16 or bfloat16.
        key: (B, L, Hkv, D), as projected, same dtype as `query`; Hq is a multiple of Hkv, and query heads
            h * Hq / Hkv and following share key head h.
        cos, sin: (B or 1, L, R) float32, float16 or bfloat16, rotary embedding of the L positions on the first R of D
            channels, R even; entry c belongs to channel c. It rotates `key` and, by the rows that `query_index` names,
            `query`. None: both come rotated, or need no rotation.
        key_mask: (B, L) bool, True at keys that count. None: all do.
        query_index: (B, Q) int64, the place of each query among the L tokens; a query sees keys up to its own place,
            and none at -1. Places of L or more count as L - 1. None: the queries are the last Q tokens that
            `key_mask` admits.
        past_key: (B, P, Hkv, D), rotated keys of earlier turns, such as a view of a KV cache. They count in the
            softmax beside `key`, before all of its tokens, and get no scores. None: there are none.
        past_mask: (B, P) bool, True at past keys that count. None: all do.
        scale: factor on the logits. None: D ** -0.5.
        query_reduction, head_reduction: `"mean"` or `"max"`.
        rotary_style: which channels of the R form a pair: `"rotate_half"`, c and c + R / 2 (Llama, Qwen), or
            `"interleaved"`, 2c and 2c + 1 (GLM, Cohere).

    Returns:
        (B, L) float32; 0 where no query sees the key. Not differentiable. Besides it, memory for B * Q * Hq * L
        floats is used.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a shape, dtype, device or name is not accepted.
    """
    ranking = _ranking(
        query,
        key,
        cos,
        sin,
        key_mask,
        query_index,
        past_key,
        past_mask,
        scale,
        query_reduction,
        head_reduction,
        rotary_style,
    )
    with torch.no_grad():
        return torch.ops.reroute_kernels.rank_tokens(*ranking)


def _check_selection(pool, pinned, keep, length, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """`keep` as a tensor."""
    _expect_flags("pool", pool, shape, device)
    _expect_flags("pinned", pinned, shape, device)
    batch = shape[0]
    if not isinstance(keep, Tensor):
        is_several = isinstance(keep, Iterable) and not isinstance(keep, (Mapping, Set))
        values = list(keep) if is_several else [keep] * batch
        try:
            counts = [as_integer(k) for k in values if not isinstance(k, bool)]
        except TypeError:
            counts = []
        if len(counts) != len(values):
            raise TypeError(f"keep must be an integer, integers or a tensor, got {keep!r}")
        if len(counts) != batch or any(k < 0 for k in counts):
            raise ValueError(f"keep must be an integer of 0 or more, or {batch} of them, got {keep!r}")
        keep = torch.tensor([min(k, 2**63 - 1) for k in counts], dtype=torch.int64, device=device)
    if keep.shape != (batch,) or keep.dtype not in (torch.int32, torch.int64) or keep.device != device:
        raise _refused("keep", keep, f"({batch},) int32 or int64 on {device}")
    if isinstance(length, bool) or not isinstance(length, (int, torch.SymInt)):
        raise TypeError(f"length must be an integer, got {length!r}")
    if not 0 <= length < 2**63:
        raise ValueError(f"length must be 0 or more, and below 2**63, got {length}")
    return keep


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
            transfer, and a negative one counts as 0. Where a pool is smaller than K, all of it is selected.
        length: M, the columns of the result. Choose it as large as the longest row, pinned tokens + K: places beyond
            M are cut off.

    Returns:
        (B, M) int64, the kept index: ascending positions, then -1 in the rows of samples with fewer.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a shape, dtype, device or number is not accepted.
    """
    _expect_tensor("scores", scores)
    if scores.ndim != 2 or scores.dtype != torch.float32:
        raise _refused("scores", scores, "(B, L) float32")
    keep = _check_selection(pool, pinned, keep, length, scores.shape, scores.device)
    return torch.ops.reroute_kernels.select_tokens(scores, pool, pinned, keep, length)


def _check_rows(tensors, batch: int, length: int | None, device: torch.device) -> None:
    for i, tensor in enumerate(tensors):
        _expect_tensor(f"tensors[{i}]", tensor)
        if length is None and tensor.ndim >= 2:
            length = tensor.shape[1]
        if (
            tensor.ndim < 2
            or tensor.shape[0] != batch
            or tensor.shape[1] != length
            or tensor.dtype not in COPYABLE
            or tensor.device != device
        ):
            raise _refused(
                f"tensors[{i}]",
                tensor,
                f"(B, L, ...) with B = {batch} and one L for all of them, on {device}, of dtype {_COPYABLE_NAMES}",
            )


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
    _expect_tensor("index", index)
    if not tensors:
        raise ValueError("tensors must hold at least one tensor, got none")
    if index.ndim != 2 or index.dtype != torch.int64:
        raise _refused("index", index, "(B, M) int64")
    _check_rows(tensors, index.shape[0], None, index.device)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return _Gather.apply(index, *tensors)
    return tuple(torch.ops.reroute_kernels.gather_tokens(index, tensors))


def route_tokens(
    query: Tensor,
    key: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    key_mask: Tensor | None = None,
    query_index: Tensor | None = None,
    past_key: Tensor | None = None,
    past_mask: Tensor | None = None,
    *,
    scale: float | None = None,
    query_reduction: str = "mean",
    head_reduction: str = "mean",
    rotary_style: str = "rotate_half",
    pool: Tensor,
    pinned: Tensor,
    keep: int | Sequence[int] | Tensor,
    length: int,
    tensors: Sequence[Tensor] = (),
    return_scores: bool = False,
) -> tuple[Tensor, tuple[Tensor, ...]] | tuple[Tensor, tuple[Tensor, ...], Tensor]:
    """Make a whole decision in one call: rank the tokens, select those that run, and compact what belongs to them.

    Equals `rank_tokens`, `select_tokens` and `gather_tokens` one after the other, bit for bit, in a single registered
    call: four launches for at most 4,096 tokens, else eight, the one that compacts included. To find the queries by
    `key_mask`, where `query_index` is None, takes a few more. Differentiable in `tensors`.

    Args:
        query, key, cos, sin, key_mask, query_index, past_key, past_mask, scale, query_reduction, head_reduction,
            rotary_style: as in `rank_tokens`.
        pool, pinned, keep, length: as in `select_tokens`.
        tensors: each (B, L, ...), as in `gather_tokens`; may be none.
        return_scores: also return what `rank_tokens` does. It is computed anyway, and costs nothing.

    Returns:
        (B, M) int64, the kept index, and a tuple of one contiguous (B, M, ...) tensor for each of `tensors`; then, if
        asked for, (B, L) float32, the scores.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a shape, dtype, device, name or number is not accepted.
    """
    ranking = _ranking(
        query,
        key,
        cos,
        sin,
        key_mask,
        query_index,
        past_key,
        past_mask,
        scale,
        query_reduction,
        head_reduction,
        rotary_style,
    )
    batch, total = key.shape[:2]
    keep = _check_selection(pool, pinned, keep, length, (batch, total), key.device)
    if isinstance(tensors, Tensor) or not isinstance(tensors, Sequence):
        raise TypeError(f"tensors must be a sequence of tensors, got {type(tensors).__name__}")
    _check_rows(tensors, batch, total, key.device)
    needs_gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    with torch.no_grad():
        index, compact, scores = torch.ops.reroute_kernels.route_tokens(
            *ranking, pool, pinned, keep, length, () if needs_gradient else tensors
        )
    result = index, _Gather.apply(index, *tensors) if needs_gradient else tuple(compact)
    return (*result, scores) if return_scores else result


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
    _expect_tensor("full", full)
    _expect_tensor("index", index)
    _expect_tensor("compact", compact)
    if full.ndim < 2 or full.dtype not in COPYABLE:
        raise _refused("full", full, f"(B, L, ...) of dtype {_COPYABLE_NAMES}")
    if index.ndim != 2 or index.shape[0] != full.shape[0] or index.dtype != torch.int64 or index.device != full.device:
        raise _refused("index", index, f"({full.shape[0]}, M) int64 on {full.device}")
    shape = (*index.shape, *full.shape[2:])
    if compact.shape != shape or compact.dtype != full.dtype or compact.device != full.device:
        raise _refused("compact", compact, f"{tuple(shape)} {full.dtype} on {full.device}")
    if not torch.compiler.is_compiling() and full.is_neg():
        raise ValueError("full must not be a lazily negated view, got one: write to a copy of it")
    if torch.is_grad_enabled() and (full.requires_grad or compact.requires_grad):
        return _Scatter.apply(full, index, compact)
    torch.ops.reroute_kernels.scatter_tokens_(full, index, compact)
    return full
