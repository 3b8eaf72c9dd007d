"""The operations: their contracts, results and gradients.

Each calls a backend, which checks the tensors, see `checks.py`: directly, or by one registered call, see `library.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from contextlib import AbstractContextManager, nullcontext
from numbers import Real
from operator import index as as_integer
from types import ModuleType
from typing import Any, overload

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import library, ref
from .attention import Attention, takes_attention
from .backends import backend, forced_backend, operations_for
from .checks import (
    QUERY_REDUCTIONS,
    REDUCTIONS,
    ROTARY_STYLES,
    check_align,
    check_norm,
    expect_one_of,
    expect_tensor,
)
from .memory import Memory
from .ref.align import aligned_tokens


def _registered(attention: Attention) -> Attention:
    """The argument in the form of the registered operations, which check the tensors."""
    for name, tensor in attention.tensors().items():
        if tensor is not None or name in ("query", "key"):
            expect_tensor(name, tensor)
    # The backends check them too, but a registered operation accepts nothing but strings here.
    expect_one_of(
        query_reduction=(attention.query_reduction, REDUCTIONS),
        head_reduction=(attention.head_reduction, REDUCTIONS),
        rotary_style=(attention.rotary_style, ROTARY_STYLES),
    )
    return attention._replace(scale=_registered_scale(attention.scale, attention.query))


def _registered_scale(scale: object, query: Tensor) -> float:
    if scale is None:
        return (query.shape[-1] or 1) ** -0.5 if query.ndim else 1.0
    if not isinstance(scale, (Real, torch.SymFloat)):
        raise TypeError(f"scale must be a real number or None, got {scale!r}")
    return float(scale)


def _direct(tensors: Iterable[object], optional: Iterable[object] = ()) -> ModuleType | None:
    """The backend's operations, if nothing looks at a call on its way there; None if a registered call must be made.

    That is so under a compiler, a mode, a transform or a profiler, and with subclasses of `torch.Tensor`; a call that
    needs gradients, or with objects that are no dense tensors, takes that way as well.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.autograd._profiler_enabled():
        return None
    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack() or _differentiated_by_torch():
        return None
    records, strided, last = torch.is_grad_enabled(), torch.strided, None
    for tensor in (*tensors, *[tensor for tensor in optional if tensor is not None]):
        if type(tensor) is not Tensor or tensor.layout is not strided or (records and tensor.requires_grad):
            return None
        last = tensor
    return None if last is None or last.is_meta else operations_for(last.device)


def _is_count(length: object) -> bool:
    return type(length) is int and 0 <= length < 2**63


def _has_plain_options(attention: Attention) -> bool:
    """Whether the options of an attention are of the usual types; a backend looks at their values."""
    scale, query_reduction, head_reduction, rotary_style = attention.options()
    if scale is not None and type(scale) is not float:
        return False
    return type(query_reduction) is type(head_reduction) is type(rotary_style) is str


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
        (B, L) float32; 0 if no query sees the key. Not differentiable. Besides it, memory for B * Q * Hq * L
        floats is used.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a shape, dtype, device or name is not accepted.

    >>> query, key = torch.ones(1, 1, 2, 4), torch.zeros(1, 3, 1, 4)
    >>> key[:, 1] = 10.0  # the token that the query attends to
    >>> rank_tokens(query, key).argmax().item()
    1
    """
    attention = Attention(
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
    if _has_plain_options(attention) and (operations := _direct(attention[:2], attention.operands()[2:])) is not None:
        return operations.rank_tokens(attention)
    with torch.no_grad():
        return torch.ops.reroute_kernels.rank_tokens(*_registered(attention))


def column_saliency(
    query: Tensor,
    key: Tensor,
    cu_seqlens: Tensor | None = None,
    *,
    scale: float | None = None,
    query_reduction: str = "mean",
) -> Tensor:
    """Sum what every token receives of an attention in both directions, without the matrix of the attention.

    For each key the mean over heads, and the mean or the sum over queries, of softmax(query @ key * scale), in float32:
    the saliency that reducers take from vision towers. It takes two launches, which compute the logits twice.

    Args:
        query: (B, Q, Hq, D), as attention uses them, so rotated if it rotates; float32, float16 or bfloat16. All
            queries of a tower, or some: its class token alone, say.
        key: (B, L, Hkv, D), same dtype as `query`, rotated likewise; Hq is a multiple of Hkv, and query heads
            h * Hq / Hkv and following share key head h.
        cu_seqlens: (S + 1,) int32 or int64, ascending bounds of S blocks within the L tokens, the same in every sample:
            frames, images or windows. Then Q is L, and a query sees the keys of its own block; tokens outside of all
            blocks receive 0. None: every query sees every key.
        scale: factor on the logits. None: D ** -0.5.
        query_reduction: `"mean"`, over the queries that see a key, or `"sum"`.

    Returns:
        (B, L) float32. A logit of -inf receives 0; a NaN spreads over its block. Not differentiable. Besides it, memory
        for 2 * B * Hq * Q floats is used; on the reference also for a part of the matrix, of a fixed size.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a shape, dtype, device or name is not accepted.

    >>> query, key = torch.ones(1, 4, 2, 8), torch.zeros(1, 4, 2, 8)
    >>> key[:, 1] = 10.0  # the token that all attend to
    >>> column_saliency(query, key).round(decimals=4)
    tensor([[0., 1., 0., 0.]])
    >>> column_saliency(query, key, torch.tensor([0, 2, 4])).round(decimals=4)
    tensor([[0.0000, 1.0000, 0.5000, 0.5000]])
    """
    if type(query_reduction) is str and (scale is None or type(scale) is float):
        operations = _direct((query, key), (cu_seqlens,))
        if operations is not None:
            return operations.column_saliency(query, key, cu_seqlens, scale=scale, query_reduction=query_reduction)
    for name, tensor in (("query", query), ("key", key), ("cu_seqlens", cu_seqlens)):
        if tensor is not None or name != "cu_seqlens":
            expect_tensor(name, tensor)
    expect_one_of(query_reduction=(query_reduction, QUERY_REDUCTIONS))
    with torch.no_grad():
        return torch.ops.reroute_kernels.column_saliency(
            query, key, cu_seqlens, _registered_scale(scale, query), query_reduction
        )


def _counts(keep: object, batch: int, device: torch.device) -> Tensor:
    """`keep` as a tensor."""
    if isinstance(keep, Tensor):
        return keep
    is_several = isinstance(keep, Iterable) and not isinstance(keep, (Mapping, Set))
    values: list[Any] = list(keep) if is_several else [keep] * batch  # type: ignore[call-overload]
    try:
        counts = [as_integer(k) for k in values if not isinstance(k, bool)]
    except TypeError:
        counts = []
    if len(counts) != len(values):
        raise TypeError(f"keep must be an integer, integers or a tensor, got {keep!r}")
    if len(counts) != batch or any(k < 0 for k in counts):
        raise ValueError(f"keep must be an integer of 0 or more, or {batch} of them, got {keep!r}")
    return torch.tensor([min(k, 2**63 - 1) for k in counts], dtype=torch.int64, device=device)


def _expect_length(length: object, name: str = "length") -> None:
    if isinstance(length, bool) or not isinstance(length, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an integer, got {length!r}")
    if not 0 <= length < 2**63:
        raise ValueError(f"{name} must be 0 or more, and below 2**63, got {length}")


def _operands_of(memory: object) -> tuple[Tensor | None, ...]:
    return memory.operands() if isinstance(memory, Memory) else ()


def _is_plain(memory: object) -> bool:
    """Whether a memory is of the usual types; a backend looks at its numbers."""
    return memory is None or (type(memory) is Memory and type(memory.decay) is float)


def _registered_memory(memory: Memory | None) -> tuple[float, Tensor | None, Tensor | None]:
    """A memory in the form of the registered operations, which check the tensors."""
    if not isinstance(memory, Memory):
        raise TypeError(f"memory must be a Memory or None, got {memory!r}")
    decay = memory.decay
    if not isinstance(decay, (Real, torch.SymFloat)) or isinstance(decay, bool):
        raise TypeError(f"memory.decay must be a real number, got {decay!r}")
    for name, tensor in (("memory.scores", memory.scores), ("memory.places", memory.places)):
        if tensor is not None:
            expect_tensor(name, tensor)
    return float(decay), memory.scores, memory.places


@overload
def select_tokens(
    scores: Tensor,
    pool: Tensor,
    pinned: Tensor,
    keep: int | Sequence[int] | Tensor,
    length: int,
    memory: None = None,
) -> Tensor: ...


@overload
def select_tokens(
    scores: Tensor,
    pool: Tensor,
    pinned: Tensor,
    keep: int | Sequence[int] | Tensor,
    length: int,
    memory: Memory,
) -> tuple[Tensor, Tensor]: ...


def select_tokens(
    scores: Tensor,
    pool: Tensor,
    pinned: Tensor,
    keep: int | Sequence[int] | Tensor,
    length: int,
    memory: Memory | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """List the tokens that run: the pinned ones and the K best candidates of each sample.

    Exact and deterministic: ties go to the smaller position, -0.0 equals 0.0, and a NaN ranks below every number.

    Args:
        scores: (B, L) float32.
        pool: (B, L) bool, the candidates.
        pinned: (B, L) bool, tokens that run whatever their score; they are no candidates.
        keep: K, for all samples or one per sample; as a tensor (B,) of integers on the device of `scores` it costs no
            transfer, and a negative one counts as 0. If a pool is smaller than K, all of it is selected.
        length: M, the columns of the result. Choose it as large as the longest row, pinned tokens + K: places beyond
            M are cut off.
        memory: a `Memory` of the decision before, for scores of 0 or more. Then each score is divided by the sum of
            all in `pool`, and `memory.decay` times what is remembered of its token is added, before anything is
            selected: in the same launch. The sum is made in float64. None: the scores rank as they are.

    Returns:
        (B, M) int64, the kept index: ascending positions, then -1 in the rows of samples with fewer. With a memory
        also (B, L) float32, the scores that ranked, to be remembered; they are not differentiable.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a shape, dtype, device or number is not accepted.

    >>> scores = torch.tensor([[0.1, 0.4, 0.3, 0.2, 0.0]])
    >>> pool = torch.tensor([[True, True, True, True, False]])  # the last token is text
    >>> select_tokens(scores, pool, ~pool, keep=2, length=3)
    tensor([[1, 2, 4]])
    >>> index, shares = select_tokens(scores, pool, ~pool, keep=2, length=3, memory=Memory(0.5))
    >>> later = torch.tensor([[0.6, 0.2, 0.1, 0.1, 0.0]])
    >>> select_tokens(later, pool, ~pool, keep=2, length=3, memory=Memory(0.5, shares))[0]
    tensor([[0, 1, 4]])
    """
    if _is_count(length) and _is_plain(memory):
        operations = _direct((scores, pool, pinned, keep), _operands_of(memory))
        if operations is not None:
            return operations.select_tokens(scores, pool, pinned, keep, length, memory)
    for name, tensor in (("scores", scores), ("pool", pool), ("pinned", pinned)):
        expect_tensor(name, tensor)
    _expect_length(length)
    keep = _counts(keep, scores.shape[0] if scores.ndim else 0, scores.device)
    if memory is None:
        return torch.ops.reroute_kernels.select_tokens(scores, pool, pinned, keep, length)
    with torch.no_grad():
        return torch.ops.reroute_kernels.select_remembered(
            scores, pool, pinned, keep, length, *_registered_memory(memory)
        )


def select_diverse(
    features: Tensor, weights: Tensor | None = None, *, keep: int, lengths: Tensor | None = None
) -> Tensor:
    """Pick tokens of each row one after the other, each as far from those before as can be: greedy max-min selection.

    The entry of token j for token i is (1 - cos(i, j)) * weights[j], in float32. First comes the token of the largest
    second smallest entry, over all i, itself included with an entry of 0: that of its nearest neighbour, for weights
    of 0 or more. Then, each time, the token whose smallest entry for those picked so far is the largest. Ties go to
    the smaller place. This is the selection of DivPrune (arXiv 2503.02175), and with weights of FlashVID (arXiv
    2602.08024). All picks are one launch, after one for the nearest neighbours.

    A token of zeros has the cosine 0 to all others. Tokens whose norm or weight is not finite in float32 come last, by
    place, and count for no other. Memory grows with N, not with its square: the kernels keep the cosines of all pairs
    for the time of a call only where they are no more than the features, N at most d.

    Args:
        features: (T, N, d), tokens of T frames or images; float32, float16 or bfloat16.
        weights: (T, N) float32, of either sign. None: ones.
        keep: tokens to pick in each row.
        lengths: (T,) int32 or int64, number of tokens of each row that count, the first ones; a negative one counts as
            0. None: all N count.

    Returns:
        (T, keep) int64, the picked tokens: ascending places, then -1 in rows that have fewer. Not differentiable.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a shape, dtype, device or number is not accepted.

    >>> features = torch.tensor([[[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [-1.0, 0.0]]])
    >>> select_diverse(features, keep=3)
    tensor([[0, 2, 3]])
    """
    if _is_count(keep) and (operations := _direct((features,), (weights, lengths))) is not None:
        return operations.select_diverse(features, weights, keep=keep, lengths=lengths)
    _expect_greedy(features, keep, weights=weights, lengths=lengths)
    with torch.no_grad():
        return torch.ops.reroute_kernels.select_diverse(features, weights, keep, lengths)


def select_dpp(features: Tensor, relevance: Tensor, *, keep: int, lengths: Tensor | None = None) -> Tensor:
    """Pick tokens of each row one after the other, relevant and unlike each other: greedy MAP of a DPP.

    The determinantal point process has the kernel diag(r) S diag(r), of the relevance r and the cosines S. Each pick
    is the token that adds most to the determinant of the picked ones: r squared, times its squared distance from
    their span if all vectors have length 1. Ties go to the smaller place. This is the selection of CDPruner (arXiv
    2506.10967), in one launch for all picks, where N is at most d after one that compares all tokens, as in
    `select_diverse`; it takes memory for T * keep * N floats.

    Nothing divides by what rounding leaves: a token whose squared distance from the span is at most 1e-5 adds nothing,
    neither now nor later. So a row whose rank is lower than `keep` ends with such tokens, and with those of relevance
    0, by place. A token of zeros has the cosine 0 to all others. Tokens whose norm or relevance is not finite in
    float32 come last, by place, and count for no other.

    Args:
        features: (T, N, d), tokens of T images; float32, float16 or bfloat16.
        relevance: (T, N) float32; its sign has no effect.
        keep, lengths: as in `select_diverse`.

    Returns:
        (T, keep) int64, the picked tokens: ascending places, then -1 in rows that have fewer. Not differentiable.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a shape, dtype, device or number is not accepted.

    >>> features = torch.tensor([[[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]]])
    >>> select_dpp(features, torch.tensor([[1.0, 0.9, 0.5]]), keep=2)
    tensor([[0, 2]])
    """
    if _is_count(keep) and (operations := _direct((features, relevance), (lengths,))) is not None:
        return operations.select_dpp(features, relevance, keep=keep, lengths=lengths)
    expect_tensor("relevance", relevance)
    _expect_greedy(features, keep, lengths=lengths)
    with torch.no_grad():
        return torch.ops.reroute_kernels.select_dpp(features, relevance, keep, lengths)


def _expect_greedy(features: object, keep: object, **optional: object) -> None:
    """Refuse arguments of a greedy selection that are of the wrong type."""
    expect_tensor("features", features)
    _expect_length(keep, "keep")
    for name, tensor in optional.items():
        if tensor is not None:
            expect_tensor(name, tensor)


def _expect_tensors(tensors: Sequence[object]) -> None:
    for i, tensor in enumerate(tensors):
        expect_tensor(f"tensors[{i}]", tensor)


def _needs_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _differentiated_by_torch() -> bool:
    """Whether the derivatives must be those of PyTorch's own operators: in forward mode, and under `torch.func`.

    They do not look into a registered operation; the reference is made of operators that have all derivatives.
    """
    if torch.compiler.is_compiling():
        return False
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def _remember_backend(ctx) -> None:
    """Keep the forced backend for the backward pass, which autograd may run in another thread."""
    ctx.forced = None if torch.compiler.is_compiling() else forced_backend()


def _backend_of_forward(ctx) -> AbstractContextManager:
    return nullcontext() if ctx.forced is None else backend(ctx.forced)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, index, *tensors):
        compact = torch.ops.reroute_kernels.gather_tokens(index, tensors)
        ctx.save_for_backward(index)
        ctx.length = tensors[0].shape[1]
        _remember_backend(ctx)
        return tuple(compact)

    @staticmethod
    def backward(ctx, *gradients):
        (index,) = ctx.saved_tensors
        with _backend_of_forward(ctx):
            return None, *(
                _scatter_(gradient.new_zeros(index.shape[0], ctx.length, *gradient.shape[2:]), index, gradient)
                if needed
                else None
                for gradient, needed in zip(gradients, ctx.needs_input_grad[1:], strict=True)
            )


def _gather(index: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    if _differentiated_by_torch():
        return ref.gather_tokens(index, *tensors)
    if _needs_gradient(*tensors):
        return _Gather.apply(index, *tensors)
    return tuple(torch.ops.reroute_kernels.gather_tokens(index, tensors))


def gather_tokens(index: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Compact any number of per-token tensors to the rows of a kept index, in one launch.

    Differentiable in the tensors: the gradient is a scatter. In forward mode, and under transforms of `torch.func`, the
    reference runs.

    Args:
        index: (B, M) int64, as from `select_tokens`. Positions outside 0 ... L - 1, such as -1, give rows of zeros; a
            position appears at most once in a row.
        tensors: each (B, L, ...), of a dtype in `checks.COPYABLE`; strided and expanded views are read in place.

    Returns:
        A tuple of one contiguous (B, M, ...) tensor for each of `tensors`.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a shape, dtype or device is not accepted, or there is nothing to gather.

    >>> hidden = torch.arange(5.0).view(1, 5, 1)
    >>> (compact,) = gather_tokens(torch.tensor([[1, 2, 4, -1]]), hidden)
    >>> compact[0, :, 0]
    tensor([1., 2., 4., 0.])
    """
    if tensors and (operations := _direct((index, *tensors))) is not None:
        return operations.gather_tokens(index, *tensors)
    expect_tensor("index", index)
    if not tensors:
        raise ValueError("tensors must hold at least one tensor, got none")
    _expect_tensors(tensors)
    return _gather(index, tensors)


@takes_attention
def route_tokens(
    attention: Attention,
    pool: Tensor,
    pinned: Tensor,
    keep: int | Sequence[int] | Tensor,
    length: int,
    tensors: Sequence[Tensor] = (),
    return_scores: bool = False,
    memory: Memory | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]] | tuple[Tensor, tuple[Tensor, ...], Tensor]:
    """Make a whole decision in one call: rank the tokens, select those that run, and compact their per-token tensors.

    Equals `rank_tokens`, `select_tokens` and `gather_tokens` one after the other, bit for bit, in a single call:
    four launches for at most 65,536 tokens, else eight, the one that compacts included. Finding the queries
    by `key_mask`, if `query_index` is None, takes a few more. Differentiable in `tensors`.

    Args:
        attention: an `Attention`; or in its place the arguments of `rank_tokens` (`query`, `key` and other tensors by
            position or name, options by name). The arguments below are then given by name.
        pool, pinned, keep, length: as in `select_tokens`.
        tensors: each (B, L, ...), as in `gather_tokens`; may be none.
        return_scores: also return the scores that ranked. They are computed anyway, and cost nothing.
        memory: as in `select_tokens`; it takes no launch more.

    Returns:
        (B, M) int64, the kept index, and a tuple of one contiguous (B, M, ...) tensor for each of `tensors`; then, if
        asked for, (B, L) float32, the scores.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a shape, dtype, device, name or number is not accepted.

    >>> query, key, hidden = torch.ones(1, 1, 2, 4), torch.zeros(1, 5, 1, 4), torch.randn(1, 5, 8)
    >>> key[:, 1:3] = 10.0
    >>> pool = torch.tensor([[True, True, True, True, False]])
    >>> index, (compact,) = route_tokens(query, key, pool=pool, pinned=~pool, keep=2, length=3, tensors=(hidden,))
    >>> index, compact.shape
    (tensor([[1, 2, 4]]), torch.Size([1, 3, 8]))
    """
    is_plain = isinstance(tensors, (tuple, list)) and _is_count(length) and _is_plain(memory)
    if is_plain and _has_plain_options(attention):
        optional = *attention.operands()[2:], *_operands_of(memory)
        operations = _direct((attention.query, attention.key, pool, pinned, keep, *tensors), optional)
        if operations is not None:
            return operations.route_tokens(attention, pool, pinned, keep, length, tuple(tensors), return_scores, memory)
    operands = _registered(attention)
    expect_tensor("pool", pool)
    expect_tensor("pinned", pinned)
    _expect_length(length)
    key = attention.key
    keep = _counts(keep, key.shape[0] if key.ndim else 0, key.device)
    if isinstance(tensors, Tensor) or not isinstance(tensors, Sequence):
        raise TypeError(f"tensors must be a sequence of tensors, got {type(tensors).__name__}")
    _expect_tensors(tensors)
    remembered = () if memory is None else _registered_memory(memory)
    gathers_later = len(tensors) > 0 and (_differentiated_by_torch() or _needs_gradient(*tensors))
    with torch.no_grad():
        index, compact, scores = torch.ops.reroute_kernels.route_tokens(
            *operands, pool, pinned, keep, length, () if gathers_later else tensors, *remembered
        )
    result = index, _gather(index, tensors) if gathers_later else tuple(compact)
    return (*result, scores) if return_scores else result


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, full, index, compact):
        ctx.save_for_backward(index)
        ctx.mark_dirty(full)
        _remember_backend(ctx)
        torch.ops.reroute_kernels.scatter_tokens_(full, index, compact)
        return full

    @staticmethod
    def backward(ctx, gradient):
        (index,) = ctx.saved_tensors
        full_gradient = compact_gradient = None
        with _backend_of_forward(ctx):
            if ctx.needs_input_grad[0]:
                nothing = gradient.new_zeros(*index.shape, *gradient.shape[2:])
                full_gradient = _scatter_(gradient.clone(), index, nothing)
            if ctx.needs_input_grad[2]:
                (compact_gradient,) = _gather(index, (gradient,))
        return full_gradient, None, compact_gradient


def _scatter_(full: Tensor, index: Tensor, compact: Tensor) -> Tensor:
    if _differentiated_by_torch():
        return ref.scatter_tokens_(full, index, compact)
    if _needs_gradient(full, compact):
        return _Scatter.apply(full, index, compact)
    torch.ops.reroute_kernels.scatter_tokens_(full, index, compact)
    return full


def _can_write(full: Tensor, index: Tensor | None, compact: Tensor | None) -> bool:
    """Whether rows can be written to `full` directly, or none are."""
    if index is None or compact is None:
        return index is compact
    return not full.is_neg() and full.is_inference() <= torch.is_inference_mode_enabled()


def scatter_tokens_(full: Tensor, index: Tensor, compact: Tensor) -> Tensor:
    """Write compact rows back to their places in the full sequence, in place.

    Differentiable in `full` and `compact`: the gradient is a gather. In forward mode, and under transforms of
    `torch.func`, the reference runs.

    Args:
        full: (B, L, ...) of a dtype in `checks.COPYABLE`, written in place; no two elements may share memory.
        index: (B, M) int64, as from `select_tokens`. Rows at positions outside 0 ... L - 1, such as -1, are skipped;
            a position appears at most once in a row.
        compact: (B, M, ...), same trailing shape, dtype and device as `full`.

    Returns:
        `full`.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a shape, dtype, device or memory layout is not accepted.

    >>> full, index = torch.zeros(1, 5, 1), torch.tensor([[1, 2, 4]])
    >>> scatter_tokens_(full, index, torch.ones(1, 3, 1))[0, :, 0]
    tensor([0., 1., 1., 0., 1.])
    """
    operations = _direct((full, index, compact))
    if operations is not None and _can_write(full, index, compact):
        operations.scatter_tokens_(full, index, compact)
        library.note_write(full)
        return full
    for name, tensor in (("full", full), ("index", index), ("compact", compact)):
        expect_tensor(name, tensor)
    _expect_no_negation(full)
    return _scatter_(full, index, compact)


class _Merge(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features, assignment, groups):
        means, counts = torch.ops.reroute_kernels.merge_tokens(features, assignment, groups)
        ctx.save_for_backward(assignment, counts)
        ctx.mark_non_differentiable(counts)
        return means, counts

    @staticmethod
    def backward(ctx, gradient, _):
        assignment, counts = ctx.saved_tensors
        groups = counts.shape[1]
        if groups == 0:
            return gradient.new_zeros(*assignment.shape, gradient.shape[2]), None, None
        is_member = ((assignment >= 0) & (assignment < groups))[:, :, None]
        share = gradient.float() / counts.clamp(min=1)[:, :, None]
        rows = assignment.clamp(0, groups - 1)[:, :, None].expand(-1, -1, gradient.shape[2])
        return torch.where(is_member, share.gather(1, rows), 0.0).to(gradient.dtype), None, None


def merge_tokens(features: Tensor, assignment: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Average the tokens of each group, in one launch.

    Sums are taken in float32, in the same order at every call. Differentiable in `features`. In forward mode, and under
    transforms of `torch.func`, the reference runs.

    Args:
        features: (T, N, d), float32, float16 or bfloat16.
        assignment: (T, N) int64, the group of each token among those of its own row. Tokens with a number outside
            0 ... G - 1, such as -1, belong to none.
        groups: G, the groups of a row.

    Returns:
        (T, G, d) contiguous, dtype of `features`: the means, zeros for a group without tokens; and (T, G) int64, the
        tokens of each group.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a shape, dtype, device or number is not accepted.

    >>> features = torch.tensor([[[1.0], [3.0], [5.0], [7.0]]])
    >>> means, counts = merge_tokens(features, torch.tensor([[0, 0, -1, 2]]), groups=3)
    >>> means[0, :, 0], counts
    (tensor([2., 0., 7.]), tensor([[2, 0, 1]]))
    """
    if _is_count(groups) and (operations := _direct((features, assignment))) is not None:
        return operations.merge_tokens(features, assignment, groups)
    expect_tensor("features", features)
    expect_tensor("assignment", assignment)
    if isinstance(groups, bool) or not isinstance(groups, (int, torch.SymInt)):
        raise TypeError(f"groups must be an integer, got {groups!r}")
    if not 0 <= groups < 2**63:
        raise ValueError(f"groups must be 0 or more, and below 2**63, got {groups}")
    if _differentiated_by_torch():
        return ref.merge_tokens(features, assignment, groups)
    if _needs_gradient(features):
        return _Merge.apply(features, assignment, groups)
    return torch.ops.reroute_kernels.merge_tokens(features, assignment, groups)


def _expect_no_negation(full: Tensor) -> None:
    if not torch.compiler.is_compiling() and full.is_neg():
        raise ValueError("full must not be a lazily negated view, got one: write to a copy of it")


def align_tokens_(full: Tensor, index: Tensor, compact: Tensor, pool: Tensor) -> Tensor:
    """Write compact rows back in place, and add the mean change of the candidates among them to the other candidates.

    So tokens that waited follow the tokens that ran, in two launches. The mean is taken in float32, sample by sample,
    in one order at every call. Differentiable in `full` and `compact`: where gradients are needed, PyTorch's own
    operators run.

    Args:
        full: (B, L, d), float32, float16 or bfloat16, as it was before the rows changed; written in place; no two
            elements may share memory.
        index: (B, M) int64, as in `scatter_norm_tokens_`: each row ascends, but for what fills it up.
        compact: (B, M, d), the changed rows; same dtype and device as `full`.
        pool: (B, L) bool, the candidates. Those that `index` does not name receive the mean of `compact` less `full`
            over those that it names; nothing is added in a sample where it names none.

    Returns:
        `full`.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a shape, dtype, device or memory layout is not accepted.

    >>> full, index = torch.zeros(1, 4, 1), torch.tensor([[0, 1, 3]])
    >>> pool = torch.tensor([[True, True, True, False]])  # the last token is text
    >>> align_tokens_(full, index, torch.tensor([[[1.0], [3.0], [9.0]]]), pool)[0, :, 0]
    tensor([1., 3., 2., 9.])
    """
    operations = _direct((full, index, compact, pool))
    if operations is not None and _can_write(full, index, compact):
        operations.align_tokens_(full, index, compact, pool)
        library.note_write(full)
        return full
    for name, tensor in (("full", full), ("index", index), ("compact", compact), ("pool", pool)):
        expect_tensor(name, tensor)
    _expect_no_negation(full)
    if _needs_gradient(full, compact) and torch.compiler.is_compiling():
        check_align(full, index, compact, pool)  # strides may be symbols, which cannot be compared
        return full.copy_(aligned_tokens(full, index, compact, pool))
    if _differentiated_by_torch() or _needs_gradient(full, compact):
        return ref.align_tokens_(full, index, compact, pool)
    torch.ops.reroute_kernels.align_tokens_(full, index, compact, pool)
    return full


def scatter_norm_tokens_(
    full: Tensor, index: Tensor | None, compact: Tensor | None, weight: Tensor, eps: float, *, one_plus: bool = False
) -> Tensor:
    """Write compact rows back to their places in the full sequence, in place, and normalize all rows, in one launch.

    RMSNorm in float32, as decoder layers begin with. Differentiable in `full`, `compact` and `weight`: where gradients
    are needed, `scatter_tokens_` and PyTorch's own operators run.

    Args:
        full: (B, L, d), float32, float16 or bfloat16, written in place; no two elements may share memory, unless
            nothing is written.
        index: (B, M) int64, as from `select_tokens`: each row ascends, but for what fills it up on the right, at
            positions outside 0 ... L - 1, or on the left, at negative ones, which is skipped; a position appears at
            most once in a row. None: nothing is written back.
        compact: (B, M, d), same dtype and device as `full`. None with `index`.
        weight: (d,), same dtype and device as `full`.
        eps: added to the mean of the squares of a row.
        one_plus: False: a row is rounded to its dtype, then multiplied by `weight` (Llama, Qwen2 and 3, GLM).
            True: it is multiplied by 1 + `weight` in float32, then rounded (Gemma, Qwen3.5).

    Returns:
        (B, L, d) contiguous, dtype of `full`: the norm of every row, of those that were written and the others.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a shape, dtype, device or memory layout is not accepted.

    >>> full, index = torch.zeros(1, 3, 2), torch.tensor([[1]])
    >>> scatter_norm_tokens_(full, index, torch.tensor([[[3.0, -3.0]]]), weight=torch.tensor([1.0, 2.0]), eps=0.0)[0, 1]
    tensor([ 1., -2.])
    >>> full[0]
    tensor([[ 0.,  0.],
            [ 3., -3.],
            [ 0.,  0.]])
    """
    operations = _direct((full, weight), (index, compact))
    if operations is not None and type(eps) is float and _can_write(full, index, compact):
        normed = operations.scatter_norm_tokens_(full, index, compact, weight, eps, one_plus=one_plus)
        if index is not None:
            library.note_write(full)
        return normed
    for name, tensor in (("full", full), ("index", index), ("compact", compact), ("weight", weight)):
        if tensor is not None or name in ("full", "weight"):
            expect_tensor(name, tensor)
    if not isinstance(eps, (Real, torch.SymFloat)):
        raise TypeError(f"eps must be a real number, got {eps!r}")
    if (index is None) != (compact is None):
        raise ValueError("index and compact must be given together, got only one of them")
    if index is None or compact is None:
        return _norm(full, weight, float(eps), one_plus)
    _expect_no_negation(full)
    if _differentiated_by_torch():
        return ref.scatter_norm_tokens_(full, index, compact, weight, eps, one_plus=one_plus)
    if _needs_gradient(full, compact, weight):
        check_norm(full, index, compact, weight)
        return _norm(_scatter_(full, index, compact), weight, float(eps), one_plus)
    return torch.ops.reroute_kernels.scatter_norm_tokens_(full, index, compact, weight, float(eps), one_plus)


def _norm(full: Tensor, weight: Tensor, eps: float, one_plus: bool) -> Tensor:
    if _differentiated_by_torch() or _needs_gradient(full, weight):
        return ref.scatter_norm_tokens_(full, None, None, weight, eps, one_plus=one_plus)
    return torch.ops.reroute_kernels.norm_tokens(full, weight, eps, one_plus)
