"""Modules of transformers, and the wrappers of `torch.compile` around them."""

from __future__ import annotations

from typing import Any, TypeAlias

Module: TypeAlias = Any
"""A `torch.nn.Module` of transformers; torch does not type its attributes."""


def uncompiled(module: Module) -> Module:
    """The module inside the wrapper of `torch.compile`, or the module itself."""
    return module._modules.get("_orig_mod", module)
