"""Cost of a decision for the host, measured without a GPU.

    python -m bench.speed.host

Triton's real compiler and launcher run, linked against a driver library of which every function succeeds and does
nothing (stub_driver.c). Tensors are on the CPU, and no kernel writes to them. The time of the real driver is not in it.
It needs a C compiler, as Triton does.
"""

from __future__ import annotations

import cProfile
import ctypes
import json
import os
import pstats
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.source_tree import make_importable
from bench.speed.decisions import SHAPES

make_importable()
STUB = Path(__file__).with_name("stub_driver.c")
QWEN = SHAPES[1]
PROMPTS, SHORTEST, LONGEST = 120, 300, 4000
"""Random prompts, and the tokens of the shortest and the longest."""


def build_driver(folder: Path) -> Path:
    """Compile the stand-in for the driver library."""
    library = folder / "libcuda.so.1"
    subprocess.run(["cc", "-shared", "-fPIC", "-w", "-o", library, STUB], check=True)
    (folder / "libcuda.so").symlink_to(library.name)
    return library


def measure_in_new_process(folder: Path) -> dict[str, Any]:
    """Results of `measure`, in a process of its own: Triton finds its driver once.

    Args:
        folder: empty, for the driver library and for compiled kernels.
    """
    library = build_driver(folder)
    environment = os.environ | {
        "TRITON_INTERPRET": "0",
        "TRITON_LIBCUDA_PATH": str(folder),
        "TRITON_CACHE_DIR": str(folder / "kernels"),
        "LD_LIBRARY_PATH": str(folder),
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path]),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "bench.speed.host", str(library)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout)


def install(library: Path) -> Callable[[], int]:
    """Let Triton launch on a stand-in for an H100, with tensors of the CPU; returns a count of its launches."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaLauncher, CudaUtils

    from reroute_kernels import backends

    class Driver:
        def __init__(self):
            self.utils = CudaUtils()
            self.launcher_cls = CudaLauncher
            self.get_current_device = lambda: 0
            self.get_current_stream = lambda device: 0
            self.get_current_target = lambda: GPUTarget("cuda", 90, 32)
            self.get_device_capability = lambda device=0: (9, 0)

    triton.runtime.driver.set_active(Driver())
    backends.active_backend = lambda device: "triton"
    launches = ctypes.CDLL(str(library)).stub_launches
    launches.restype = ctypes.c_long
    return launches


def microseconds(call: Callable[[], object], rounds: int = 400) -> float:
    """Median of many calls."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1e6 * sorted(times)[rounds // 2]


def python_calls(call: Callable[[], object]) -> int:
    """Functions, built-in ones too, that one call calls."""
    profile = cProfile.Profile()
    profile.enable()
    call()
    profile.disable()
    return pstats.Stats(profile).total_calls - 1  # less that of `disable`


def compiled_kernels() -> int:
    """Kernels that this process has compiled or loaded."""
    from triton.runtime.jit import JITFunction

    from reroute_kernels import triton as kernels

    prefix = f"{kernels.__name__}."
    modules = [module for name, module in list(sys.modules.items()) if name.startswith(prefix)]
    functions = {id(f): f for module in modules for f in vars(module).values() if isinstance(f, JITFunction)}
    return sum(len(caches[0]) for f in functions.values() for caches in f.device_caches.values())


def measure_decision(launches: Callable[[], int]) -> dict[str, Any]:
    """Microseconds, Python calls and launches of a decision of LLaVA-1.5-7B and of its parts."""
    import torch

    from bench.speed.decisions import Decision
    from reroute_kernels import ref

    decision = Decision(SHAPES[0], 1, torch.device("cpu"), torch.bfloat16)
    vars(decision)["scores"] = torch.rand(1, SHAPES[0].length)
    vars(decision)["index"] = ref.select_tokens(decision.scores, **decision.selection)
    vars(decision)["compact"] = ref.gather_tokens(decision.index, decision.hidden)[0]
    result = {}
    for name, call in decision.calls().items():
        for _ in range(20):
            call()
        before = launches()
        call()
        result[name] = {
            "launches": launches() - before,
            "python_calls": python_calls(call),
            "microseconds": microseconds(call),
        }
    return result


def launches_seen_by_a_hook(launches: Callable[[], int]) -> dict[str, int]:
    """Launches of a decision while a hook wants to see each, as profilers do, and how many it saw."""
    import torch
    import triton

    import reroute_kernels as rk
    from bench.speed.decisions import Decision

    decision = Decision(SHAPES[0], 1, torch.device("cpu"), torch.bfloat16)
    seen: list[object] = []
    rk.ops.rank_tokens(**decision.ranking)
    triton.knobs.runtime.launch_enter_hook.add(seen.append)
    before = launches()
    rk.ops.rank_tokens(**decision.ranking)
    triton.knobs.runtime.launch_enter_hook.remove(seen.append)
    return {"launches": launches() - before, "seen": len(seen)}


def launches_of_threads(launches: Callable[[], int], threads: int = 4, calls: int = 32) -> int:
    """Launches of decisions that threads make at once, none of which was planned before."""
    import torch

    import reroute_kernels as rk
    from bench.speed.decisions import Decision
    from reroute_kernels.triton.plan import forget_plans

    decision = Decision(SHAPES[0], 1, torch.device("cpu"), torch.bfloat16)
    forget_plans()
    before = launches()
    with ThreadPoolExecutor(threads) as pool:
        made = [pool.submit(rk.ops.route_tokens, **decision.ranking, **decision.selection) for _ in range(calls)]
        for future in made:
            future.result()
    return launches() - before


def warm_up() -> int:
    """Compile for Qwen2.5-VL-7B, of which two layers are made, without their MLP; returns how many kernels."""
    import torch

    import reroute_kernels as rk
    from bench.speed.prefill import Decoder, make_model

    decoder = Decoder("Qwen2.5-VL-7B", "qwen2_5_vl", 2, QWEN.hidden, QWEN.heads, QWEN.kv_heads, 8)
    model = make_model(decoder, LONGEST, torch.device("cpu"), torch.bfloat16)
    before = compiled_kernels()
    rk.warm_up(model, rk.Policy([rk.Stage(1, QWEN.keep)]), range(SHORTEST, LONGEST + 1))
    return compiled_kernels() - before


def measure_prompts() -> dict[str, Any]:
    """Kernels that random prompts of Qwen2.5-VL-7B compile."""
    import torch

    import reroute_kernels as rk
    from bench.speed.decisions import Decision

    draw, before = random.Random(0), compiled_kernels()
    stalls = []
    for _ in range(PROMPTS):
        shape = replace(QWEN, length=draw.randint(SHORTEST, LONGEST))
        decision = Decision(shape, 1, torch.device("cpu"), torch.bfloat16, torch.empty)
        count = decision.selection["length"]
        compact = torch.empty(1, count, shape.hidden, dtype=torch.bfloat16)
        index = torch.zeros(1, count, dtype=torch.int64)
        known, start = compiled_kernels(), time.perf_counter()
        rk.ops.route_tokens(**decision.ranking, **decision.selection, tensors=decision.rows)
        rk.ops.scatter_tokens_(decision.hidden, index, compact)
        if compiled_kernels() > known:
            stalls.append(time.perf_counter() - start)
    return {
        "kernels": compiled_kernels() - before,
        "stalls": len(stalls),
        "longest_stall_seconds": max(stalls, default=0.0),
    }


def measure(library: Path) -> dict[str, Any]:
    """Everything, in a process that `measure_in_new_process` began."""
    launches = install(library)
    kernels = warm_up()
    return {
        "prompts": {
            "count": PROMPTS,
            "tokens": [SHORTEST, LONGEST],
            "kernels_of_warm_up": kernels,
            **measure_prompts(),
        },
        "decision": measure_decision(launches),
        "hook": launches_seen_by_a_hook(launches),
        "threads": launches_of_threads(launches),
    }


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(measure(Path(sys.argv[1]))))
    else:
        with tempfile.TemporaryDirectory() as name:
            print(json.dumps(measure_in_new_process(Path(name)), indent=1))
