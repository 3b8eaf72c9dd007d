"""Fixtures of every test: a device or the interpreter, dirty memory, fixed seeds, and awkward memory layouts."""

import importlib.util
import os
import random
import sys
from collections import defaultdict

import pytest
import torch

HAS_GPU = torch.cuda.is_available()

# Triton decides when it is imported whether kernels run in its interpreter.
if not HAS_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    if (cases := config.getoption("cases")) != "all":
        left = left_out(items)
        kept, deselected = [], []
        for item in items:
            (kept if (item in left) == (cases == "rest") else deselected).append(item)
        config.hook.pytest_deselected(items=deselected)
        items[:] = kept
    if not HAS_GPU:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA or ROCm device"))


def left_out(items) -> set:
    """The items that `make test` does not run: those marked so, and all but n of the cases of `everyday(n)` tests.

    The n are drawn by the name of the test.
    """
    cases = defaultdict(list)
    left = {item for item in items if item.get_closest_marker("rest")}
    for item in items:
        if item.get_closest_marker("everyday"):
            cases[item.nodeid.split("[")[0]].append(item)
    for name, those in cases.items():
        (count,) = those[0].get_closest_marker("everyday").args
        left |= {*those} - {*random.Random(name).sample(those, min(count, len(those)))}
    return left


@pytest.fixture(autouse=True, scope="session")
def _fast_interpreter():
    """Leave out what Triton's interpreter repeats for each call of a function in a kernel."""
    if HAS_GPU or importlib.util.find_spec("triton") is None:
        yield
        return
    from bench.interpreter import patch_language_once

    with pytest.MonkeyPatch.context() as patch:
        patch_language_once(patch.setattr)
        yield


@pytest.fixture(autouse=True)
def _dirty_memory():
    """Fill the results of `torch.empty` with NaN or the largest integer, so that an element never written shows."""
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.fixture(autouse=True)
def _plans_anew():
    """Forget how kernels are launched: a test may have changed the limits that plans are made by."""
    if module := sys.modules.get("reroute_kernels.triton.plan"):
        module.forget_plans()


@pytest.fixture(autouse=True)
def _full_precision():
    """The reference on a GPU is float32, whatever the machine's settings say."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def device():
    return torch.device("cuda", torch.cuda.current_device()) if HAS_GPU else torch.device("cpu")


@pytest.fixture(scope="session")
def tiny_llava(tmp_path_factory):
    """A checkpoint folder: 32 layers, 576 visual tokens, random weights."""
    from tests.tiny_llava import write

    folder = tmp_path_factory.mktemp("tiny_llava")
    write(folder)
    return str(folder)


@pytest.fixture(params=["ref", "triton"])
def operations(request):
    """The operations of one backend."""
    import reroute_kernels as rk

    return getattr(rk, request.param)


@pytest.fixture
def launches(monkeypatch):
    """(name, grid) of every Triton kernel launched during the test, in order."""
    from triton.runtime.jit import KernelInterface

    launch_on = KernelInterface.__getitem__
    launched = []

    def recording(kernel, grid):
        def launch(*args, **kwargs):
            launched.append((kernel.__name__, grid))
            return launch_on(kernel, grid)(*args, **kwargs)

        return launch

    monkeypatch.setattr(KernelInterface, "__getitem__", recording)
    return launched


@pytest.fixture
def interpreter_rounds_to_nearest(monkeypatch):
    """Triton's interpreter rounds float32 to bfloat16 as compiled kernels do, where its own way is to cut bits off."""
    if HAS_GPU:
        return
    from triton import language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def converted(data, source, target, rounding):
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(data, source, target, rounding)
        return torch.from_numpy(data.copy()).to(torch.bfloat16).view(torch.int16).numpy().view("uint16")

    monkeypatch.setattr(interpreter, "_convert_float", converted)


@pytest.fixture
def random_tensor(device):
    """Makes tensors of random values, over the whole range of an integer dtype."""

    def make(*shape, dtype=torch.float32):
        if dtype == torch.bool:
            return (torch.rand(shape) < 0.5).to(device)
        if dtype.is_floating_point:
            return torch.randn(shape).to(device, dtype)
        limits = torch.iinfo(dtype)
        return torch.randint(limits.min, limits.max, shape, dtype=dtype).to(device)

    return make


@pytest.fixture
def random_index(device):
    """Makes kept indices as `select_tokens` does: ascending, then -1 if a sample has fewer."""

    def make(batch, length, width):
        rows = []
        for sample in range(batch):
            count = max(1, width - sample)
            rows.append(torch.randperm(length)[:count].sort().values.tolist() + [-1] * (width - count))
        return torch.tensor(rows, device=device)

    return make


def _poison(tensor):
    return torch.full_like(tensor, torch.nan if tensor.is_floating_point() else 77)


def _every_other_channel(tensor):
    return torch.stack((tensor, _poison(tensor)), dim=-1).flatten(-2)[..., ::2]


def _part_of_wider_rows(tensor):
    return torch.cat((_poison(tensor), tensor, _poison(tensor)), dim=-1).narrow(-1, tensor.shape[-1], tensor.shape[-1])


def _transposed(tensor):
    dims = (1, 2) if tensor.ndim > 2 else (0, 1)
    return tensor.transpose(*dims).contiguous().transpose(*dims)


def _offset_by_one(tensor):
    flat = torch.cat((_poison(tensor).flatten()[:1], tensor.flatten()))
    return flat[1:].view(tensor.shape)


def _every_other_sample(tensor):
    return torch.stack((tensor, _poison(tensor)), dim=1).flatten(0, 1)[::2]


def _every_other_token(tensor):
    return torch.stack((tensor, _poison(tensor)), dim=2).flatten(1, 2)[:, ::2]


def _expanded_samples(tensor):
    return tensor[:1].expand(tensor.shape)


def _expanded_channels(tensor):
    return tensor[..., :1].expand(tensor.shape)


# Each turns a (B, L, ...) tensor into a view of the same shape; the memory between its elements is poisoned.
WRITABLE_LAYOUTS = {
    "every-other-channel": _every_other_channel,
    "part-of-wider-rows": _part_of_wider_rows,
    "transposed": _transposed,
    "offset-by-one": _offset_by_one,
    "every-other-sample": _every_other_sample,
    "every-other-token": _every_other_token,
}
LAYOUTS = WRITABLE_LAYOUTS | {"expanded-samples": _expanded_samples, "expanded-channels": _expanded_channels}


@pytest.fixture(params=LAYOUTS.values(), ids=LAYOUTS)
def layout(request):
    return request.param


@pytest.fixture(params=WRITABLE_LAYOUTS.values(), ids=WRITABLE_LAYOUTS)
def writable_layout(request):
    return request.param


@pytest.fixture
def far_apart(tmp_path, device):
    """Makes (1, 4, width) views whose rows lie 2**30 elements apart, so that offsets pass the range of int32."""

    def make(width, dtype):
        stride = 2**30
        elements = 3 * stride + width
        if device.type == "cpu":  # a sparse file takes no memory for untouched pages
            storage = torch.from_file(str(tmp_path / f"{dtype}"), shared=True, size=elements, dtype=dtype)
        else:
            storage = torch.zeros(elements, dtype=dtype, device=device)
        return storage.as_strided((1, 4, width), (4 * stride, stride, 1))

    yield make
    if device.type == "cuda":
        torch.cuda.empty_cache()  # tests run beside each other
