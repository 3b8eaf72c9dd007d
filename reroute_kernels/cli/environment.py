"""Report of the installation: versions, devices, and whether it can route. Nothing here needs more than torch."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor

from .. import ops, ref
from ..backends import active_backend
from ..policy import Policy, Stage
from ..versions import SUPPORTED, install_command
from .arguments import first_line


@dataclass
class Device:
    """A device, and the result of trying it."""

    device: str
    name: str
    backend: str | None = None
    """Which backend would run here; None if none can."""
    tried: bool = False
    """Whether `route_tokens` was called here and its result, if there was one, compared."""
    error: str | None = None
    """Why no backend can run, or the error of the call."""


def versions() -> dict[str, str | None]:
    """Versions of the packages that matter here, and of the CUDA or ROCm of torch's build; None for missing ones."""
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
    """The CPU and every CUDA or ROCm device; a decision is made on each of these, on the CPU if there are none."""
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
    generator = torch.Generator("cpu").manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")

    query, key, hidden = drawn(1, 1, 4, 32), drawn(1, 48, 2, 32), drawn(1, 48, 16)
    pool = torch.zeros(1, 48, dtype=torch.bool, device="cpu")
    pool[:, 4:40] = True
    keep, length = torch.tensor([9], device="cpu"), 48 - 36 + 9
    expected, (expected_rows,) = ref.route_tokens(
        query, key, pool=pool, pinned=~pool, keep=keep, length=length, tensors=(hidden,)
    )
    query, key, hidden, pool, keep = (tensor.to(device) for tensor in (query, key, hidden, pool, keep))
    index, (rows,) = ops.route_tokens(query, key, pool=pool, pinned=~pool, keep=keep, length=length, tensors=(hidden,))
    if not torch.equal(index.cpu(), expected):
        raise RuntimeError(f"route_tokens must keep {expected[0].tolist()}, as the reference, got {index[0].tolist()}")
    if not torch.equal(rows.cpu(), expected_rows):
        raise RuntimeError("route_tokens must copy the rows that it keeps, as the reference, got others")


def check_model(device: str) -> None:
    """Route a prompt through a model of transformers: one shaped like the shipped one, with random weights.

    At keep 1.0 its logits must be those of the unrouted model, in the prompt and in the step after it; at 0.25 the
    decision must keep a quarter of the visual tokens.

    Raises:
        RuntimeError: one of these does not hold; the errors of `apply`, of the model and of a missing transformers pass
            through.
    """
    from transformers import AutoConfig, LlavaForConditionalGeneration

    from reroute_kernels import models

    config = AutoConfig.from_pretrained(Path(models.__file__).with_name("tiny_grounding"))
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = LlavaForConditionalGeneration(config).to(device, torch.float32).eval()
        size, visual = config.vision_config.image_size, config.image_seq_length
        pixels = torch.randn(1, 3, size, size, dtype=torch.float32, device="cpu")
    models.apply(model, Policy([Stage(3, 0.25)])).remove()  # names the part that is built differently
    tokens = torch.full((1, visual + 8), 5, device="cpu")
    tokens[:, 4 : visual + 4] = config.image_token_id

    def logits() -> torch.Tensor:
        answer = model.generate(
            input_ids=tokens.to(device),
            attention_mask=torch.ones_like(tokens).to(device),
            pixel_values=pixels.to(device),
            max_new_tokens=2,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
        return torch.stack(answer.logits)

    expected = logits()
    with models.apply(model, Policy([Stage(3, 1.0), Stage(7, 1.0)])):
        difference = (logits() - expected).abs().max().item()
    if not difference < 1e-3:
        raise RuntimeError(f"logits at keep 1.0 must be those of the unrouted model, got a difference of {difference}")
    with models.apply(model, Policy([Stage(3, 0.25)])) as routing:
        logits()
    kept = None if routing.trace is None else len(routing.trace.stages[0].selected[0])
    if kept != visual // 4:
        raise RuntimeError(f"a decision must keep {visual // 4} of {visual} visual tokens, got {kept}")


def problems(devices: Sequence[Device]) -> list[str]:
    """Why this installation cannot route, a line for each reason; none if it can.

    Args:
        devices: as `try_devices` gives them.
    """
    found, needed = versions(), ["python", "torch", "transformers"]
    if any(device.backend == "triton" for device in devices):
        needed.append("triton")
    reasons = [
        f"{name} must be {SUPPORTED[name].oldest} or later, got {found[name]}"
        for name in needed
        if found[name] is not None and SUPPORTED[name].is_older(found[name])
    ]
    reasons += [f"{device.device}: {device.error}" for device in devices if device.tried and device.error]
    if reasons:
        return reasons  # a model would fail for the same ones
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a version that is newer than the tested ones is shown beside them
            check_model(next(device.device for device in devices if device.tried))
    except ModuleNotFoundError as error:
        return [f"routing a model needs {error.name}: {install_command(error)}"]
    except Exception as error:
        return [f"routing a model of transformers {found['transformers']}: {first_line(error)}"]
    return []


def report(as_json: bool = False) -> int:
    """Print installed and supported versions, and the result of trying them; the reasons not to route go to stderr.

    Returns:
        The exit code: 1 if this installation cannot route.
    """
    devices, forced = try_devices(), os.environ.get("REROUTE_BACKEND") or None
    reasons = problems(devices)
    if as_json:
        told = {
            "versions": versions(),
            "supported": {name: str(supported) for name, supported in SUPPORTED.items()},
            "REROUTE_BACKEND": forced,
            "devices": [asdict(device) for device in devices],
            "problems": reasons,
        }
        print(json.dumps(told, indent=2))
    else:
        _print_columns([("", "installed", "supported", ""), *map(_version_row, versions().items())])
        print()
        _print_columns([("device", "name", "backend", "route_tokens"), *map(_device_row, devices)])
        print(f"\nREROUTE_BACKEND: {forced or 'not set'}")
        print("This installation cannot route a model." if reasons else "This installation routes a tiny model.")
    for reason in reasons:
        print(f"reroute-kernels: {reason}", file=sys.stderr)
    return int(bool(reasons))


def _version_row(entry: tuple[str, str | None]) -> tuple[str, ...]:
    name, found = entry
    supported = SUPPORTED.get(name)
    remark = ""
    if supported is not None and found is not None:
        remark = "too old" if supported.is_older(found) else "newer than tested" if supported.is_newer(found) else ""
    return name, found or "none", str(supported or ""), remark


def _device_row(device: Device) -> tuple[str, ...]:
    ran = "equals the reference" if device.tried else "not tried"
    return device.device, device.name, device.backend or "none", device.error or ran


def _print_columns(rows: Sequence[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def main(arguments: Sequence[str]) -> int:
    """The command `env` if the packages of the command line are missing."""
    parser = argparse.ArgumentParser("reroute-kernels env", description="Tell what is installed and whether it routes.")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    return report(parser.parse_args(arguments).json)
