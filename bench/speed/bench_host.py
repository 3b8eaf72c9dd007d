"""Cost of a decision on a GPU for the host, measured without one: see host.py."""

import shutil

import pytest

from bench.speed.host import measure_in_new_process


@pytest.mark.skipif(shutil.which("cc") is None, reason="Triton's launcher needs a C compiler")
def bench_decision(benchmark, tmp_path):
    benchmark.group = "host"
    benchmark.extra_info.update(benchmark.pedantic(measure_in_new_process, [tmp_path], rounds=1))
