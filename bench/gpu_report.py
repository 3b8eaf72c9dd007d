"""Benchmarks and tests on this GPU, in one command, made to end within ten minutes: `make gpu-report`.

The most important figures come first: whole prefills, then a decision part by part, decoding, operations, tests. A row
is printed and written to bench/results/<device> the moment it is known, and docs/performance.md is written from that,
so that a run which is cut off keeps its results. Without a GPU it is a dry run: every step runs on a CPU, in Triton's
interpreter and on tiny shapes, to check that the command works. Its results are not kept.
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
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree

import torch

if TYPE_CHECKING:
    from bench.speed.decoders import Case, Models
    from bench.speed.device import Clock
    from bench.speed.prefill import Decoder

ROOT = Path(__file__).parents[1]
TESTS = ("test_rank", "test_select", "test_gather", "test_scatter", "test_route", "test_ops", "test_fuzz", "test_gpu")
TESTS += ("test_scatter_norm", "test_align", "test_saliency", "test_merge", "test_work", "test_reducers", "test_greedy")
TESTS += ("models/test_golden", "models/test_generate", "models/test_batches")
SECONDS = 560  # after which no further section begins
SECTION_SECONDS = 150  # after which a section makes no further row


class Sections:
    """The parts of the report: runs each, and keeps its result or its error."""

    def __init__(self, folder: Path, description: dict[str, object], only: list[str] | None = None):
        self.folder, self.description, self.only, self.failed = folder, description, only, []
        self.deadline = time.perf_counter() + SECONDS
        self.write_page: Callable[[], object] = lambda: None

    def wants(self, kind: str) -> bool:
        """Whether sections whose names begin with this prefix are to be run."""
        return self.only is None or any(name.startswith(kind) for name in self.only)

    def run(self, name: str, work: Callable[[], object], seconds: float = SECTION_SECONDS) -> object:
        """The section's result, of an earlier run if it is not asked for now.

        Args:
            name: of the section, and of its file.
            work: gives the result, or its rows one by one. A row that comes again, with more in it, is written again.
            seconds: after which no further row is asked for.
        """
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
                    result = result or []
                    if not result or result[-1] is not row:
                        result.append(row)
                    keep({"result": result})
                    print(json.dumps(row), flush=True)
                    if time.perf_counter() > min(start + seconds, self.deadline):
                        found.close()
                        raise TimeoutError(f"stopped after {len(result)} rows, its time was over")
            else:
                result = found
                print(json.dumps(result), flush=True)
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
    """Memory errors and races in one small run of every kernel, if compute-sanitizer is installed.

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
            "bench.speed.sanitized",
        ]
        environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        process = _start(command, environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        try:
            text, _ = process.communicate(timeout=120)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with its child processes, which would go on
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
    if dry:
        from bench.interpreter import patch_language_once

        patch_language_once(setattr)
    from bench.pages.performance import performance_page
    from bench.pages.report import write_pages
    from bench.speed.device import description, results_folder

    device = torch.device("cpu" if dry else "cuda")
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.output or (Path(scratch) if dry else results_folder(device))
        if dry and folder.resolve().is_relative_to(ROOT / "bench" / "results"):
            parser.error("--output must lie outside bench/results in a dry run")
        folder.mkdir(parents=True, exist_ok=True)
        sections = Sections(folder, {**description(device), "dry_run": dry}, options.only)
        apart = dry or options.output
        sections.write_page = (lambda: performance_page([folder], folder)) if apart else write_pages
        torch.backends.cuda.matmul.allow_tf32 = False  # the reference is float32
        if dry:
            print("dry run on a CPU: tiny shapes, Triton's interpreter; the times mean nothing and are not kept")
        with torch.no_grad():
            run_sections(sections, dry_plan(device) if dry else plan_of(device))
        print(f"results: {folder}" if options.output or not dry else "dry run: nothing is kept")
        if sections.failed:
            print(f"failed: {', '.join(sections.failed)}")
        return 1 if sections.failed else 0


def run_sections(sections: Sections, plan: Plan) -> None:
    """Run the sections, those first that matter most."""
    import reroute_kernels as rk
    from bench.speed import decisions, decoders, greedy, reducers
    from bench.speed.device import floors

    clock, models = plan.clock, decoders.Models(plan.clock.device, plan.dtype, plan.longest)
    compiling = precompile(plan.compilers) if sections.wants("prefill") else []
    floor = sections.run("floors", lambda: floors(clock, plan.copied))
    for process in compiling:
        process.wait()
    with rk.backend(plan.models_backend):
        run_models(sections, plan, models)
    with rk.backend(plan.operations_backend):
        if floor:
            shapes = clock, floor, plan.shapes, plan.batches, plan.dtype
            sections.run("operations", lambda: decisions.measure_operations(*shapes))
            sections.run("copies", lambda: decisions.measure_copies(clock, *plan.large, plan.dtype))
        sections.run("greedy", lambda: greedy.measure_greedy(clock, plan.selections, plan.dtype))
        sections.run("reducers", lambda: reducers.measure_reducers(clock, plan.reducers, plan.dtype))
        sections.run("eager", lambda: decisions.measure_against_eager(clock, plan.shapes, plan.dtype))
    sections.run("tests", lambda: run_tests(plan.shards, 200, plan.tests))
    with rk.backend(plan.models_backend):
        run_prefills(sections, clock, models, plan.more, "prefill-more")
    sections.run("sanitizer", plan.sanitizer)


def run_models(sections: Sections, plan: Plan, models: Models) -> None:
    """Whole prefills, their decisions part by part, and decoding."""
    from bench.speed import decoders

    run_prefills(sections, plan.clock, models, plan.headlines, "prefill")
    for decoder, cases in plan.headlines.items():
        parts = partial(decoders.measure_decision, plan.clock, models, decoder, cases)
        sections.run(f"decision-{decoder.family}", parts)
    first = next(iter(plan.headlines))
    decode = partial(decoders.measure_decoding, plan.clock, models, first, plan.decoding)
    sections.run(f"decode-{first.family}", decode)


def run_prefills(
    sections: Sections, clock: Clock, models: Models, cases_of: dict[Decoder, list[Case]], prefix: str
) -> None:
    """Whole prefills, a section `<prefix>-<family>` for each decoder."""
    from bench.speed import decoders

    for decoder, cases in cases_of.items():
        prefills = partial(decoders.measure_prefill, clock, models, decoder, cases)
        sections.run(f"{prefix}-{decoder.family}", prefills)


@dataclass
class Plan:
    """Sizes of all measurements.

    Attributes:
        clock, dtype: of all measurements.
        headlines, more: prefills by decoder, measured first and last; longest: visual tokens of the longest.
        decoding: the prompt behind which a token is decoded.
        shapes, batches, large: of single operations; selections: of greedy ones;
            reducers: of whole ones.
        copied: bytes of the copy whose bandwidth is a floor.
        tests, shards: arguments of pytest, and in how many processes.
        sanitizer: gives the section of that name.
        compilers: processes that compile kernels ahead.
        models_backend, operations_backend: the backend forced for whole models and for operations, or None.
    """

    clock: Clock
    dtype: torch.dtype
    headlines: dict[Decoder, list[Case]]
    more: dict[Decoder, list[Case]]
    decoding: Case
    longest: int
    shapes: tuple
    batches: tuple[int, ...]
    large: tuple[int, int, int]
    selections: tuple
    reducers: tuple
    copied: int
    tests: list[str]
    shards: int
    sanitizer: Callable[[], object]
    compilers: int = 0
    models_backend: str | None = None
    operations_backend: str | None = None


def plan_of(device: torch.device) -> Plan:
    """The plan for a GPU."""
    from bench.speed import decisions, decoders, greedy, reducers
    from bench.speed.device import Clock

    return Plan(
        clock=Clock(device, seconds=0.1),
        dtype=torch.bfloat16,
        headlines=decoders.HEADLINES,
        more=decoders.MORE,
        decoding=decoders.DECODING,
        longest=16384,
        shapes=decisions.SHAPES,
        batches=decisions.BATCHES,
        large=(16, 8192, 4096),
        selections=greedy.SHAPES,
        reducers=reducers.SHAPES,
        copied=2**30,
        tests=[str(ROOT / "tests" / f"{name}.py") for name in TESTS] + ["--fuzz-cases", "200"],
        shards=max(1, (os.cpu_count() or 2) - 2),
        sanitizer=run_sanitizer,
        compilers=sum(map(len, decoders.HEADLINES.values())),
    )


def dry_plan(device: torch.device) -> Plan:
    """The plan for a CPU: tiny shapes."""
    from bench.speed import decisions, greedy, reducers
    from bench.speed.decoders import Case
    from bench.speed.device import Clock
    from bench.speed.prefill import Decoder

    llava, qwen = Decoder("tiny", "llava", 4, 32, 4, 2, 64), Decoder("tiny Qwen", "qwen2_5_vl", 4, 64, 4, 2, 64)
    return Plan(
        clock=Clock(device, seconds=0, least=1, graph_calls=1),
        dtype=torch.float32,
        headlines={llava: [Case(24, 1)], qwen: [Case(24, 1)]},
        more={llava: [Case(24, 2, 64)]},
        decoding=Case(40, 2),
        longest=40,
        shapes=decisions.TINY_SHAPES,
        batches=(1,),
        large=(2, 16, 32),
        selections=greedy.TINY_SHAPES,
        reducers=reducers.TINY_SHAPES,
        copied=2**20,
        tests=[str(ROOT / "tests" / "test_gather.py"), "-k", "launch"],
        shards=1,
        sanitizer=_sanitized_without_a_device,
        models_backend="ref",  # in the interpreter they take minutes
        operations_backend="triton",
    )


def precompile(parts: int) -> list[subprocess.Popen]:
    """Processes that compile the kernels of the prefills, all at once."""
    command = [sys.executable, "-m", "bench.speed.precompile"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return [_start([*command, f"{part}/{parts}"], **quiet) for part in range(parts)]


def _sanitized_without_a_device() -> dict[str, str]:
    from bench.speed import sanitized

    sanitized.main()
    return {"compute-sanitizer": "needs a GPU"}


if __name__ == "__main__":
    sys.exit(main())
