"""Fused kernels and drop-in adapters that route visual tokens through vision-language models (arXiv 2606.12412)."""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

from . import ops, rankings, reducers, ref
from .backends import backend
from .budget import solve
from .cost import cost
from .policy import Policy, Stage
from .presets import Preset, preset, presets

try:
    __version__ = version("reroute-kernels")
except PackageNotFoundError:  # imported from a source tree that is not installed
    __version__ = "0.0.0"

__all__ = [
    "Policy",
    "Preset",
    "Stage",
    "apply",
    "backend",
    "cost",
    "models",
    "ops",
    "preset",
    "presets",
    "rankings",
    "reducers",
    "ref",
    "remove",
    "routing_of",
    "solve",
    "triton",
]


def __getattr__(name):
    # Loaded on first use: the kernels need triton, the adapters are wanted only beside a transformers model.
    if name in ("triton", "models"):
        return import_module(f".{name}", __name__)
    if name in ("apply", "remove", "routing_of"):
        return getattr(import_module(".models", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return __all__
