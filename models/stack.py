"""Calls of a module that run in this thread, read from its frames.

Reading the locals of a frame keeps them alive until it ends, so that only frames of the names below are asked, and none
if a call runs as usual.
"""

from __future__ import annotations

import sys
from types import FrameType

from torch import nn


def _frames_of(module: nn.Module, name: str) -> int:
    frame: FrameType | None = sys._getframe(1)
    count = 0
    while frame is not None:
        count += frame.f_code.co_name == name and frame.f_locals.get("self") is module
        frame = frame.f_back
    return count


def running(module: nn.Module, name: str) -> dict[str, object] | None:
    """The variables of the innermost method of this name that a module runs; None if it runs none."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == name and frame.f_locals.get("self") is module:
            return frame.f_locals
        frame = frame.f_back
    return None


def calls_of(module: nn.Module) -> int:
    """How many calls of a module run, each inside the one before; those whose hooks run now count, too."""
    return _frames_of(module, nn.Module._call_impl.__name__)


def forwards_of(module: nn.Module) -> int:
    """How many of its `forward` run, called past its hooks or not."""
    return _frames_of(module, "forward")
