"""Layers on several devices, and layers whose weights come only when they run: accelerate's `device_map` and offload.

accelerate wraps `forward` of each module, so that its inputs are moved to its device and its weights loaded after the
forward pre-hooks of PyTorch, in which a decision is made. What a decision needs is brought there here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn


def _accelerate_hooks(module: nn.Module) -> Iterator[object]:
    hooks = [vars(module).get("_hf_hook")]  # found or not without a search through parameters and submodules
    while hooks:
        hook = hooks.pop(0)
        hooks += getattr(hook, "hooks", ())  # of a SequentialHook
        yield hook


def to_layer(layer: nn.Module, hidden: Tensor) -> Tensor:
    """The input of a layer on the device on which accelerate runs it; as it is where accelerate moves nothing.

    Args:
        layer: a decoder layer.
        hidden: (B, L, d), its input.
    """
    # With `cpu_offload` and `disk_offload` only the modules in a layer are wrapped, each for the same device.
    for module in layer.modules():
        for hook in _accelerate_hooks(module):
            device = getattr(hook, "execution_device", None)
            if device is not None:
                return hidden.to(device)
    return hidden


@contextmanager
def loaded(layer: nn.Module, attention: nn.Module) -> Iterator[None]:
    """Within it modules of the layer and of its attention can be called one by one.

    An offloaded module loads its own weights when it is called. Not so one whose weights are loaded with those of the
    whole layer or the whole attention (accelerate's `preload_module_classes` and `place_submodules`): they are loaded
    here, and once more when the layer runs.

    Args:
        layer: of the decoder or the vision tower.
        attention: in it.
    """
    with ExitStack() as stack:
        for module in (layer, attention):
            for hook in _accelerate_hooks(module):
                if getattr(hook, "offload", False) and getattr(hook, "place_submodules", False):
                    hook.pre_forward(module)
                    stack.callback(hook.post_forward, module, None)
        yield
