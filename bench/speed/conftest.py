"""Fixtures of every benchmark: the device, and a record of the machine behind a result."""

import os
import platform

import pytest
import torch

from bench.speed.device import percentiles, versions

HAS_GPU = torch.cuda.is_available()


@pytest.fixture(scope="session")
def device():
    return torch.device("cuda" if HAS_GPU else "cpu")


@pytest.fixture(scope="session")
def dtype():
    """The precision that models are served in on a GPU; float32 on a CPU."""
    return torch.bfloat16 if HAS_GPU else torch.float32


@pytest.fixture(autouse=True)
def _no_grad():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def _cpu_name():
    import cpuinfo

    return cpuinfo.get_cpu_info().get("brand_raw", platform.processor())


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.clear()
    machine_info.update(
        cpu=_cpu_name(),
        cpu_cores=len(os.sched_getaffinity(0)),
        torch_threads=torch.get_num_threads(),
        gpu=torch.cuda.get_device_name() if HAS_GPU else None,
        python=platform.python_version(),
        **versions(),
    )


def pytest_benchmark_update_json(config, benchmarks, output_json):
    """Keep percentiles instead of every single time, and only the commit of the checkout."""
    commit = output_json["commit_info"]
    output_json["commit_info"] = {name: commit.get(name) for name in ("id", "dirty")}
    for entry in output_json["benchmarks"]:
        if times := entry["stats"].pop("data", []):
            entry["stats"]["p20"], entry["stats"]["p80"] = percentiles(times)
