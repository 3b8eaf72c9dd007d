"""Which backend runs: Triton kernels on CUDA and ROCm devices, the PyTorch reference elsewhere, or the one forced.

`backend(...)` forces one in code, the environment variable `REROUTE_BACKEND` from outside.
"""

from __future__ import annotations

import os
from collections import deque
from contextvars import ContextVar
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch

from . import ref

BACKENDS = ("ref", "triton")


class backend:
    """Force a backend: for the whole process, or in a `with` block for this thread or asynchronous task.

    Blocks nest, and one object may be used for several. A call inside a block replaces the backend that the block
    forces. Gradients are computed by the backend that was forced for the forward pass.

    Args:
        name: `"ref"`, `"triton"`, or None to choose by device again. `"triton"` on CPU tensors needs Triton's
            interpreter: set `TRITON_INTERPRET=1` before triton is imported.

    Raises:
        ValueError: no such backend.
        RuntimeError: the backend cannot run here.

    >>> with backend("ref"):
    ...     active_backend("cpu")
    'ref'
    """

    def __init__(self, name: str | None):
        if name is not None:
            _check_available(name, "name")
        self._name = name
        self._blocks: list[_Block] = []
        # The call holds until the next one; `__enter__` takes it back if a block begins with it.
        self._before = self._called = _open_blocks()
        if self._before:
            self._called = (*self._before[:-1], (self._before[-1][0], name))
            _blocks.set(self._called)
        else:
            _calls.append(self)

    def __enter__(self) -> backend:
        if self in _calls:
            _calls.remove(self)
        blocks = _open_blocks()
        block = _Block()
        self._blocks.append(block)
        _blocks.set((*(self._before if blocks == self._called else blocks), (block, self._name)))
        return self

    def __exit__(self, *exception) -> None:
        # Blocks of generators end in any order, and in other threads and tasks than they began in.
        here = [block for block, _ in _open_blocks() if block in self._blocks]
        block = (here or self._blocks)[-1]
        self._blocks.remove(block)
        block.has_ended = True
        _blocks.set(_open_blocks())


class _Block:
    has_ended = False


# Blocks of this thread or task and the backends that they force, the innermost last.
_blocks: ContextVar[tuple[tuple[_Block, str | None], ...]] = ContextVar("_blocks", default=())
# Calls outside of blocks, the newest last. Older ones matter only while a block begins in another thread.
_calls: deque[backend] = deque(maxlen=64)


def _open_blocks() -> tuple[tuple[_Block, str | None], ...]:
    return tuple(entry for entry in _blocks.get() if not entry[0].has_ended)


def forced_backend() -> str | None:
    """Name of the backend that `backend` forces in this thread or task, or None."""
    if blocks := _open_blocks():
        return blocks[-1][1]
    try:
        return _calls[-1]._name
    except IndexError:
        return None


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
