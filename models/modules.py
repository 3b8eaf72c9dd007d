"""Modules of transformers, and what `torch.compile` puts around them."""

from __future__ import annotations

from typing import Any, TypeAlias

Module: TypeAlias = Any
"""A `torch.nn.Module` of transformers; torch does not type what its attributes are."""


def uncompiled(module: Module) -> Module:
    """The module inside what `torch.compile` puts around it."""
    return module._modules.get("_orig_mod", module)
