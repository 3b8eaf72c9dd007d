"""`pytest` runs the tests, `pytest --benchmark` the benchmarks."""

from pathlib import Path

from bench.source_tree import make_importable

make_importable()
BENCHMARKS = Path(__file__).parent / "bench"


def pytest_addoption(parser):
    parser.addoption("--compile-record", metavar="FOLDER", help="keep what tests/test_compile.py found out, as JSON")
    parser.addoption("--shard", default="0/1", metavar="I/N", help="run every N-th test, from the I-th on")
    parser.addoption("--fuzz-cases", type=int, default=500, help="random cases of tests/test_fuzz.py (500)")
    parser.addoption("--fuzz-seed", type=int, default=0, help="seed of the first random case (0)")
    parser.addoption("--benchmark", action="store_true", help="run the benchmarks in bench/ instead of the tests")
    parser.addoption(
        "--every-model", action="store_true", help="call every model in every way (tests/models/test_ways.py)"
    )


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
