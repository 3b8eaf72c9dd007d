"""What every benchmark shares: the device, and a record of what a result was measured on."""

import os
import platform
import statistics

import pytest
import torch

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


def _version(package):
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


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
        **{package: _version(package) for package in ("torch", "triton", "transformers")},
    )


def pytest_benchmark_update_json(config, benchmarks, output_json):
    """Keep percentiles instead of every single time, and nothing of the checkout but the commit."""
    commit = output_json["commit_info"]
    output_json["commit_info"] = {name: commit.get(name) for name in ("id", "dirty")}
    for entry in output_json["benchmarks"]:
        times = sorted(entry["stats"].pop("data", []))
        if len(times) > 1:
            deciles = statistics.quantiles(times, n=10)
            entry["stats"].update(p20=deciles[1], p80=deciles[7])
