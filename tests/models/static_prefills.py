"""The static code of captured prefills on a CPU: it runs where a graph would be replayed, and may ask for nothing."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from reroute_kernels.models import graphs

# Operations that bring a value to the host, or whose results have a shape that depends on data.
FORBIDDEN = (
    "aten::_local_scalar_dense",
    "aten::item",
    "aten::nonzero",
    "aten::nonzero_numpy",
    "aten::masked_select",
    "aten::unique",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::unique_consecutive",
    "aten::repeat_interleave.Tensor",
    "aten::bincount",
    "aten::equal",
    "aten::is_nonzero",
    "aten::_assert_async",
    "aten::pin_memory",
)


class NoTransfer(TorchDispatchMode):
    """Raises where a graph could not be captured. The operations of this library are kernels on a GPU: they pass."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, function.name()
        indices = args[1] if name.startswith(("aten::index.Tensor", "aten::index_put", "aten::_index_put")) else ()
        by_mask = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)
        devices = {each.device for each in args if isinstance(each, torch.Tensor)}
        if kwargs.get("device") is not None:
            devices.add(torch.device(kwargs["device"]))
        if by_mask or name.startswith(FORBIDDEN) or len(devices) > 1:
            raise AssertionError(f"{name} in a static prefill")
        return function(*args, **kwargs)


class Direct:
    """In the place of a graph: runs the prefill itself, in a mode that raises on transfers.

    Attributes:
        lengths: tokens of each layer's keys, of the latest run.
    """

    nbytes = 0
    runs: ClassVar[list[Direct]] = []

    def __init__(self, prefill, pool):
        self.prefill = prefill
        self.replays = 0
        self.lengths: list[int] = []
        self.replay()  # as a capture does
        Direct.runs.clear()

    def replay(self):
        with NoTransfer():
            self.prefill.run()
        self.lengths = [key.shape[2] for key, _ in self.prefill.result.cached]
        Direct.runs.append(self)


def use(monkeypatch):
    """Have prefills on a CPU take the static code; gives the list of its runs."""
    monkeypatch.setitem(graphs._RUNNERS, "cpu", (Direct, object))
    Direct.runs.clear()
    return Direct.runs
