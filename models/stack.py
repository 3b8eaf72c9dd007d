"""Calls of a module that run in this thread, read from its frames.

Reading the locals of a frame keeps them alive until it ends, so that only frames of the names below are asked, and none
if a call runs as usual.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType

from torch import nn


def _frames_of(module: nn.Module, name: str) -> Iterator[FrameType]:
    """The frames of a module's methods of this name that run, the innermost first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == name and frame.f_locals.get("self") is module:
            yield frame
        frame = frame.f_back


def running(module: nn.Module, name: str) -> dict[str, object] | None:
    """The variables of the innermost method of this name that a module runs; None if it runs none."""
    return next((frame.f_locals for frame in _frames_of(module, name)), None)


def calls_of(module: nn.Module) -> int:
    """How many calls of a module run, each inside the one before; those whose hooks run now count, too."""
    return sum(1 for _ in _frames_of(module, nn.Module._call_impl.__name__))


def forwards_of(module: nn.Module) -> int:
    """How many of its `forward` run, called past its hooks or not."""
    return sum(1 for _ in _frames_of(module, "forward"))
