"""The device that is measured: its name, its clock, and the floors that no kernel can beat.

`python -m bench.speed.device` prints the folder of its results.
"""

from __future__ import annotations

import hashlib
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

RESULTS = Path(__file__).parents[1] / "results"


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def results_folder(device: torch.device) -> Path:
    return RESULTS / re.sub(r"\W+", "-", device_name(device).lower())


def description(device: torch.device) -> dict[str, object]:
    """Record of the machine and software behind a result."""
    described = {
        "device": device_name(device),
        "python": platform.python_version(),
        **versions(),
        "kernels": kernel_digest(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        described |= {
            "driver": _driver(),
            "cuda": torch.version.cuda or torch.version.hip,
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
        }
    return described


def cpu_name() -> str:
    """Name of the processor, as the system tells it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def kernel_digest() -> str:
    """Digest of the kernels' sources, by which a record tells whether they have changed since."""
    sources = sorted((Path(__file__).parents[2] / "reroute_kernels" / "triton").glob("*.py"))
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:12]


def versions() -> dict[str, str | None]:
    return {package: _version(package) for package in ("torch", "triton", "transformers")}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def percentiles(values: list[float]) -> tuple[float, float]:
    """The 20th and the 80th percentile, within the measured range."""
    deciles = statistics.quantiles(values, n=10, method="inclusive") if len(values) > 1 else values * 9
    return deciles[1], deciles[7]


@dataclass
class Timing:
    """Microseconds of one call: the median of many, with the 20th and 80th percentile."""

    median: float
    p20: float
    p80: float
    calls: int

    @classmethod
    def of(cls, seconds: list[float]) -> Timing:
        p20, p80 = percentiles(seconds)
        return cls(statistics.median(seconds) * 1e6, p20 * 1e6, p80 * 1e6, len(seconds))

    def milliseconds(self) -> dict[str, float]:
        return {"median": self.median / 1e3, "p20": self.p20 / 1e3, "p80": self.p80 / 1e3, "calls": self.calls}


class Clock:
    """Times calls on one device.

    Args:
        device: the device that runs the calls.
        seconds: approximate time to measure each call for; 0 to make `least` calls and no other.
        least: minimum number of calls.
        graph_calls: how often a short call is captured in one graph.
    """

    def __init__(self, device: torch.device, seconds: float = 0.2, least: int = 5, graph_calls: int = 20):
        self.device = device
        self.seconds = seconds
        self.least = least
        self.graph_calls = graph_calls

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def in_turn(self, calls: dict[str, Callable[[], object]]) -> dict[str, dict[str, float]]:
        """Times several calls round by round, so that a disturbance of the machine affects all of them."""
        rounds = self._rounds(calls) if self.seconds else self.least
        times: dict[str, list[float]] = {name: [] for name in calls}
        order = list(calls)
        for _ in range(rounds):
            for name in order:
                times[name].append(self.once(calls[name]))
            order.append(order.pop(0))
        return {name: asdict(Timing.of(values)) for name, values in times.items()}

    def _rounds(self, calls: dict[str, Callable[[], object]]) -> int:
        """How many rounds take the time to measure for."""
        for call in calls.values():
            call()  # compiles, and fills caches
        self.wait()
        start = time.perf_counter()
        for call in calls.values():
            self.once(call)
        return max(self.least, min(200, round(self.seconds * len(calls) / (time.perf_counter() - start))))

    def once(self, call: Callable[[], object]) -> float:
        """Seconds of one call on an idle device: the host's time for launches counts."""
        self.wait()
        if self.device.type != "cuda":
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def host(self, call: Callable[[], object]) -> float:
        """Seconds until a call on an idle device returns: the time of the host, not of the device."""
        self.wait()
        start = time.perf_counter()
        call()
        seconds = time.perf_counter() - start
        self.wait()
        return seconds

    def graph(self, call: Callable[[], object], calls: int = 1) -> Callable[[], object]:
        """The replay of a CUDA graph that holds the call `calls` times. On a CPU, the call itself, as often."""
        if self.device.type != "cuda":
            return lambda: [call() for _ in range(calls)]
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            call()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(calls):
                call()
        return graph.replay

    def graphs_in_turn(self, calls: dict[str, Callable[[], object]]) -> dict[str, dict[str, float]]:
        """As `in_turn`, of one call among several in a graph: the host's work in between does not count."""
        replays = {name: self.graph(call, self.graph_calls) for name, call in calls.items()}
        times = self.in_turn(replays)
        return {
            name: {key: value / self.graph_calls if key != "calls" else value for key, value in timing.items()}
            for name, timing in times.items()
        }


def floors(clock: Clock, copied: int) -> dict[str, float]:
    """Measure the floors of this device: an empty launch, and the copy bandwidth.

    Args:
        clock: of the device.
        copied: bytes to copy; several times the device's caches.

    Returns:
        Microseconds of an empty launch in and outside a graph, and GB/s, bytes read and written together.
    """
    import triton

    @triton.jit
    def empty():
        pass

    def launch():
        empty[(1,)]()

    source = torch.randint(-(2**62), 2**62, (copied // 8,), device=clock.device)
    target = torch.empty_like(source)
    copy = clock.in_turn({"copy": lambda: target.copy_(source)})["copy"]
    if not torch.equal(source, target):
        raise AssertionError("the copy did not copy")
    return {
        "empty_launch_us": clock.in_turn({"launch": launch})["launch"]["median"],
        "empty_launch_in_graph_us": clock.graphs_in_turn({"launch": launch})["launch"]["median"],
        "copy_gb_per_s": 2 * source.numel() * 8 / copy["median"] / 1e3,
    }


if __name__ == "__main__":
    print(results_folder(torch.device("cuda" if torch.cuda.is_available() else "cpu")))
