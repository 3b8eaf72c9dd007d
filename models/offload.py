"""Support of accelerate's `device_map` and offload: layers on several devices, weights that are loaded when they run.

accelerate wraps `forward` of each module: inputs are moved and weights loaded after PyTorch's forward pre-hooks, in
which a decision is made. The helpers here do both in time for the decision.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn


def _accelerate_hooks(module: nn.Module) -> Iterator[Any]:
    hooks = [vars(module).get("_hf_hook")]  # found or not without a search through parameters and submodules
    while hooks:
        hook = hooks.pop(0)
        hooks += getattr(hook, "hooks", ())  # of a SequentialHook
        yield hook


def to_execution_device(modules: Sequence[nn.Module], hidden: Tensor) -> Tensor:
    """Move a layer's input to the device on which accelerate runs the layer; unchanged if accelerate moves nothing.

    Args:
        modules: of a decoder layer, itself first.
        hidden: (B, L, d), its input.
    """
    # With `cpu_offload` and `disk_offload` only the modules in a layer are wrapped, each for the same device.
    for module in modules:
        if "_hf_hook" not in vars(module):
            continue
        for hook in _accelerate_hooks(module):
            device = getattr(hook, "execution_device", None)
            if device is not None:
                return hidden.to(device)
    return hidden


def onloaded(layer: nn.Module, attention: nn.Module) -> AbstractContextManager[None]:
    """Context manager that loads offloaded weights, so that submodules can be called individually.

    An offloaded module usually loads its own weights when it is called. With accelerate's `preload_module_classes` and
    `place_submodules`, weights are loaded by the whole layer or attention: they are loaded here, and once more when the
    layer runs.

    Args:
        layer: of the decoder or the vision tower.
        attention: in it.
    """
    if "_hf_hook" in vars(layer) or "_hf_hook" in vars(attention):
        return _onloaded(layer, attention)
    return nullcontext()


@contextmanager
def _onloaded(layer: nn.Module, attention: nn.Module) -> Iterator[None]:
    with ExitStack() as stack:
        for module in (layer, attention):
            for hook in _accelerate_hooks(module):
                if getattr(hook, "offload", False) and getattr(hook, "place_submodules", False):
                    hook.pre_forward(module)
                    stack.callback(hook.post_forward, module, None)
        yield
