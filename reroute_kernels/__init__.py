"""Fused kernels and drop-in adapters that route visual tokens through vision-language models (arXiv 2606.12412)."""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from . import ops, rankings, reducers, ref
from .attention import Attention
from .backends import backend
from .budget import solve
from .calibration import Calibration, calibrate, measure_layers
from .cost import Cost, cost
from .memory import Memory
from .policy import Policy, Stage
from .presets import Preset, preset, presets, suggest
from .trace import Trace

if TYPE_CHECKING:
    from reroute_kernels import models, triton
    from reroute_kernels.models import Adapter, Routing, apply, remove, routing_of, warm_up

try:
    __version__ = version("reroute-kernels")
except PackageNotFoundError:  # imported from a source tree that is not installed
    __version__ = "0.0.0"

__all__ = [
    "Adapter",
    "Attention",
    "Calibration",
    "Cost",
    "Memory",
    "Policy",
    "Preset",
    "Routing",
    "Stage",
    "Trace",
    "apply",
    "backend",
    "calibrate",
    "cost",
    "measure_layers",
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
    "suggest",
    "triton",
    "warm_up",
]

_MODULES = ("triton", "models")
_OF_MODELS = ("Adapter", "Routing", "apply", "remove", "routing_of", "warm_up")


def __getattr__(name):
    # Loaded on first use: the kernels need triton, the adapters are wanted only beside a transformers model.
    if name in _MODULES:
        return import_module(f".{name}", __name__)
    if name in _OF_MODELS:
        return getattr(import_module(".models", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return [*__all__, "__version__"]
