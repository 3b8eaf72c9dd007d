"""What this library finds on a machine, and whether its operations run there."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch

from . import ops, ref
from .backends import active_backend
from .notation import first_line


@dataclass
class Device:
    """A device, and what came of trying it."""

    device: str
    name: str
    backend: str | None = None
    """Which backend would run here; None where none can."""
    tried: bool = False
    """Whether `route_tokens` was called here and its result, if there was one, compared."""
    error: str | None = None
    """Why no backend can run, or what went wrong in the call."""


def versions() -> dict[str, str | None]:
    """Versions of what matters here, and of what torch is built for; None for what is missing."""
    return {
        "python": platform.python_version(),
        "reroute-kernels": _version("reroute-kernels"),
        "torch": str(torch.__version__),
        "torch.version.cuda": torch.version.cuda,
        "torch.version.hip": torch.version.hip,
        "triton": _version("triton"),
        "transformers": _version("transformers"),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def try_devices() -> list[Device]:
    """The CPU and every CUDA or ROCm device; a decision is made on each of these, on the CPU where there are none."""
    devices = [Device("cpu", platform.processor() or platform.machine())]
    devices += [
        Device(f"cuda:{number}", torch.cuda.get_device_name(number)) for number in range(torch.cuda.device_count())
    ]
    for number, device in enumerate(devices):
        try:
            device.backend = active_backend(device.device)
        except (ValueError, RuntimeError) as error:
            device.error = first_line(error)
        if number or len(devices) == 1:
            device.tried = True
            try:
                check_decision(device.device)
            except Exception as error:
                device.error = first_line(error)
    return devices


def check_decision(device: str) -> None:
    """Make one small decision by `ops.route_tokens` on a device and hold it against the reference on the CPU.

    Raises:
        RuntimeError: they differ; the errors of the operation pass through.
    """
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, tokens, heads, 32, generator=generator) for tokens, heads in ((1, 4), (48, 2)))
    hidden = torch.randn(1, 48, 16, generator=generator)
    pool = torch.zeros(1, 48, dtype=torch.bool)
    pool[:, 4:40] = True
    keep, length = torch.tensor([9]), 48 - 36 + 9
    expected, (expected_rows,) = ref.route_tokens(
        query, key, pool=pool, pinned=~pool, keep=keep, length=length, tensors=(hidden,)
    )
    query, key, hidden, pool, keep = (tensor.to(device) for tensor in (query, key, hidden, pool, keep))
    index, (rows,) = ops.route_tokens(query, key, pool=pool, pinned=~pool, keep=keep, length=length, tensors=(hidden,))
    if not torch.equal(index.cpu(), expected):
        raise RuntimeError(f"route_tokens must keep {expected[0].tolist()}, as the reference, got {index[0].tolist()}")
    if not torch.equal(rows.cpu(), expected_rows):
        raise RuntimeError("route_tokens must copy the rows that it keeps, as the reference, got others")
