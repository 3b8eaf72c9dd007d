"""Makes the package importable from this source tree, where `models/` lies beside it, installed or not."""

from __future__ import annotations

from pathlib import Path

import reroute_kernels


def make_importable() -> None:
    """Find `reroute_kernels.models` in this source tree, before one that is installed from another."""
    root = str(Path(__file__).parents[1])
    if root not in reroute_kernels.__path__:
        reroute_kernels.__path__.append(root)
