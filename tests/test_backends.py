"""Which backend runs, how it is forced, and which parts work without Triton."""

import asyncio
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import reroute_kernels as rk
from reroute_kernels import backends
from reroute_kernels.backends import active_backend


@pytest.fixture(autouse=True)
def _nothing_forced(monkeypatch):
    monkeypatch.delenv("REROUTE_BACKEND", raising=False)
    with rk.backend(None):
        yield


def run_python(code, **environment):
    """Standard output of a fresh interpreter that sees no GPU."""
    hidden = {"TRITON_INTERPRET", "REROUTE_BACKEND"}
    kept = {name: value for name, value in os.environ.items() if name not in hidden}
    kept |= {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "", "PYTHONPATH": str(Path(rk.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], env=kept | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_all_operations(device):
    """One call of each, on tensors that are not empty."""
    flags = torch.ones(1, 4, dtype=torch.bool, device=device)
    hidden = torch.ones(1, 4, 8, device=device)
    scores = rk.ops.rank_tokens(hidden[:, :1, None], hidden[:, :, None])
    index = rk.ops.select_tokens(scores, flags, ~flags, 2, 2)
    (compact,) = rk.ops.gather_tokens(index, hidden)
    rk.ops.scatter_tokens_(hidden, index, compact)


KERNELS = ["attention_logits", "reduce_attention", "select_and_compact", "copy_rows_to_compact", "copy_rows_to_full"]


def test_device_chooses():
    assert active_backend("cpu") == "ref"
    assert active_backend(torch.device("cpu")) == "ref"
    assert active_backend("cuda") == "triton"
    assert active_backend("cuda:1") == "triton"
    assert active_backend("meta") == "ref"


def test_forced_triton_runs_the_kernels(device, launches):
    with rk.backend("triton"):
        run_all_operations(device)
    assert [name for name, _ in launches] == KERNELS


def test_forced_reference_runs_no_kernel(device, launches):
    with rk.backend("ref"):
        run_all_operations(device)
    assert launches == []


def test_device_chooses_what_runs(device, launches):
    run_all_operations(device)
    assert [name for name, _ in launches] == (KERNELS if device.type == "cuda" else [])


def test_blocks_nest(device):
    with rk.backend("ref"):
        assert active_backend("cuda") == "ref"
        with rk.backend("triton"):
            assert active_backend(device) == "triton"
            with rk.backend(None):
                assert active_backend("cpu") == "ref"
                assert active_backend("cuda") == "triton"
            assert active_backend(device) == "triton"
        assert active_backend("cuda") == "ref"
    assert active_backend("cuda") == "triton"


def test_block_ends_with_an_exception():
    with pytest.raises(KeyError), rk.backend("ref"):
        raise KeyError
    assert active_backend("cuda") == "triton"


def test_call_lasts_until_the_next():
    rk.backend("ref")
    assert active_backend("cuda") == "ref"
    with rk.backend("triton"):
        assert active_backend("cuda") == "triton"
    assert active_backend("cuda") == "ref"
    rk.backend(None)
    assert active_backend("cuda") == "triton"


def test_blocks_of_threads_that_overlap():
    first_in, second_in, first_out = threading.Event(), threading.Event(), threading.Event()
    seen = {}

    def first():
        with rk.backend("ref"):
            first_in.set()
            second_in.wait(30)
            seen["first"] = active_backend("cuda")
        first_out.set()

    def second():
        first_in.wait(30)
        seen["before"] = active_backend("cuda")
        with rk.backend("triton"):
            second_in.set()
            first_out.wait(30)
            seen["second"] = active_backend("cuda")
        seen["after"] = active_backend("cuda")

    threads = [threading.Thread(target=each) for each in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {"first": "ref", "before": "triton", "second": "triton", "after": "triton"}
    assert active_backend("cuda") == "triton"


def test_blocks_of_tasks_that_overlap():
    async def forced(name, others):
        with rk.backend(name):
            for _ in range(3):
                await asyncio.sleep(0)
                others.append((name, active_backend("cuda")))

    async def both():
        seen = []
        await asyncio.gather(forced("ref", seen), forced("triton", seen))
        return seen

    seen = asyncio.run(both())
    assert len(seen) == 6
    assert all(name == active for name, active in seen)
    assert active_backend("cuda") == "triton"


def test_one_object_for_several_blocks():
    forced = rk.backend("ref")
    assert active_backend("cuda") == "ref"
    for _ in range(2):
        with forced:
            assert active_backend("cuda") == "ref"
            with rk.backend("triton"), forced:
                assert active_backend("cuda") == "ref"
            assert active_backend("cuda") == "ref"
        assert active_backend("cuda") == "triton"


def forcing():
    """A generator that is suspended in a block."""
    with rk.backend("ref"):
        yield


def test_block_of_a_generator_that_ends_later():
    running = forcing()
    next(running)
    with rk.backend("triton"):
        running.close()
        assert active_backend("cuda") == "triton"
    assert active_backend("cuda") == "triton"


def test_block_of_a_generator_closed_in_another_thread():
    running = forcing()
    next(running)
    assert active_backend("cuda") == "ref"
    closed = in_thread(lambda: (running.close(), active_backend("cuda"))[1])
    assert closed == "triton"
    assert active_backend("cuda") == "triton"


def test_call_holds_in_every_thread(monkeypatch):
    monkeypatch.setattr(backends, "_calls", type(backends._calls)(maxlen=64))  # no block of this test is open there
    in_thread(lambda: rk.backend("ref"))
    assert in_thread(lambda: active_backend("cuda")) == "ref"
    with rk.backend("triton"):
        assert in_thread(lambda: active_backend("cuda")) == "ref"
    assert in_thread(lambda: active_backend("cuda")) == "ref"
    in_thread(lambda: rk.backend(None))
    assert in_thread(lambda: active_backend("cuda")) == "triton"


def test_blocks_that_begin_together_leave_the_call_before_them(monkeypatch):
    """Every object is made before any block begins, as when threads take turns."""
    monkeypatch.setattr(backends, "_calls", type(backends._calls)(maxlen=64))

    def overlapping():
        rk.backend("ref")
        first, second = rk.backend("triton"), rk.backend("triton")
        with first, second:
            assert active_backend("cuda") == "triton"
        return active_backend("cuda")

    assert in_thread(overlapping) == "ref"


@pytest.mark.parametrize("create_graph", [False, True])
def test_backward_runs_the_backend_of_the_forward(device, launches, create_graph):
    full = torch.randn(1, 4, 8, device=device, requires_grad=True)
    index = torch.tensor([[0, 2]], device=device)
    with rk.backend("triton"):
        (compact,) = rk.ops.gather_tokens(index, full)
        written = rk.ops.scatter_tokens_(full * 2, index, compact)
    launches.clear()
    in_thread(lambda: torch.autograd.grad(written.square().sum(), full, create_graph=create_graph))
    assert {name for name, _ in launches} == {"copy_rows_to_compact", "copy_rows_to_full"}


def in_thread(function):
    """Run a function in a thread of its own, which sees none of this one's blocks."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result(60)


def test_call_inside_a_block_ends_with_it():
    with rk.backend("triton"):
        rk.backend("ref")
        assert active_backend("cuda") == "ref"
    assert active_backend("cuda") == "triton"


def test_environment_forces(device, monkeypatch, launches):
    monkeypatch.setenv("REROUTE_BACKEND", "ref")
    assert active_backend("cuda") == "ref"
    monkeypatch.setenv("REROUTE_BACKEND", "triton")
    assert active_backend(device) == "triton"
    run_all_operations(device)
    assert [name for name, _ in launches] == KERNELS
    monkeypatch.setenv("REROUTE_BACKEND", "")
    assert active_backend("cpu") == "ref"


def test_code_goes_before_environment(monkeypatch):
    monkeypatch.setenv("REROUTE_BACKEND", "triton")
    with rk.backend("ref"):
        assert active_backend("cuda") == "ref"
    monkeypatch.setenv("REROUTE_BACKEND", "ref")
    with rk.backend("triton"):
        assert active_backend("cuda") == "triton"


@pytest.mark.parametrize("name", ["cuda", "Triton", "", 1])
def test_unknown_name_is_refused(name):
    rk.backend("ref")
    with pytest.raises(ValueError, match=f"^name must be one of 'ref', 'triton', got {name!r}$"):
        rk.backend(name)
    assert active_backend("cuda") == "ref"


def test_unknown_name_in_the_environment_is_refused(device, monkeypatch):
    monkeypatch.setenv("REROUTE_BACKEND", "eager")
    message = "^REROUTE_BACKEND must be one of 'ref', 'triton', got 'eager'$"
    with pytest.raises(ValueError, match=message):
        active_backend("cpu")
    with pytest.raises(ValueError, match=message):
        run_all_operations(device)


def test_triton_runs_on_no_other_device():
    with rk.backend("triton"), pytest.raises(RuntimeError, match="'triton' is forced and cannot run tensors on meta"):
        active_backend("meta")


def test_import_loads_neither_triton_nor_transformers():
    code = """
import sys
import torch
before = set(sys.modules)
import reroute_kernels
print({name.partition(".")[0] for name in set(sys.modules) - before} & {"triton", "transformers"})
"""
    assert run_python(code) == "set()\n"


TRY_TRITON = """
import reroute_kernels as rk
from reroute_kernels.backends import active_backend

for force in (lambda: rk.backend("triton"), lambda: active_backend("cpu")):
    try:
        print(force())
    except RuntimeError as error:
        print(error)
"""


def test_triton_without_a_device_is_refused():
    said = "the backend 'triton' needs a CUDA or ROCm device, or TRITON_INTERPRET=1 set before triton is imported"
    output = run_python(TRY_TRITON, REROUTE_BACKEND="triton")
    assert output.splitlines() == [f"name: {said}", f"REROUTE_BACKEND: {said}"]


# Every finder overlooks triton, as if it were not installed.
WITHOUT_TRITON = """
import sys

class Overlooking:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] == "triton" else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = [Overlooking(finder) for finder in sys.meta_path]
"""


def test_without_triton_forcing_it_is_refused():
    said = "the backend 'triton' needs the package triton, which is not installed"
    output = run_python(WITHOUT_TRITON + TRY_TRITON, REROUTE_BACKEND="triton")
    assert output.splitlines() == [f"name: {said}", f"REROUTE_BACKEND: {said}"]


def test_without_triton_the_reference_runs():
    code = """
import torch
import reroute_kernels as rk
from reroute_kernels.backends import active_backend

scores = rk.ops.rank_tokens(torch.ones(1, 1, 2, 8), torch.ones(1, 4, 2, 8))
flags = torch.ones(1, 4, dtype=torch.bool)
index = rk.ops.select_tokens(scores, flags, ~flags, 2, 3)
(compact,) = rk.ops.gather_tokens(index, torch.arange(4.0)[None])
rk.ops.scatter_tokens_(torch.zeros(1, 4), index, compact)
print(scores.tolist(), index.tolist(), compact.tolist(), active_backend("cpu"), active_backend("cuda"))
try:
    rk.triton
except ModuleNotFoundError as error:
    print(error)
"""
    assert run_python(WITHOUT_TRITON + code).splitlines() == [
        "[[0.25, 0.25, 0.25, 0.25]] [[0, 1, -1]] [[0.0, 1.0, 0.0]] ref ref",
        "No module named 'triton'",
    ]
