"""Layers whose activations are computed anew in the backward pass: what routes must stay outside of what is recomputed.

A layer is recomputed with the inputs that it was handed, which are of a stage already where hooks run outside: then the
second run needs no state of the call. So it is with torch's `checkpoint_wrapper` around a layer, on which the hooks
are, and with transformers from 5.23 on, which checkpoints `forward`. Before, it checkpointed `__call__`, hooks and all.
"""

from __future__ import annotations

from torch import nn

from .modules import Module

_WRAPPED = "_checkpoint_wrapped_module"  # in torch.distributed.algorithms._checkpoint.checkpoint_wrapper
_COMPOSABLE = "torch.distributed._composable.checkpoint_activation"


def checkpointed(module: Module) -> Module:
    """The module inside what torch's `checkpoint_wrapper` put around it."""
    while (inside := module._modules.get(_WRAPPED)) is not None:
        module = inside
    return module


def recomputes_hooks(layer: nn.Module) -> bool:
    """Whether transformers' gradient checkpointing would run this layer's hooks once more in the backward pass."""
    inside = type(layer).__call__ is not nn.Module.__call__
    return inside and layer.training and getattr(layer, "gradient_checkpointing", False)


def runs_first(layer: nn.Module) -> bool:
    """Whether hooks must be put in front of those that are there: torch's composable `checkpoint` begins in one."""
    return any(getattr(hook, "__module__", "") == _COMPOSABLE for hook in layer._forward_pre_hooks.values())
