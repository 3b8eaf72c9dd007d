"""Tests and benchmarks on this GPU, in one command, made to end within ten minutes: `make gpu-report`.

Writes what it finds to bench/results/<device>, and from that docs/performance.md. Without a GPU it is a dry run: every
step on a CPU, in Triton's interpreter and on tiny shapes, to know that the command works; nothing of it is kept.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from xml.etree import ElementTree

import torch

ROOT = Path(__file__).parents[1]
TESTS = ("test_rank", "test_select", "test_gather", "test_scatter", "test_route", "test_ops", "test_fuzz", "test_gpu")
TESTS += ("test_work", "test_reducers", "models/test_golden", "models/test_generate", "models/test_batches")
SECONDS = 560  # after which no further section begins


class Sections:
    """The parts of the report: runs each, and keeps what it returns or how it failed."""

    def __init__(self, folder: Path, description: dict[str, object], only: list[str] | None = None):
        self.folder, self.description, self.only, self.failed = folder, description, only, []
        self.deadline = time.perf_counter() + SECONDS
        self.write_page: Callable[[], object] = lambda: None

    def run(self, name: str, work: Callable[[], object]) -> object:
        """The section's result, of an earlier run where it is not asked for now."""
        file = self.folder / f"{name}.json"
        if self.only and name not in self.only:
            return json.loads(file.read_text())["result"] if file.exists() else None
        if time.perf_counter() > self.deadline:
            print(f"{name}: skipped, {SECONDS} s are over; run it alone with --only {name}", flush=True)
            self.failed.append(name)
            return None
        print(f"{name} ...", flush=True)
        start = time.perf_counter()

        def keep(found: dict[str, object]) -> None:
            record = {**self.description, "seconds": round(time.perf_counter() - start, 1), **found}
            file.write_text(json.dumps(record, indent=1) + "\n")

        result = None
        try:
            found = work()
            if isinstance(found, Iterator):  # rows, each kept as soon as it is there: a later one may fail or not end
                for row in found:
                    result = [*(result or []), row]
                    keep({"result": result})
            else:
                result = found
            keep({"result": result})
        except Exception:
            traceback.print_exc()
            self.failed.append(name)
            keep({"result": result, "error": traceback.format_exc(limit=-1).strip().splitlines()[-1]})
        self.write_page()
        print(f"{name}: {time.perf_counter() - start:.1f} s", flush=True)
        return result


def run_tests(shards: int, seconds: float, arguments: list[str]) -> dict[str, object]:
    """The tests that a device can run, in several processes at once.

    Raises:
        RuntimeError: a test failed or did not end in time; the message names it.
    """
    with tempfile.TemporaryDirectory() as reports:
        processes = []
        for shard in range(shards):
            report = Path(reports) / f"{shard}.xml"
            command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:randomly"]
            command += [f"--junitxml={report}", f"--shard={shard}/{shards}", *arguments]
            output = (Path(reports) / f"{shard}.txt").open("w+")
            processes.append((report, output, _start(command, stdout=output, stderr=output)))
        deadline = time.monotonic() + seconds
        counts = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
        broken = []
        for report, output, process in processes:
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            output.seek(0)
            text = output.read()
            output.close()
            if process.returncode not in (0, 1, 5) or not report.exists():  # 5: a shard without a test
                broken.append(f"a process ended early ({process.returncode}): {text[-2000:]}")
                continue
            suite = ElementTree.parse(report).getroot().find("testsuite")
            counts = {name: counts[name] + int(suite.get(name)) for name in counts}
            for case in suite.iter("testcase"):
                for problem in (*case.findall("failure"), *case.findall("error")):
                    broken.append(f"{case.get('classname')}::{case.get('name')}: {problem.get('message', '')[:300]}")
    if broken or not counts["tests"]:
        raise RuntimeError(f"{counts}; " + "; ".join(broken[:20]))
    return counts


def run_sanitizer() -> dict[str, str]:
    """Memory errors and races in one small run of every kernel, where compute-sanitizer is installed.

    Raises:
        RuntimeError: it found some.
    """
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if sanitizer is None:
        return {"compute-sanitizer": "not installed"}
    found = {}
    for tool in ("memcheck", "racecheck"):
        command = [
            sanitizer,
            "--tool",
            tool,
            "--error-exitcode",
            "9",
            "--report-api-errors",
            "no",
            sys.executable,
            "-m",
            "bench.sanitized",
        ]
        environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        process = _start(command, environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        try:
            text, _ = process.communicate(timeout=120)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with what it watches, which would go on
            process.wait()
            raise RuntimeError(f"{tool}: did not end in 120 s") from None
        summary = [line.strip("= ") for line in text.splitlines() if "SUMMARY" in line]
        found[tool] = summary[-1] if summary else f"exit {process.returncode}, no summary"
        if process.returncode:
            raise RuntimeError(f"{tool}: {found[tool]}; {text[-2000:]}")
    return found


def _start(command: list[str], environment: dict[str, str] | None = None, **streams) -> subprocess.Popen:
    """A process in a session of its own, with one thread for the CPU."""
    environment = (environment or dict(os.environ)) | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **streams)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_report", description=__doc__)
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on a CPU, even where there is a GPU")
    parser.add_argument("--only", nargs="+", metavar="SECTION", help="run these sections, and keep the others' results")
    parser.add_argument("--output", type=Path, help="folder of the results, in place of bench/results/<device>")
    options = parser.parse_args()
    dry = options.dry_run or not torch.cuda.is_available()
    if dry:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
    from bench.source_tree import make_importable

    make_importable()
    from bench import decisions, decoders, report
    from bench.device import Clock, description, floors, results_folder
    from bench.prefill import LLAVA_7B, QWEN_7B, Decoder

    device = torch.device("cpu" if dry else "cuda")
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.output or (Path(scratch) if dry else results_folder(device))
        if dry and folder.resolve().is_relative_to(ROOT / "bench" / "results"):
            parser.error("--output must lie outside bench/results in a dry run")
        folder.mkdir(parents=True, exist_ok=True)
        if dry:
            print("dry run on a CPU: tiny shapes, Triton's interpreter; the times mean nothing and are not kept")
            dtype, clock, copied = torch.float32, Clock(device, seconds=0.01, least=1, graph_calls=1), 2**20
            tests = [str(ROOT / "tests" / "test_gather.py"), "-k", "launch"]
            shapes, batches, tiers, shards, large = decisions.TINY_SHAPES, (1,), (192,), 1, (2, 16, 32)
            small = [Decoder("tiny", "llava", 4, 32, 4, 2, 64), Decoder("tiny", "qwen2_5_vl", 4, 64, 4, 2, 64)]
            models, visual, long_visual, steps = small, 24, 40, 3
        else:
            dtype, clock, copied = torch.bfloat16, Clock(device, seconds=0.1), 2**30
            tests = [str(ROOT / "tests" / f"{name}.py") for name in TESTS] + ["--fuzz-cases", "200"]
            shapes, batches, tiers = decisions.SHAPES, decisions.BATCHES, (192, 128, 64)
            shards, large = max(1, (os.cpu_count() or 2) - 2), (16, 8192, 4096)
            models, visual, long_visual, steps = (
                [LLAVA_7B, QWEN_7B],
                decoders.VISUAL_TOKENS,
                decoders.DECODE_VISUAL_TOKENS,
                33,
            )
        sections = Sections(folder, {**description(device), "dry_run": dry}, options.only)
        apart = dry or options.output
        sections.write_page = (lambda: report.performance_page([folder], folder)) if apart else report.main
        torch.backends.cuda.matmul.allow_tf32 = False  # the reference is float32
        sections.run("tests", lambda: run_tests(shards, 200, tests))
        sections.run("sanitizer", run_sanitizer if not dry else lambda: _sanitized_without_a_device())
        floor = sections.run("floors", lambda: floors(clock, copied))
        backend = _triton_backend(dry)
        with backend, torch.no_grad():
            if floor:
                sections.run("operations", lambda: decisions.measure_operations(clock, floor, shapes, batches, dtype))
                sections.run("copies", lambda: decisions.measure_copies(clock, *large, dtype))
            sections.run("eager", lambda: decisions.measure_against_eager(clock, shapes, dtype))
        for model in models:
            name = model.family
            sections.run(
                f"prefill-{name}",
                lambda model=model: decoders.measure_prefill(clock, model, visual, tiers, batches, dtype),
            )
            sections.run(
                f"decode-{name}",
                lambda model=model: decoders.measure_decoding(clock, model, long_visual, steps, dtype),
            )
        print(f"results: {folder}" if options.output or not dry else "dry run: nothing is kept")
        if sections.failed:
            print(f"failed: {', '.join(sections.failed)}")
        return 1 if sections.failed else 0


def _triton_backend(dry: bool):
    import reroute_kernels as rk

    return rk.backend("triton" if dry else None)


def _sanitized_without_a_device() -> dict[str, str]:
    import bench.sanitized

    bench.sanitized.main()
    return {"compute-sanitizer": "needs a GPU"}


if __name__ == "__main__":
    sys.exit(main())
