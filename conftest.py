"""`pytest` runs the tests, `pytest --benchmark` the benchmarks."""

import gc
import json
from importlib.metadata import version
from pathlib import Path

from bench.source_tree import make_importable

make_importable()
BENCHMARKS = Path(__file__).parent / "bench" / "speed"


def pytest_addoption(parser):
    parser.addoption("--compile-record", metavar="FOLDER", help="keep what tests/test_compile.py found out, as JSON")
    parser.addoption("--shard", default="0/1", metavar="I/N", help="run every N-th test, from the I-th on")
    parser.addoption(
        "--fuzz-cases",
        type=int,
        default=150,
        help="random cases of tests/test_fuzz.py (150), half of those of tests/models/test_call_fuzz.py",
    )
    parser.addoption("--fuzz-seed", type=int, default=0, help="seed of the first random case (0)")
    parser.addoption("--benchmark", action="store_true", help="run the benchmarks in bench/speed/ instead of the tests")
    parser.addoption(
        "--support-record", metavar="FOLDER", help="call every model in every way, and keep what happened, as JSON"
    )
    parser.addoption(
        "--all-types", action="store_true", help="call every type that is routed in every way, not the families alone"
    )
    parser.addoption(
        "--cases",
        choices=("everyday", "rest", "all"),
        default="everyday",
        help="the cases of `make test`, those that it leaves out for their time, or both (everyday)",
    )


def pytest_configure(config):
    if config.getoption("support_record") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(SupportRecord(Path(config.getoption("support_record"))))


class SupportRecord:
    """Writes what tests/models/test_ways.py found out, under any number of processes."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.cells: dict[str, dict[str, str]] = {}
        self.ways: dict[int, tuple[str, str]] = {}

    def pytest_runtest_logreport(self, report):
        if report.when == "call" and report.passed and (cell := dict(report.user_properties).get("cell")):
            model, number, way, description, outcome = cell
            self.ways[number] = way, description
            self.cells.setdefault(model, {})[way] = outcome

    def pytest_sessionfinish(self):
        versions = {name: version(name) for name in ("transformers", "torch", "accelerate", "peft")}
        ways = [self.ways[number] for number in sorted(self.ways)]
        cells = {
            model: {way: outcomes[way] for way, _ in ways if way in outcomes} for model, outcomes in self.cells.items()
        }
        record = {"versions": versions, "ways": dict(ways), "cells": dict(sorted(cells.items()))}
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"transformers-{versions['transformers']}.json"
        path.write_text(json.dumps(record, indent=1) + "\n")


def pytest_collection_finish():
    """Keep what was imported from the garbage collector, which would look through it again and again."""
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()


def pytest_terminal_summary(terminalreporter, config):
    if not config.getoption("benchmark"):
        first, cases = config.getoption("fuzz_seed"), config.getoption("fuzz_cases")
        terminalreporter.write_line(f"seeds of random cases: {first} to {first + cases - 1}")


def pytest_ignore_collect(collection_path, config):
    is_benchmark = collection_path.is_relative_to(BENCHMARKS)
    is_test = collection_path.is_relative_to(BENCHMARKS.with_name("tests"))
    if (is_benchmark and not config.getoption("benchmark")) or (is_test and config.getoption("benchmark")):
        return True
    return None


def pytest_collection_modifyitems(config, items):
    # A path given on the command line is collected all the same.
    shard, shards = map(int, config.getoption("shard").split("/"))
    wanted = [
        item for item in items[shard::shards] if item.path.is_relative_to(BENCHMARKS) == config.getoption("benchmark")
    ]
    config.hook.pytest_deselected(items=[item for item in items if item not in wanted])
    items[:] = wanted
