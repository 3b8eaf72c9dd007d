"""Attention heads split over several processes: tensor parallelism as transformers sets it up.

`from_pretrained(tp_plan="auto")` under torchrun gives each rank some of the heads of every layer, and the same hidden
states. By the scores of its own heads each rank would select other tokens, so scores are reduced over all ranks before
anything is selected. All supported versions of transformers keep the number of ranks in `model._tp_size` and their mesh
in `model._device_mesh`: of one axis in 5.4, with further axes beside the one named `tp` later.
"""

from __future__ import annotations

import sys

import torch
import torch.distributed
from torch import Tensor, nn

from .refusals import HEADS_SPLIT_OTHERWISE, HEADS_SPLIT_UNEVENLY, SHARDED


def head_group(model: nn.Module):
    """The process group over which transformers splits the heads of a model, or None if it does not."""
    mesh = getattr(model, "_device_mesh", None)
    if mesh is None or getattr(model, "_tp_size", None) in (None, 1):
        return None
    return mesh.get_group() if mesh.ndim == 1 else mesh.get_group("tp")


def plans_part(model: nn.Module, part: nn.Module) -> bool:
    """Whether the model's `tp_plan` splits anything in a part of it; without an own plan, towers are whole."""
    name = next(name for name, module in model.named_modules() if module is part)
    last = name.rpartition(".")[2]
    return any(last in pattern.split(".") for pattern in getattr(model, "_tp_plan", None) or ())


def check_heads(query: Tensor | None, key: Tensor, expected: tuple[int, int], group) -> None:
    """Make sure that the heads of all ranks are those of the model.

    Args:
        query, key: (B, Q, Hq, D) and (B, L, Hkv, D) of a decision layer; None if the keys alone rank.
        expected: query and key heads of the whole model.
        group: of `head_group`.

    Raises:
        NotImplementedError: some heads are missing.
    """
    got = expected[0] if query is None else query.shape[2], key.shape[2]
    if got == expected:
        return
    if group is None:
        raise HEADS_SPLIT_OTHERWISE.because(expected=expected, got=got)
    if tuple(heads * group.size() for heads in got) != expected:
        raise HEADS_SPLIT_UNEVENLY.because(expected=expected, got=got, ranks=group.size())


def check_not_sharded(*modules: nn.Module) -> None:
    """Refuse modules whose weights FSDP brings together only while they run, after a decision is made.

    Raises:
        NotImplementedError: FSDP wraps one of them, or `fully_shard` was called on it.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")  # not imported, not in use
    if fsdp is None:
        return
    for module in modules:
        if isinstance(module, (fsdp.FullyShardedDataParallel, fsdp.FSDPModule)):
            raise SHARDED.because(module=type(module).__name__)


def all_gather_scores(group, scores: Tensor, reduction: str) -> Tensor:
    """Scores by all heads, from scores by the heads of each rank.

    The scores of all ranks are gathered, and reduced in the same order everywhere: no rank may select otherwise
    because of another rounding.

    Args:
        group: of `head_group`.
        scores: (B, L) float32, by the heads of this rank.
        reduction: over heads, `"mean"` or `"max"`.

    Returns:
        (B, L) float32, the same on every rank.
    """
    scores = scores.contiguous()
    parts = [torch.empty_like(scores) for _ in range(group.size())]
    torch.distributed.all_gather(parts, scores, group=group)
    of_ranks = torch.stack(parts)
    return of_ranks.amax(dim=0) if reduction == "max" else of_ranks.mean(dim=0)
