"""Layers whose activations are computed anew in the backward pass: the routing hooks must not run again there.

A layer is recomputed with the inputs that it was handed. If the hooks run outside of the recomputed part, these inputs
are compact already, and the second run needs no state of the call. So it is with torch's `checkpoint_wrapper` around a
layer, which then carries the hooks, and with transformers from 5.23 on, which checkpoints `forward`. Before, it
checkpointed `__call__`, hooks included.
"""

from __future__ import annotations

from torch import nn

from .modules import Module, uncompiled

_WRAPPED = "_checkpoint_wrapped_module"  # in torch.distributed.algorithms._checkpoint.checkpoint_wrapper
_COMPOSABLE = "torch.distributed._composable.checkpoint_activation"


def checkpointed(module: Module) -> Module:
    """The module inside torch's `checkpoint_wrapper`, or the module itself."""
    while (inside := module._modules.get(_WRAPPED)) is not None:
        module = inside
    return module


def recomputes_hooks(layer: nn.Module) -> bool:
    """Whether transformers' gradient checkpointing would run this layer's hooks once more in the backward pass."""
    inside = type(layer).__call__ is not nn.Module.__call__
    return inside and layer.training and getattr(layer, "gradient_checkpointing", False)


def recomputes_without_cache(layer: Module) -> bool:
    """Whether transformers' gradient checkpointing would take the cache from the layer's arguments."""
    inside = checkpointed(uncompiled(layer))
    return inside.training and getattr(inside, "gradient_checkpointing", False)


def runs_first(layer: nn.Module) -> bool:
    """Whether hooks must go before the module's other hooks: torch's composable `checkpoint` begins in one of these."""
    return any(getattr(hook, "__module__", "") == _COMPOSABLE for hook in layer._forward_pre_hooks.values())
