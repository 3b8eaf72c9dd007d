"""The router logits of a mixture of experts, from which the model with the head computes its load-balancing loss.

The loss takes the rows of all layers with one attention mask, which does not fit the rows of a stage. So the mask of a
prompt with images is kept from the head. It is handed the rows of tokens without padding instead: for each layer, the
tokens that ran.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from reroute_kernels.routing import RoutedForward

from .checkpointing import checkpointed


def asks_for_router_logits(arguments: dict, config) -> bool:
    """Whether a call of the model with the head asks for them; config: of its text model."""
    asked = arguments.get("output_router_logits")
    return bool(getattr(config, "output_router_logits", False) if asked is None else asked)


def with_tokens(router_logits: tuple[Tensor, ...], layers: nn.ModuleList, starts: list[int], forward: RoutedForward):
    """The rows of tokens that ran.

    Args:
        router_logits: (B * M, experts) of each layer with experts.
        layers: of the decoder.
        starts: the first layer of each stage.
        forward: the routed prefill.

    Returns:
        (tokens, experts) of each of these layers, in their order.

    Raises:
        RuntimeError: it cannot be told which layers they are of.
    """
    sparse = [
        layer_idx
        for layer_idx, layer in enumerate(layers)
        if hasattr(checkpointed(layer.mlp), "gate") or hasattr(checkpointed(layer), "router")
    ]
    if len(sparse) != len(router_logits):
        raise RuntimeError(
            f"router logits of a routed prompt must be of all {len(sparse)} layers with experts, got "
            f"{len(router_logits)} of them"
        )
    found = []
    for layer_idx, logits in zip(sparse, router_logits, strict=True):
        stage = sum(start <= layer_idx for start in starts) - 1
        if stage < 0:
            valid, counts = forward.prompt.valid, forward.prompt.valid_counts
        else:
            valid = forward.kept[stage] >= 0 if forward.is_ragged(stage) else None
            counts = forward.row_lengths[stage]
        found.append(logits if valid is None else _rows(logits, valid, sum(counts)))
    return tuple(found)


def without_padding(router_logits: tuple[Tensor, ...], mask: object) -> tuple[Tensor, ...]:
    """The rows (B * M, experts) of all tokens of a call that is not routed; mask: (B, at least M), or none."""
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        return router_logits
    queries = len(router_logits[0]) // len(mask)
    valid = mask[:, -queries:] != 0
    return tuple(_rows(logits, valid, int(valid.sum())) for logits in router_logits)


def _rows(logits: Tensor, valid: Tensor, count: int) -> Tensor:
    """The rows at `count` positions of `valid`, a count that is known without asking the device."""
    rows = valid.flatten().to(logits.device).to(torch.int8).argsort(descending=True, stable=True)[:count]
    return logits.index_select(0, rows)
