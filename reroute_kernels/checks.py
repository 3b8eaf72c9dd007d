"""Which tensors the operations accept: shapes, dtypes and devices, checked once a call, right before memory is touched.

Every backend's function checks its arguments, and so do the functions that give the compiler the shapes of results. So
a call by `torch.ops.reroute_kernels.*` from compiled code, or of `rk.triton.*`, reads and writes within its tensors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .attention import Attention
from .memory import Memory

REDUCTIONS = ("mean", "max")
QUERY_REDUCTIONS = ("mean", "sum")
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
    """Refuse values that are not among the accepted ones, by the names of their arguments."""
    for name, (value, accepted) in given.items():
        if value not in accepted:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, accepted))}, got {value!r}")


def _refused(name: str, tensor: Tensor, accepted: str) -> ValueError:
    got = f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
    return ValueError(f"{name} must be {accepted}, got {got}")


def expect_tensor(name: str, value: object) -> None:
    """Refuse values that are no dense tensor.

    Raises:
        TypeError: it is none.
        ValueError: its layout is another.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.layout != torch.strided:
        raise ValueError(f"{name} must be a dense tensor, got layout {value.layout}")


def check_flags(name: str, flags: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    """Refuse values that are no mask of a shape on a device."""
    if flags.shape != shape or flags.dtype != torch.bool or flags.device != device:
        raise _refused(name, flags, f"{tuple(shape)} bool on {device}")


def check_ranking(attention: Attention) -> None:
    """Refuse tensors and names that `rank_tokens` does not accept.

    Raises:
        ValueError: a shape, dtype, device or name does not fit.
    """
    expect_one_of(
        query_reduction=(attention.query_reduction, REDUCTIONS),
        head_reduction=(attention.head_reduction, REDUCTIONS),
        rotary_style=(attention.rotary_style, ROTARY_STYLES),
    )
    _check_query_and_key(attention.query, attention.key)
    _check_rotary(attention)
    _check_visibility(attention)
    _check_past(attention)


def check_saliency(query: Tensor, key: Tensor, cu_seqlens: Tensor | None, query_reduction: str) -> None:
    """Refuse tensors and names that `column_saliency` does not accept.

    Raises:
        ValueError: a shape, dtype, device or name does not fit.
    """
    expect_one_of(query_reduction=(query_reduction, QUERY_REDUCTIONS))
    _check_query_and_key(query, key)
    if cu_seqlens is None:
        return
    if (
        cu_seqlens.ndim != 1
        or cu_seqlens.shape[0] < 2
        or cu_seqlens.dtype not in (torch.int32, torch.int64)
        or cu_seqlens.device != key.device
    ):
        raise _refused("cu_seqlens", cu_seqlens, f"(S + 1,) int32 or int64 of S blocks, 1 or more, on {key.device}")
    if query.shape[1] != key.shape[1]:
        accepted = f"(B, L, Hq, D) with L = {key.shape[1]}, as key has, where cu_seqlens is given"
        raise _refused("query", query, accepted)


def check_merge(features: Tensor, assignment: Tensor, groups: int) -> None:
    """Refuse what `merge_tokens` does not accept.

    Raises:
        ValueError: a shape, dtype, device or number does not fit.
    """
    if features.ndim != 3 or features.dtype not in FLOATING:
        raise _refused("features", features, "(T, N, d) float32, float16 or bfloat16")
    shape = tuple(features.shape[:2])
    if assignment.shape != shape or assignment.dtype != torch.int64 or assignment.device != features.device:
        raise _refused("assignment", assignment, f"{shape} int64 on {features.device}")
    if groups < 0:
        raise ValueError(f"groups must be 0 or more, got {groups}")


def _check_query_and_key(query: Tensor, key: Tensor) -> None:
    if query.ndim != 4 or query.dtype not in FLOATING:
        raise _refused("query", query, "(B, Q, Hq, D) float32, float16 or bfloat16")
    if key.ndim != 4 or key.dtype != query.dtype:
        raise _refused("key", key, f"(B, L, Hkv, D) {query.dtype}, as query is")
    batch, queries, heads, head_dim = query.shape
    kv_heads, device = key.shape[2], query.device
    if key.shape[0] != batch or key.shape[3] != head_dim or key.device != device:
        raise _refused("key", key, f"(B, L, Hkv, D) with B = {batch} and D = {head_dim} on {device}, as query is")
    if queries == 0 or head_dim == 0 or kv_heads == 0 or heads == 0 or heads % kv_heads:
        raise _refused("query", query, f"(B, Q, Hq, D) with Q and D above 0 and Hq a multiple of Hkv = {kv_heads}")


def _check_rotary(attention: Attention) -> None:
    cos, sin = attention.cos, attention.sin
    if (cos is None) != (sin is None):
        raise ValueError("cos and sin must be given together, got only one of them")
    if cos is not None and sin is not None:
        batch, length, _, head_dim = attention.key.shape
        _check_table("cos", cos, batch, length, head_dim, attention.key.device)
        _check_table("sin", sin, batch, length, head_dim, attention.key.device)
        if sin.shape != cos.shape:
            raise _refused("sin", sin, f"{tuple(cos.shape)}, as cos is")


def _check_visibility(attention: Attention) -> None:
    batch, queries = attention.query.shape[:2]
    length, device, query_index = attention.key.shape[1], attention.key.device, attention.query_index
    if attention.key_mask is not None:
        check_flags("key_mask", attention.key_mask, (batch, length), device)
    if query_index is not None:
        if query_index.shape != (batch, queries) or query_index.dtype != torch.int64 or query_index.device != device:
            raise _refused("query_index", query_index, f"({batch}, {queries}) int64 on {device}")
    elif queries > length:
        raise ValueError(f"query must have at most L = {length} queries where query_index is None, got {queries}")


def _check_past(attention: Attention) -> None:
    key, past_key = attention.key, attention.past_key
    batch, _, kv_heads, head_dim = key.shape
    if past_key is not None and (
        past_key.ndim != 4
        or past_key.shape[0] != batch
        or past_key.shape[2:] != key.shape[2:]
        or past_key.dtype != key.dtype
        or past_key.device != key.device
    ):
        accepted = f"({batch}, P, {kv_heads}, {head_dim}) {key.dtype} on {key.device}, as key is"
        raise _refused("past_key", past_key, accepted)
    if attention.past_mask is not None:
        if past_key is None:
            raise ValueError("past_mask must come with past_key, got it alone")
        check_flags("past_mask", attention.past_mask, (batch, past_key.shape[1]), key.device)


def _check_table(name: str, table: Tensor, batch: int, length: int, head_dim: int, device: torch.device) -> None:
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


def check_selection(
    scores: Tensor, pool: Tensor, pinned: Tensor, keep: Tensor, length: int, memory: Memory | None = None
) -> None:
    """Refuse tensors that `select_tokens` does not accept.

    Raises:
        ValueError: a shape, dtype, device or number does not fit.
    """
    if scores.ndim != 2 or scores.dtype != torch.float32:
        raise _refused("scores", scores, "(B, L) float32")
    check_candidates(pool, pinned, keep, length, scores.shape, scores.device)
    check_memory(memory, scores.shape, scores.device)


def check_memory(memory: Memory | None, shape: tuple[int, ...], device: torch.device) -> None:
    """Refuse a memory that does not go with scores (B, L) of this shape on this device.

    Raises:
        ValueError: a shape, dtype, device or number does not fit.
    """
    if memory is None:
        return
    decay, scores, places = memory
    if not 0 <= decay < torch.inf:
        raise ValueError(f"memory.decay must be 0 or more, got {decay!r}")
    batch, length = shape
    if scores is not None and (
        scores.ndim != 2
        or scores.shape[0] != batch
        or (places is None and scores.shape[1] != length)
        or scores.dtype != torch.float32
        or scores.device != device
    ):
        columns = length if places is None else "P"
        raise _refused("memory.scores", scores, f"({batch}, {columns}) float32 on {device}")
    if places is not None:
        if scores is None:
            raise ValueError("memory.places must come with memory.scores, got them alone")
        if places.shape != (batch, length) or places.dtype != torch.int64 or places.device != device:
            raise _refused("memory.places", places, f"({batch}, {length}) int64 on {device}")


def check_candidates(
    pool: Tensor, pinned: Tensor, keep: Tensor, length: int, shape: tuple[int, ...], device: torch.device
) -> None:
    """Refuse what `select_tokens` does not accept beside scores (B, L) of this shape on this device.

    Raises:
        ValueError: a shape, dtype, device or number does not fit.
    """
    check_flags("pool", pool, shape, device)
    check_flags("pinned", pinned, shape, device)
    batch = shape[0]
    if keep.shape != (batch,) or keep.dtype not in (torch.int32, torch.int64) or keep.device != device:
        raise _refused("keep", keep, f"({batch},) int32 or int64 on {device}")
    if length < 0:
        raise ValueError(f"length must be 0 or more, got {length}")


def check_gather(index: Tensor, tensors: Sequence[Tensor], length: int | None = None) -> None:
    """Refuse tensors that `gather_tokens` does not accept.

    Args:
        index: (B, M) int64.
        tensors: each (B, L, ...).
        length: L; None: the length of the first of them.

    Raises:
        ValueError: a shape, dtype or device does not fit.
    """
    if index.ndim != 2 or index.dtype != torch.int64:
        raise _refused("index", index, "(B, M) int64")
    check_rows(tensors, index.shape[0], length, index.device)


def check_rows(tensors: Sequence[Tensor], batch: int, length: int | None, device: torch.device) -> None:
    """Refuse tensors that hold no rows of `batch` samples of one length."""
    for i, tensor in enumerate(tensors):
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


def check_scatter(full: Tensor, index: Tensor, compact: Tensor) -> None:
    """Refuse tensors that `scatter_tokens_` does not accept.

    Raises:
        ValueError: a shape, dtype or device does not fit.
    """
    if full.ndim < 2 or full.dtype not in COPYABLE:
        raise _refused("full", full, f"(B, L, ...) of dtype {_COPYABLE_NAMES}")
    if index.ndim != 2 or index.shape[0] != full.shape[0] or index.dtype != torch.int64 or index.device != full.device:
        raise _refused("index", index, f"({full.shape[0]}, M) int64 on {full.device}")
    shape = (*index.shape, *full.shape[2:])
    if compact.shape != shape or compact.dtype != full.dtype or compact.device != full.device:
        raise _refused("compact", compact, f"{tuple(shape)} {full.dtype} on {full.device}")


def check_norm(full: Tensor, index: Tensor | None, compact: Tensor | None, weight: Tensor) -> None:
    """Refuse tensors that `scatter_norm_tokens_` does not accept, but for what `check_scatter` refuses.

    Raises:
        ValueError: a shape, dtype or device does not fit, or only one of two tensors is given.
    """
    if (index is None) != (compact is None):
        raise ValueError("index and compact must be given together, got only one of them")
    if full.ndim != 3 or full.dtype not in FLOATING:
        raise _refused("full", full, "(B, L, d) float32, float16 or bfloat16")
    if weight.shape != full.shape[2:] or weight.dtype != full.dtype or weight.device != full.device:
        raise _refused("weight", weight, f"({full.shape[2]},) {full.dtype} on {full.device}, as full is")


def check_align(full: Tensor, index: Tensor, compact: Tensor, pool: Tensor) -> None:
    """Refuse tensors that `align_tokens_` does not accept.

    Raises:
        ValueError: a shape, dtype or device does not fit.
    """
    if full.ndim != 3 or full.dtype not in FLOATING:
        raise _refused("full", full, "(B, L, d) float32, float16 or bfloat16")
    check_scatter(full, index, compact)
    check_flags("pool", pool, tuple(full.shape[:2]), full.device)


def check_diverse(features: Tensor, weights: Tensor | None, keep: int, lengths: Tensor | None) -> None:
    """Refuse tensors and counts that `select_diverse` does not accept.

    Raises:
        ValueError: a shape, dtype, device or number does not fit.
    """
    _check_greedy(features, keep, lengths)
    if weights is not None:
        _check_per_token("weights", weights, features)


def check_dpp(features: Tensor, relevance: Tensor, keep: int, lengths: Tensor | None) -> None:
    """Refuse tensors and counts that `select_dpp` does not accept.

    Raises:
        ValueError: a shape, dtype, device or number does not fit.
    """
    _check_greedy(features, keep, lengths)
    _check_per_token("relevance", relevance, features)


def _check_greedy(features: Tensor, keep: int, lengths: Tensor | None) -> None:
    if features.ndim != 3 or features.dtype not in FLOATING:
        raise _refused("features", features, "(T, N, d) float32, float16 or bfloat16")
    if keep < 0:
        raise ValueError(f"keep must be 0 or more, got {keep}")
    rows, device = features.shape[0], features.device
    if lengths is not None and (
        lengths.shape != (rows,) or lengths.dtype not in (torch.int32, torch.int64) or lengths.device != device
    ):
        raise _refused("lengths", lengths, f"({rows},) int32 or int64 on {device}")


def _check_per_token(name: str, values: Tensor, features: Tensor) -> None:
    shape, device = tuple(features.shape[:2]), features.device
    if values.shape != shape or values.dtype != torch.float32 or values.device != device:
        raise _refused(name, values, f"{shape} float32 on {device}")


def check_written(full: Tensor) -> None:
    """Refuse a tensor that cannot be written row by row: one that holds an element twice, as expanded views do.

    Raises:
        ValueError: two of its elements share memory.
    """
    if _overlaps_itself(full):
        raise ValueError(
            f"full must not hold an element twice, as expanded or unfolded views do, got strides {full.stride()} "
            f"for shape {tuple(full.shape)}"
        )


def _overlaps_itself(tensor: Tensor) -> bool:
    """Whether two elements may share memory: some stride is no longer than the extent of all smaller strides."""
    if tensor.numel() == 0:
        return False
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += (size - 1) * stride
    return False
