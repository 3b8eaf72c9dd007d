"""The operations as `torch.library` knows them: schemas, shapes of results, and dispatch to a backend.

Each is one registered call, `torch.ops.reroute_kernels.*`, which runs on the backend that `backends.py` chooses.
"""

from __future__ import annotations

import sys

import torch

from . import checks
from .attention import Attention
from .backends import operations_for
from .memory import Memory

_library = torch.library.Library("reroute_kernels", "DEF")


def _register(schema: str, function, fake) -> None:
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"reroute_kernels::{name}", fake, lib=_library)


def _rank(*operands):
    attention = Attention(*operands)
    return operations_for(attention.key.device).rank_tokens(attention)


def _rank_fake(*operands):
    attention = Attention(*operands)
    checks.check_ranking(attention)
    return attention.key.new_empty(attention.key.shape[:2], dtype=torch.float32)


def _select(scores, pool, pinned, keep, length):
    return operations_for(scores.device).select_tokens(scores, pool, pinned, keep, length)


def _select_fake(scores, pool, pinned, keep, length):
    checks.check_selection(scores, pool, pinned, keep, length)
    return scores.new_empty((scores.shape[0], length), dtype=torch.int64)


def _select_remembered(scores, pool, pinned, keep, length, *memory):
    return operations_for(scores.device).select_tokens(scores, pool, pinned, keep, length, Memory(*memory))


def _select_remembered_fake(scores, pool, pinned, keep, length, *memory):
    checks.check_memory(Memory(*memory), scores.shape, scores.device)
    return _select_fake(scores, pool, pinned, keep, length), scores.new_empty(scores.shape)


def _diverse(features, weights, keep, lengths):
    return operations_for(features.device).select_diverse(features, weights, keep=keep, lengths=lengths)


def _diverse_fake(features, weights, keep, lengths):
    checks.check_diverse(features, weights, keep, lengths)
    return features.new_empty((features.shape[0], keep), dtype=torch.int64)


def _dpp(features, relevance, keep, lengths):
    return operations_for(features.device).select_dpp(features, relevance, keep=keep, lengths=lengths)


def _dpp_fake(features, relevance, keep, lengths):
    checks.check_dpp(features, relevance, keep, lengths)
    return features.new_empty((features.shape[0], keep), dtype=torch.int64)


def _gather(index, tensors):
    return list(operations_for(index.device).gather_tokens(index, *tensors))


def _gather_fake(index, tensors):
    checks.check_gather(index, tensors)
    return [tensor.new_empty((*index.shape, *tensor.shape[2:])) for tensor in tensors]


def _route(*arguments):
    attention, (*selection, tensors), memory = _parts_of_route(arguments)
    operations = operations_for(attention.key.device)
    index, compact, scores = operations.route_tokens(attention, *selection, tensors, return_scores=True, memory=memory)
    return index, list(compact), scores


def _parts_of_route(arguments):
    """The attention; pool, pinned, keep, length and tensors; the memory. Defaults at the end are not passed on."""
    begin = len(Attention._fields)
    return Attention(*arguments[:begin]), arguments[begin : begin + 5], Memory.of(*arguments[begin + 5 :])


def _route_fake(*arguments):
    attention, (pool, pinned, keep, length, tensors), memory = _parts_of_route(arguments)
    scores = _rank_fake(*attention)
    checks.check_memory(memory, scores.shape, scores.device)
    index = _select_fake(scores, pool, pinned, keep, length)
    batch, total = scores.shape
    checks.check_rows(tensors[:1], batch, total, scores.device)
    return index, _gather_fake(index, tensors), scores


def _scatter(full, index, compact):
    _expect_writable(full)
    operations_for(full.device).scatter_tokens_(full, index, compact)
    note_write(full)


def _expect_writable(full):
    if full.is_inference() and not torch.is_inference_mode_enabled():
        raise RuntimeError("full must not be an inference tensor outside torch.inference_mode(), got one")


def note_write(full):
    """Let autograd notice a write, as PyTorch's own in-place operators do."""
    if not full.is_inference():
        torch.autograd.graph.increment_version(full)


def _scatter_fake(full, index, compact):
    checks.check_scatter(full, index, compact)


def _align(full, index, compact, pool):
    _expect_writable(full)
    operations_for(full.device).align_tokens_(full, index, compact, pool)
    note_write(full)


def _align_fake(full, index, compact, pool):
    checks.check_align(full, index, compact, pool)


def _scatter_norm(full, index, compact, weight, eps, one_plus):
    _expect_writable(full)
    operations = operations_for(full.device)
    normed = operations.scatter_norm_tokens_(full, index, compact, weight, eps, one_plus=one_plus)
    note_write(full)
    return normed


def _scatter_norm_fake(full, index, compact, weight, eps, one_plus):
    checks.check_scatter(full, index, compact)
    checks.check_norm(full, index, compact, weight)
    return full.new_empty(full.shape)


def _norm(full, weight, eps, one_plus):
    operations = operations_for(full.device)
    return operations.scatter_norm_tokens_(full, None, None, weight, eps, one_plus=one_plus)


def _norm_fake(full, weight, eps, one_plus):
    checks.check_norm(full, None, None, weight)
    return full.new_empty(full.shape)


def _saliency(query, key, cu_seqlens, scale, query_reduction):
    operations = operations_for(key.device)
    return operations.column_saliency(query, key, cu_seqlens, scale=scale, query_reduction=query_reduction)


def _saliency_fake(query, key, cu_seqlens, scale, query_reduction):
    checks.check_saliency(query, key, cu_seqlens, query_reduction)
    return key.new_empty(key.shape[:2], dtype=torch.float32)


def _merge(features, assignment, groups):
    return operations_for(features.device).merge_tokens(features, assignment, groups)


def _merge_fake(features, assignment, groups):
    checks.check_merge(features, assignment, groups)
    shape = features.shape[0], groups
    return features.new_empty((*shape, features.shape[2])), assignment.new_empty(shape)


_RANKING = (
    "Tensor query, Tensor key, Tensor? cos, Tensor? sin, Tensor? key_mask, Tensor? query_index, Tensor? past_key, "
    "Tensor? past_mask, float scale, str query_reduction, str head_reduction, str rotary_style"
)
_register(f"rank_tokens({_RANKING}) -> Tensor", _rank, _rank_fake)
_register(
    "select_tokens(Tensor scores, Tensor pool, Tensor pinned, Tensor keep, SymInt length) -> Tensor",
    _select,
    _select_fake,
)
_MEMORY = "Tensor? remembered, Tensor? remembered_places"
# `select_tokens` with a memory.
_register(
    "select_remembered(Tensor scores, Tensor pool, Tensor pinned, Tensor keep, SymInt length, float decay, "
    f"{_MEMORY}) -> (Tensor, Tensor)",
    _select_remembered,
    _select_remembered_fake,
)
_register(
    "select_diverse(Tensor features, Tensor? weights, SymInt keep, Tensor? lengths) -> Tensor",
    _diverse,
    _diverse_fake,
)
_register("select_dpp(Tensor features, Tensor relevance, SymInt keep, Tensor? lengths) -> Tensor", _dpp, _dpp_fake)
_register("gather_tokens(Tensor index, Tensor[] tensors) -> Tensor[]", _gather, _gather_fake)
_register(
    f"route_tokens({_RANKING}, Tensor pool, Tensor pinned, Tensor keep, SymInt length, Tensor[] tensors, "
    "float? decay=None, Tensor? remembered=None, Tensor? remembered_places=None) -> (Tensor, Tensor[], Tensor)",
    _route,
    _route_fake,
)
_register("scatter_tokens_(Tensor(a!) full, Tensor index, Tensor compact) -> ()", _scatter, _scatter_fake)
_register("align_tokens_(Tensor(a!) full, Tensor index, Tensor compact, Tensor pool) -> ()", _align, _align_fake)
_register(
    "scatter_norm_tokens_(Tensor(a!) full, Tensor index, Tensor compact, Tensor weight, float eps, bool one_plus) "
    "-> Tensor",
    _scatter_norm,
    _scatter_norm_fake,
)
_register(
    "column_saliency(Tensor query, Tensor key, Tensor? cu_seqlens, float scale, str query_reduction) -> Tensor",
    _saliency,
    _saliency_fake,
)
_register("merge_tokens(Tensor features, Tensor assignment, SymInt groups) -> (Tensor, Tensor)", _merge, _merge_fake)
# `scatter_norm_tokens_` without an index: a schema tells the compiler which tensors are written to.
_register("norm_tokens(Tensor full, Tensor weight, float eps, bool one_plus) -> Tensor", _norm, _norm_fake)

if "torch.utils.flop_counter" in sys.modules:
    from . import flops  # noqa: F401 (registers the FLOPs of the operations)
