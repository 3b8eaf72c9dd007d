"""Which backend runs: Triton kernels on CUDA and ROCm devices, the PyTorch reference elsewhere, or the one forced.

`backend(...)` forces one in code, the environment variable `REROUTE_BACKEND` from outside.
"""

from __future__ import annotations

import os
from contextvars import ContextVar
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch

from . import ref

BACKENDS = ("ref", "triton")


class backend:
    """Force a backend in this thread or asynchronous task, until the end of a `with` block if it is used as one.

    Blocks nest, and one object may be used for several. The environment variable forces one for the whole process.

    Args:
        name: `"ref"`, `"triton"`, or None to choose by device again. `"triton"` on CPU tensors needs Triton's
            interpreter: set `TRITON_INTERPRET=1` before triton is imported.

    Raises:
        ValueError: no such backend.
        RuntimeError: the backend cannot run here.
    """

    def __init__(self, name: str | None):
        if name is not None:
            _check_available(name, "name")
        self._name = name
        # A call replaces what the innermost block forces; if a block begins with it, that is taken back.
        self._before = _in_force.get()
        block = self._before[-1][0] if self._before else None
        self._called = (*self._before[:-1], (block, name))
        _in_force.set(self._called)

    def __enter__(self) -> backend:
        in_force = _in_force.get()
        _in_force.set((*(self._before if in_force is self._called else in_force), (self, self._name)))
        return self

    def __exit__(self, *exception) -> None:
        in_force = _in_force.get()
        # Blocks of generators may end in another order than they began in.
        place = max(number for number, (block, _) in enumerate(in_force) if block is self)
        _in_force.set(in_force[:place] + in_force[place + 1 :])


# What is forced in this thread or task, the innermost block last: (the block, or None outside of all, the name).
_in_force: ContextVar[tuple[tuple[backend | None, str | None], ...]] = ContextVar("_in_force", default=())


def forced_backend() -> str | None:
    """What is forced in this thread or task by `backend`, or None."""
    in_force = _in_force.get()
    return in_force[-1][1] if in_force else None


def _check_available(name: str, source: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(map(repr, BACKENDS))}, got {name!r}")
    if name == "triton":
        if not _has_triton():
            raise RuntimeError(f"{source}: the backend 'triton' needs the package triton, which is not installed")
        if not torch.cuda.is_available() and not _interpreting():
            raise RuntimeError(
                f"{source}: the backend 'triton' needs a CUDA or ROCm device, "
                "or TRITON_INTERPRET=1 set before triton is imported"
            )


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


@cache
def _interpreting() -> bool:
    import triton

    return triton.knobs.runtime.interpret


def active_backend(device: torch.device | str) -> str:
    """Name of the backend that runs tensors on this device.

    Raises:
        ValueError: `REROUTE_BACKEND` names no backend.
        RuntimeError: a forced backend cannot run on this device.
    """
    device = torch.device(device)
    forced = forced_backend()
    if forced is None and (forced := os.environ.get("REROUTE_BACKEND") or None) is not None:
        _check_available(forced, "REROUTE_BACKEND")
    if forced is None:
        return "triton" if device.type == "cuda" and _has_triton() else "ref"
    if forced == "triton" and device.type != "cuda" and not (device.type == "cpu" and _interpreting()):
        raise RuntimeError(
            f"the backend 'triton' is forced and cannot run tensors on {device}; it accepts cuda, "
            "and cpu where TRITON_INTERPRET=1 is set before triton is imported"
        )
    return forced


@cache
def _operations(name: str) -> ModuleType:
    return ref if name == "ref" else import_module(".triton", __package__)


def operations_for(device: torch.device) -> ModuleType:
    """The module whose operations run tensors on this device."""
    return _operations(active_backend(device))
