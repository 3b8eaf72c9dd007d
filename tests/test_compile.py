"""Compilation of every kernel, for GPUs that need not be here.

`--compile-record FOLDER` keeps the results, in a file named after Triton's version.
"""

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import reroute_kernels as rk

KERNELS = [
    "attention_logits",
    "compact_tiles",
    "compare_tokens",
    "copy_rows_to_compact",
    "copy_rows_to_full",
    "count_digits",
    "follow_changes",
    "merge_rows",
    "normalize_rows",
    "pick_diverse",
    "pick_dpp",
    "reduce_attention",
    "select_and_compact",
    "select_in_passes",
    "softmax_statistics",
    "sum_changes",
    "sum_columns",
]
EVERYDAY = "sm_90"
"""The only target of `make test`."""
NVIDIA = [
    pytest.param(name, marks=() if name == EVERYDAY else pytest.mark.rest) for name in ("sm_80", "sm_90", "sm_100")
]
TARGETS = [*NVIDIA, pytest.param("gfx942", marks=pytest.mark.rest)]
RECORDS = Path(__file__).parents[1] / "bench" / "results" / "compile"
RECORDED = (
    "kernel",
    "case",
    "target",
    "registers",
    "spills",
    "stack",
    "shared",
    "wide_loads",
    "other_loads",
    "wide_stores",
    "other_stores",
)


@pytest.fixture(scope="session")
def all_compiled(tmp_path_factory, request):
    environment = os.environ | {
        "TRITON_INTERPRET": "0",
        "REROUTE_OVERLAP": "1",
        "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")),
        "PYTHONPATH": os.pathsep.join(sys.path),  # of several installed Tritons the one that these tests see
    }
    script = Path(__file__).with_name("compile_kernels.py")
    targets = [name for (name,) in (param.values for param in TARGETS)]
    if not request.config.getoption("compile_record"):
        cases = request.config.getoption("cases")
        targets = [name for name in targets if cases == "all" or (name == EVERYDAY) == (cases == "everyday")]
    done = subprocess.run([sys.executable, script, *targets], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    if folder := request.config.getoption("compile_record"):
        record = {"triton": metadata.version("triton"), "torch": metadata.version("torch"), "kernels": recorded(rows)}
        file = Path(folder) / f"triton-{record['triton']}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(record, indent=1) + "\n")
    return rows


def recorded(rows):
    return [{name: row[name] for name in RECORDED} for row in rows]


@pytest.fixture(params=TARGETS)
def target(request):
    return request.param


@pytest.fixture(params=KERNELS)
def kernel(request):
    return request.param


@pytest.fixture
def compiled(all_compiled, kernel, target):
    rows = [row for row in all_compiled if row["kernel"] == kernel and row["target"] == target]
    assert rows
    return rows


def test_every_kernel_is_compiled(all_compiled, target):
    from triton.runtime.jit import KernelInterface

    prefix = f"{rk.triton.__name__}."
    modules = [module for name, module in list(sys.modules.items()) if name.startswith(prefix)]
    names = {name for module in modules for name, value in vars(module).items() if isinstance(value, KernelInterface)}
    assert {name for name in names if not name.startswith("_")} == {*KERNELS}
    assert {row["kernel"] for row in all_compiled if row["target"] == target} == {*KERNELS}


def test_the_committed_record_is_of_these_kernels(all_compiled, target):
    file = RECORDS / f"triton-{metadata.version('triton')}.json"
    if not file.exists():
        pytest.skip("no record of this Triton")
    kept, made = (
        [row for row in rows if row["target"] == target]
        for rows in (json.loads(file.read_text())["kernels"], recorded(all_compiled))
    )
    assert kept == made, "run make compile-matrix"


def test_everything_fits_into_registers(compiled):
    assert [row for row in compiled if row["stack"] or row["spills"]] == []
    assert all(0 < row["registers"] <= 255 for row in compiled)


def test_shared_memory(compiled):
    assert [row for row in compiled if row["shared"] >= 96 * 1024] == []


def test_addresses_are_64_bits_wide(compiled):
    assert [row for row in compiled if not row["wide_addresses"]] == []


def test_a_launch_waits_for_those_before_it(compiled, target):
    """Before it touches memory, and before it lets the next one start."""
    waits = ["griddepcontrol.wait", "griddepcontrol.launch_dependents"]
    for row in compiled:
        if target in ("sm_90", "sm_100"):
            assert row["first_steps"][:2] == waits, row
        else:
            assert not any(step.startswith("griddepcontrol") for step in row["first_steps"]), row


@pytest.mark.parametrize("kernel", ["copy_rows_to_compact", "copy_rows_to_full"], indirect=True)
def test_rows_are_copied_16_bytes_at_a_time(compiled):
    rows = [row for row in compiled if "4096" in row["case"]]
    assert len(rows) == 2
    for row in rows:
        assert row["wide_loads"] == row["wide_stores"] > 0, row
        assert row["other_loads"] <= 1, row  # the index
        assert row["other_stores"] == 0, row


@pytest.mark.parametrize("kernel", ["normalize_rows"], indirect=True)
def test_rows_are_normalized_16_bytes_at_a_time(compiled):
    rows = [row for row in compiled if "4095" not in row["case"]]
    assert len(rows) == 8
    for row in rows:
        # The row of either sequence and the weight; the row that was written, and the norm.
        first = row["case"].startswith("first")
        assert row["wide_loads"] % (2 if first else 3) == 0 < row["wide_loads"], row
        assert row["wide_stores"] * (2 if first else 3) == row["wide_loads"] * (1 if first else 2), row
        assert row["other_loads"] <= 9, row  # the index
        assert row["other_stores"] == 0, row


@pytest.mark.parametrize("kernel", ["attention_logits"], indirect=True)
@pytest.mark.parametrize("target", NVIDIA, indirect=True)
def test_keys_are_read_16_bytes_at_a_time(compiled):
    rows = [row for row in compiled if row["case"].startswith(("llava", "qwen", "head_dim 256 b", "past", "long"))]
    assert len(rows) == 8
    for row in rows:
        assert row["wide_loads"] >= 6, row  # both halves of the key, its cosines and its sines
        # One row of each for a query, and its position. In the one case with masks a thread has eight positions, and
        # two keys of the past and of the present.
        assert row["other_loads"] <= (12 if row["case"].startswith("long") else 7), row


@pytest.mark.parametrize("kernel", ["attention_logits"], indirect=True)
@pytest.mark.parametrize("target", ["sm_90"], indirect=True)
@pytest.mark.parametrize(
    ("case", "most"), [("qwen2.5-vl-7b bfloat16", 600), ("qwen2.5-vl-7b decision", 600), ("200 queries bfloat16", 330)]
)
def test_instructions_of_grouped_queries(compiled, case, most):
    """Machine instructions, of all warps, for each 8 tokens of a key head and 8 rows: 1,441 without tensor cores.

    A tile takes one turn of the innermost loop, which is the whole work on its tokens.
    """
    (row,) = (row for row in compiled if row["case"] == case)
    (loop,) = row["loops"]
    assert 0 < loop * row["num_warps"] / (row["TILE"] / 8) / (row["BLOCK_ROWS"] / 8) <= most, row


@pytest.mark.parametrize("kernel", ["attention_logits"], indirect=True)
@pytest.mark.parametrize("target", NVIDIA, indirect=True)
def test_interleaved_keys_are_read_16_bytes_at_a_time(compiled):
    rows = [row for row in compiled if row["case"].startswith("interleaved")]
    assert len(rows) == 2
    for row in rows:
        assert row["wide_loads"] >= 3, row
        assert row["other_loads"] <= 3, row


@pytest.mark.parametrize("kernel", ["copy_rows_to_compact", "copy_rows_to_full", "normalize_rows"], indirect=True)
def test_odd_rows_are_copied_as_their_alignment_allows(compiled):
    """The count of wide accesses can be other than perfect."""
    (row,) = (row for row in compiled if "4095" in row["case"])
    assert row["other_loads"] > 1
    assert row["other_stores"] > 0
