"""Launches of a call, planned once for all calls with tensors of the same layout.

A launch by Triton's own way costs the host about 9 microseconds: it binds the arguments, and looks for the compiled
kernel by all of them. A plan keeps the compiled kernels, and in later calls only fills in addresses.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from operator import itemgetter
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .launch import cdiv

MAX_PLANS = 4096
"""Plans that are kept; the oldest goes."""
OVERLAPS = os.environ.get("REROUTE_OVERLAP") == "1"
"""Whether a launch may start before the one that precedes it ends, on CUDA devices of capability 9.0 or above."""
_ALIGNMENT = 128
"""Bytes between the places of scratch tensors."""

Make = Callable[[Sequence[Any]], Tensor]


class Slot(NamedTuple):
    """Stands for a tensor in the arguments of a planned launch."""

    number: int


class _Launch:
    """One kernel launch, known but for its tensors.

    Args:
        kernel: a function that `triton.jit` decorates.
        grid: its programs.
        arguments: the numbers of its arguments among the values of the plan.
        options: of the launch.
    """

    def __init__(self, kernel: Any, grid: tuple[int, ...], arguments: list[int], options: dict[str, Any]):
        self._kernel = kernel
        self._grid = grid
        self._arguments = itemgetter(*arguments)
        self._options = options
        self._run: Any = None
        self._fixed: tuple[Any, ...] = ()

    def compile(self, values: Sequence[Any]) -> bool:
        """Launch as Triton does, and keep the compiled kernel; returns whether there is one: its interpreter has none.

        Args:
            values: of the plan; tensors are given as they are.
        """
        compiled = self._kernel[self._grid](*self._arguments(values), **self._options)
        if compiled is None:
            return False
        self._run = compiled.run
        self._fixed = (*(*self._grid, 1, 1)[:3], compiled.function, compiled.packed_metadata)
        return True

    def start(self, values: Sequence[Any], stream: Any) -> None:
        """Launch the compiled kernel on a stream, without launch hooks; tensors are given by address."""
        x, y, z, function, metadata = self._fixed
        self._run(x, y, z, stream, function, metadata, None, None, None, *self._arguments(values))


class Plan:
    """Launches of a call, for inputs of one layout: shapes, strides, dtypes and alignment.

    It is made by its functions, called in the order of the work, then kept, and run any number of times by any thread.

    Args:
        inputs: tensors of the call, or None in the place of one that is not given.
    """

    def __init__(self, inputs: Sequence[Tensor | None]):
        self.tensors: list[Tensor | None] = list(inputs)
        """The inputs, as kernels read them."""
        self._inputs = len(self.tensors)
        self._device = next(x.device for x in inputs if x is not None)
        self._prepared: list[tuple[int, Make]] = []
        self._results: list[tuple[tuple[int, ...], tuple[int, ...], torch.dtype]] = []  # shape, strides, dtype
        self._scratch: dict[int, torch.dtype] = {}  # by offset in the workspace
        self._scratch_bytes = 0
        self._others: list[tuple[bool, int]] = []  # whether it is a result; its number, or its offset in the workspace
        self._planned: list[tuple[Any, tuple[int, ...], dict[str, Any]]] = []
        # Values that arguments are taken from: inputs, results and scratch by slot, tuples of these, other objects.
        self._tuples: list[list[int]] = []
        self._objects: list[Any] = []
        self._launches: list[_Launch] = []
        self._is_compiled = False

    @property
    def is_cuda(self) -> bool:
        """Whether the device is one of CUDA, not of AMD's; the interpreter does as if it were."""
        target = self._target()
        return target is None or target.backend == "cuda"

    def _target(self) -> Any:
        """The target that kernels are compiled for; None in the interpreter."""
        if triton.knobs.runtime.interpret:
            return None
        with _on_device(self._device):
            return triton.runtime.driver.active.get_current_target()

    def prepare(self, number: int, make: Make) -> Tensor:
        """Replace an input, in each call, by what `make` makes of the inputs; returned for this one."""
        self._prepared.append((number, make))
        self.tensors[number] = tensor = make(self.tensors)
        return tensor

    def result(self, *shape: int, dtype: torch.dtype) -> Slot:
        """Add a tensor that each call returns, contiguous and uninitialized."""
        self._results.append((shape, tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape))), dtype))
        return self._slot(True, len(self._results) - 1)

    def scratch(self, *shape: int, dtype: torch.dtype) -> Slot:
        """Add an uninitialized tensor for the time of a call; all of them are one allocation."""
        offset = self._scratch_bytes
        self._scratch[offset] = dtype
        self._scratch_bytes += cdiv(max(1, math.prod(shape)) * dtype.itemsize, _ALIGNMENT) * _ALIGNMENT
        return self._slot(False, offset)

    def _slot(self, is_result: bool, place: int) -> Slot:
        self._others.append((is_result, place))
        return Slot(self._inputs + len(self._others) - 1)

    def launch(self, kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
        """Add a launch.

        Args:
            kernel: a function that `triton.jit` decorates.
            grid: its programs.
            arguments: of the kernel, by name, in which slots stand for tensors; and launch options. `FOLLOWS`, whether
                a launch may start before the one that precedes it ends, is added to them.
        """
        target = self._target() if OVERLAPS else None
        arguments["FOLLOWS"] = target is not None and target.backend == "cuda" and target.arch >= 90
        if arguments["FOLLOWS"]:
            arguments["launch_pdl"] = True  # no option of other devices
        self._planned.append((kernel, grid, arguments))

    def close(self) -> None:
        """End the plan: number the arguments of its launches, and let go of the tensors it was made with."""
        for kernel, grid, arguments in self._planned:
            numbers = [self._number(arguments.pop(name)) for name in kernel.arg_names]
            self._launches.append(_Launch(kernel, grid, numbers, {"enable_fp_fusion": True, **arguments}))
        self._objects.reverse()
        self._planned.clear()
        self.tensors.clear()

    def _number(self, value: Any) -> int:
        """Number of an argument among the values; other objects are counted from the end."""
        if isinstance(value, Slot):
            return value.number
        if isinstance(value, tuple) and value and isinstance(value[0], Slot):
            self._tuples.append([slot.number for slot in value])
            return self._inputs + len(self._others) + len(self._tuples) - 1
        self._objects.append(value)
        return -len(self._objects)

    def run(self, inputs: Sequence[Tensor | None]) -> list[Tensor]:
        """Launch for tensors of the plan's layout; returns the results."""
        if self._prepared:
            inputs = list(inputs)
            for number, make in self._prepared:
                inputs[number] = make(inputs)
        device = self._device
        # Faster on the host than `torch.empty`, which reads its arguments in more ways.
        results = [
            torch.empty_strided(shape, strides, dtype=dtype, device=device) for shape, strides, dtype in self._results
        ]
        if not self._launches:  # nothing to do for empty tensors
            return results
        workspace = None
        if self._scratch_bytes:
            workspace = torch.empty_strided((self._scratch_bytes,), (1,), dtype=torch.uint8, device=device)
        with _on_device(device):
            if self._is_compiled and not _hooked():
                self._start(inputs, results, workspace)
            else:
                self._compile(inputs, results, workspace)
        return results

    def _start(self, inputs: Sequence[Tensor | None], results: list[Tensor], workspace: Tensor | None) -> None:
        base = 0 if workspace is None else workspace.data_ptr()
        values: list[Any] = [None if x is None else x.data_ptr() for x in inputs]
        values += [results[place].data_ptr() if is_result else base + place for is_result, place in self._others]
        values += [tuple([values[number] for number in numbers]) for numbers in self._tuples]
        values += self._objects
        driver = triton.runtime.driver.active
        stream = driver.get_current_stream(driver.get_current_device())
        for launch in self._launches:
            launch.start(values, stream)

    def _compile(self, inputs: Sequence[Tensor | None], results: list[Tensor], workspace: Tensor | None) -> None:
        pieces = {}
        if workspace is not None:
            pieces = {offset: workspace[offset:].view(dtype) for offset, dtype in self._scratch.items()}
        values: list[Any] = list(inputs)
        values += [results[place] if is_result else pieces[place] for is_result, place in self._others]
        values += [tuple([values[number] for number in numbers]) for numbers in self._tuples]
        values += self._objects
        compiled = [launch.compile(values) for launch in self._launches]
        self._is_compiled = all(compiled)


_plans: dict[Hashable, Plan] = {}


def layout(tensors: Iterable[Tensor | None]) -> Hashable:
    """Everything of tensors that a plan depends on."""
    return tuple(
        [
            None if x is None else (x.shape, x.stride(), x.dtype, x.data_ptr() & 15, x.get_device(), x.is_neg())
            for x in tensors
        ]
    )


def find_plan(key: Hashable) -> Plan | None:
    """The plan that was kept for a key."""
    return _plans.get(key)


def keep_plan(key: Hashable, plan: Plan) -> Plan:
    """Close a plan and keep it for later calls; the oldest goes if there are too many."""
    plan.close()
    while len(_plans) >= MAX_PLANS:
        _plans.pop(next(iter(_plans)), None)
    _plans[key] = plan
    return plan


def forget_plans() -> None:
    """Drop every plan; the compiled kernels stay with Triton."""
    _plans.clear()


def _hooked() -> bool:
    """Whether someone, a profiler say, wants to see each launch by Triton's own way."""
    runtime = triton.knobs.runtime
    for hook in (runtime.launch_enter_hook, runtime.launch_exit_hook):
        if hook is not None and getattr(hook, "calls", True):
            return True
    return False


_HERE = nullcontext()


def _on_device(device: torch.device) -> AbstractContextManager:
    """Makes a device current: Triton launches on the current device, whatever its pointers say."""
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        return torch.cuda.device(device)
    return _HERE
