"""`make gpu-report` in its dry mode, from end to end, and the page that it writes."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bench.pages.performance import performance_page
from bench.pages.targets import targets
from bench.speed.reducers import EAGER
from tests.conftest import HAS_GPU

pytest.importorskip("transformers")
ROOT = Path(__file__).parents[1]
SECTIONS = [
    *("prefill-llava", "prefill-qwen2_5_vl", "decision-llava", "decision-qwen2_5_vl", "decode-llava"),
    *("operations", "copies", "greedy", "reducers", "eager", "tests", "prefill-more-llava", "sanitizer"),
]
"""In the order in which they run, behind the floors."""


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    command = [sys.executable, "-m", "bench.gpu_report", "--dry-run", "--output", str(folder)]
    before = {path: path.read_bytes() for path in (ROOT / "bench" / "results").rglob("*") if path.is_file()}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path: path.read_bytes() for path in before} == before, "a dry run may not touch results"
    return folder, done.stdout


def test_every_section_has_a_result(dry_run):
    folder, output = dry_run
    assert {path.stem for path in folder.glob("*.json")} == {"floors", *SECTIONS}
    assert re.findall(r"^([\w-]+) \.\.\.$", output, flags=re.MULTILINE) == ["floors", *SECTIONS]
    for path in folder.glob("*.json"):
        record = json.loads(path.read_text())
        assert record["result"] is not None, path
        assert record["dry_run"] is True
        assert record["device"] == "CPU"
    assert "dry run" in output


def test_counts_of_the_sections(dry_run):
    results = {path.stem: json.loads(path.read_text())["result"] for path in dry_run[0].glob("*.json")}
    assert results["tests"]["tests"] > 0
    launches = {(row["shape"], row["operation"]): row["launches"] for row in results["operations"]}
    assert launches["tiny", "route_tokens"] == 4
    assert launches["tiny", "decision"] == 5
    assert launches["tiny", "scatter_norm_tokens_"] == 1
    assert all(row["graph"]["median"] > 0 and row["graph"]["floor_us"] > 0 for row in results["operations"])
    for name in ("prefill-llava", "prefill-qwen2_5_vl", "prefill-more-llava"):
        (row,) = results[name]
        assert set(row["graph"]) == {"unrouted", "remove", "reroute", "oracle"}
        assert set(row["eager"]) == set(row["host_ms"]) == {"unrouted", "reroute"}
        assert row["flops"]["reroute"] < row["flops"]["unrouted"]
        assert row["tokens"] == row["visual_tokens"] + 64
    for name in ("decision-llava", "decision-qwen2_5_vl"):
        parts = ["scatter", "norm", "scatter and norm", "key projection", "query", "rank", "select", "gather", "whole"]
        assert list(results[name][0]["microseconds"]) == parts
    held = results["decode-llava"]["cache_bytes"]
    # 4 layers, keys and values, 2 samples, 2 heads of 8 channels, 64 text tokens and a slot.
    assert held["unrouted"] == 4 * 2 * 2 * 2 * 8 * 4 * (40 + 64 + 1)
    assert held["reroute"] == 2 * 2 * 2 * 8 * 4 * ((40 + 65) + 3 * (13 + 65))
    assert all(row["same_tokens"] == 1 for row in results["eager"])
    assert [row["operation"] for row in results["greedy"]] == ["select_diverse", "select_dpp"]
    assert {row["method"] for row in results["reducers"]} == {*EAGER, "FlashVid"}
    assert all(row["same_tokens"] == 1 for row in results["reducers"])
    assert all(row["same_picks"] == 1 and row["graph"]["median"] > 0 for row in results["greedy"])


def test_page_says_that_its_times_mean_nothing(dry_run):
    page = (dry_run[0] / "performance.md").read_text()
    assert "dry run: the times mean nothing" in page
    assert "### Targets" in page
    assert page.index("### Prefill, tiny") < page.index("### A whole decision, tiny") < page.index("### Operations")


def test_page_without_any_result(tmp_path):
    performance_page([], tmp_path)
    assert "No GPU has been measured yet" in (tmp_path / "performance.md").read_text()


def test_page_judges_targets():
    rows = targets(
        {
            "operations": [
                {"operation": "decision", "shape": "LLaVA-1.5-7B", "batch": 1, "graph": {"median": 15.5}},
                {"operation": "decision", "shape": "LLaVA-1.5-7B", "batch": 8, "graph": {"median": 1.0}},
            ],
            "copies": [{"operation": "gather_tokens", "gb_per_s": 86.0}],
            "floors": {"copy_gb_per_s": 100.0},
        }
    )
    assert "| a decision in a graph, LLaVA-1.5-7B, us | at most 15 | 15.5 | **missed** |" in rows
    assert "| `gather_tokens`, share of copy bandwidth | at least 0.85 | 0.86 | met |" in rows
    assert len([row for row in rows if "us |" in row]) == 1


def test_results_never_go_beside_those_of_a_gpu():
    command = [sys.executable, "-m", "bench.gpu_report", "--dry-run", "--output", "bench/results/nowhere"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "--output" in done.stderr
    assert not (ROOT / "bench" / "results" / "nowhere").exists()


@pytest.mark.skipif(HAS_GPU, reason="there is one")
def test_a_failed_section_is_named_and_kept(tmp_path, capsys):
    from bench.gpu_report import Sections

    section = Sections(tmp_path, {"device": "CPU", "dry_run": True})
    assert section.run("copies", lambda: 1 / 0) is None
    assert section.failed == ["copies"]
    record = json.loads((tmp_path / "copies.json").read_text())
    assert record["error"] == "ZeroDivisionError: division by zero"
    performance_page([tmp_path], tmp_path)
    assert "`copies` failed: ZeroDivisionError" in (tmp_path / "performance.md").read_text()


@pytest.mark.skipif(HAS_GPU, reason="there is one")
def test_rows_are_kept_as_they_come(tmp_path):
    from bench.gpu_report import Sections

    def kept():
        return json.loads((tmp_path / "prefill-llava.json").read_text())

    def rows():
        yield 1
        assert kept()["result"] == [1]
        yield 2
        raise MemoryError("no more")

    section = Sections(tmp_path, {"device": "CPU", "dry_run": True})
    assert section.run("prefill-llava", rows) == [1, 2]
    assert section.failed == ["prefill-llava"]
    assert kept()["result"] == [1, 2]
    assert kept()["error"] == "MemoryError: no more"


@pytest.mark.skipif(HAS_GPU, reason="there is one")
def test_a_row_that_grows_is_written_each_time(tmp_path, capsys):
    from bench.gpu_report import Sections

    def rows():
        row = {"graph": 1}
        yield row
        assert json.loads((tmp_path / "prefill-llava.json").read_text())["result"] == [{"graph": 1}]
        row["eager"] = 2
        yield row
        yield {"graph": 3}

    expected = [{"graph": 1, "eager": 2}, {"graph": 3}]
    assert Sections(tmp_path, {"device": "CPU", "dry_run": True}).run("prefill-llava", rows) == expected
    assert json.loads((tmp_path / "prefill-llava.json").read_text())["result"] == expected
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert printed == [{"graph": 1}, *expected]


@pytest.mark.skipif(HAS_GPU, reason="there is one")
def test_a_section_stops_when_its_time_is_over(tmp_path):
    from bench.gpu_report import Sections

    def rows():
        yield 1
        yield 2
        raise AssertionError("asked for more")

    sections = Sections(tmp_path, {"device": "CPU", "dry_run": True})
    assert sections.run("prefill-llava", rows, seconds=0) == [1]
    assert sections.failed == ["prefill-llava"]
    record = json.loads((tmp_path / "prefill-llava.json").read_text())
    assert (record["result"], record["error"]) == ([1], "TimeoutError: stopped after 1 rows, its time was over")


def test_kernels_that_are_compiled_ahead_are_those_of_the_prefill():
    """Of a shallow decoder the decisions have the same tokens, widths and heads."""
    import reroute_kernels as rk
    from bench.speed.decoders import HEADLINES
    from bench.speed.precompile import shallow

    for decoder in HEADLINES:
        policy = decoder.policies(192)["reroute"]
        small, decisions = shallow(decoder, policy)
        assert decisions.selected_counts(576) == policy.selected_counts(576)
        assert (small.hidden, small.heads, small.kv_heads) == (decoder.hidden, decoder.heads, decoder.kv_heads)
        assert decisions.schedule[-1].layer == small.layers - 1
        assert isinstance(decisions, rk.Policy)


def test_page_names_what_was_not_measured(tmp_path):
    from bench.gpu_report import Sections

    for name in {"floors", "prefill-more-qwen2_5_vl", *SECTIONS} - {"sanitizer", "prefill-llava"}:
        Sections(tmp_path, {"device": "CPU", "dry_run": True}).run(name, lambda: None)
    performance_page([tmp_path], tmp_path)
    assert "- not measured: `prefill-llava`, `sanitizer`\n" in (tmp_path / "performance.md").read_text()


def test_page_without_floors(tmp_path):
    from bench.gpu_report import Sections

    section = Sections(tmp_path, {"device": "CPU", "dry_run": True})
    section.run("copies", lambda: [{"operation": "gather_tokens", "gb_per_s": 86.0}])
    section.run("floors", lambda: 1 / 0)
    performance_page([tmp_path], tmp_path)
    page = (tmp_path / "performance.md").read_text()
    assert "`floors` failed" in page
    assert "share of copy bandwidth" not in page


def test_a_run_without_tests_fails_its_section():
    from bench.gpu_report import run_tests

    with pytest.raises(RuntimeError, match=r"(?s)ended early \(4\).*nothing\.py"):
        run_tests(1, 60, ["tests/nothing.py"])


def test_a_failing_test_fails_its_section(tmp_path):
    from bench.gpu_report import run_tests

    (tmp_path / "test_broken.py").write_text("def test_broken():\n    assert 1 == 2\n\ndef test_fine():\n    pass\n")
    with pytest.raises(RuntimeError, match=r"'tests': 2, 'failures': 1.*test_broken: assert 1 == 2"):
        run_tests(2, 60, ["-p", "conftest", str(tmp_path / "test_broken.py")])


def test_only_some_sections(tmp_path):
    from bench.gpu_report import Sections

    Sections(tmp_path, {"device": "CPU"}).run("floors", lambda: {"copy_gb_per_s": 1.0})
    again = Sections(tmp_path, {"device": "CPU"}, only=["copies"])
    assert again.run("floors", lambda: 1 / 0) == {"copy_gb_per_s": 1.0}
    assert again.run("eager", lambda: 1 / 0) is None
    assert again.run("copies", lambda: [2]) == [2]
    assert again.failed == []


def test_no_section_begins_after_the_deadline(tmp_path, capsys):
    from bench.gpu_report import Sections

    sections = Sections(tmp_path, {"device": "CPU"})
    sections.deadline = 0
    assert sections.run("copies", lambda: [2]) is None
    assert sections.failed == ["copies"]
    assert "--only copies" in capsys.readouterr().out


def test_percentiles_lie_within_what_was_measured():
    from bench.speed.device import Timing

    timing = Timing.of([1.0, 2.0, 3.0])
    assert 1e6 <= timing.p20 < timing.median == 2e6 < timing.p80 <= 3e6
