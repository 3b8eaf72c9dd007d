"""Makes the package importable from a source tree that is not installed, where `models/` lies beside it."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import reroute_kernels


def make_importable() -> None:
    """Find `reroute_kernels.models` in this source tree, unless it is installed."""
    if find_spec("reroute_kernels.models") is None:
        reroute_kernels.__path__.append(str(Path(__file__).parents[1]))
