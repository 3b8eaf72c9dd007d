"""The command that chooses decision layers, on the tiny checkpoint."""

import json
import re

import pytest
from PIL import Image
from typer.testing import CliRunner

import reroute_kernels as rk
from reroute_kernels.cli.commands import app
from reroute_kernels.cli.demo import TINY_CHECKPOINT
from tests.cli.photos import assert_one_clear_line, make_photos


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three images, and a file that is none."""
    return make_photos(tmp_path_factory.mktemp("photos"), 3)


def run(*arguments):
    return CliRunner().invoke(app, ["calibrate", *map(str, arguments)])


def test_it_measures_solves_and_goes_on(folder, tmp_path):
    files = {name: tmp_path / name for name in ("policy.json", "report.json", "plot.png", "run.jsonl")}
    options = ["--images", folder, "--samples", 2, "--prompt", "how many objects", "--prompt", "box of the red ring"]
    options += ["--decisions", 2, "--shape", "pyramid", "--resume", files["run.jsonl"]]
    first = run(TINY_CHECKPOINT, *options, "--avg-tokens", 40, "--json", "--report", files["report.json"])
    assert first.exit_code == 0, first.output
    told = json.loads(first.stdout)
    found = rk.Calibration.load(files["report.json"])
    assert rk.Calibration.from_dict(told["calibration"]) == found
    policy = found.policy(2, "pyramid", avg_tokens=40, dtype="float32")
    assert rk.Policy.from_dict(told["policy"]) == policy
    assert told["objective"] == found.objective([stage.layer for stage in policy.schedule])
    assert (found.samples, found.visual_tokens, found.text_tokens) == (2, 144, 4)  # of 4 and 6
    kept = files["run.jsonl"].read_bytes()
    assert len(kept.splitlines()) == 3
    again = run(
        TINY_CHECKPOINT, *options, "--kv-bytes", 1e6, "--output", files["policy.json"], "--plot", files["plot.png"]
    )
    assert again.exit_code == 0, again.output
    assert files["run.jsonl"].read_bytes() == kept
    assert rk.Policy.load(files["policy.json"]) == found.policy(2, "pyramid", kv_bytes=1e6, dtype="float32")
    rows = [
        [cell.strip() for cell in re.split("[│┃]", line)[1:-1]] for line in again.stdout.splitlines() if "│" in line
    ]
    decides = [int(row[0]) for row in rows if len(row) == 5 and row[4] == "yes"]
    assert decides == [stage.layer for stage in rk.Policy.load(files["policy.json"]).schedule]
    with Image.open(files["plot.png"]) as picture:
        assert picture.format == "PNG"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("{tiny} --images {tmp}/missing --avg-tokens 40", "images must be a folder, got .*missing"),
        ("{tiny} --images {tmp} --avg-tokens 40", r"images must be a folder with images \(.jpg, .*\), got none in"),
        ("{tiny} --images {photos}", "exactly one of avg_tokens, flops, kv_bytes must be given, got none"),
        ("{tiny} --images {photos} --avg-tokens 40 --shape cone", "shape must be uniform, pyramid or numbers"),
        ("{tiny} --images {photos} --avg-tokens 40 --early 16", "early must be a layer that may decide .*, got 16"),
        ("{tiny} --images {photos} --avg-tokens 40 --share 2", r"share must be in \(0, 1\), got 2.0"),
        ("{tiny} --images {photos} --avg-tokens 40 --decisions 15", "decisions must be from 1 to 14, .* got 15"),
        ("{tiny} --images {photos} --avg-tokens 40 --output p.txt", "output must end in .json, got p.txt"),
        ("{tiny} --images {photos} --avg-tokens 40 --plot q/p.png", "plot must be a file that can be written"),
        ("{tiny} --images {photos} --avg-tokens 40 --device moon", "device must be one of this machine's, got 'moon'"),
        (
            "{tmp}/nothing --images {photos} --avg-tokens 40",
            "model must be a checkpoint folder or hub id of a supported",
        ),
        (
            "{tiny} --images {photos} --avg-tokens 40 --resume {photos}/notes.txt",
            "resume must be a file of measurements",
        ),
    ],
    ids=lambda value: value.replace("{tiny} --images {photos} --avg-tokens 40 ", ""),
)
def test_one_clear_line_and_exit_code_2(arguments, message, folder, tmp_path):
    named = {"tiny": TINY_CHECKPOINT, "photos": folder, "tmp": tmp_path}
    assert_one_clear_line(run(*arguments.format(**named).split()), message)
    assert not list(tmp_path.iterdir())
