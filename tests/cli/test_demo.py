"""The demo as its user meets it: the command line."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

import reroute_kernels as rk
from reroute_kernels import notation
from reroute_kernels.cli import demo
from reroute_kernels.cli.commands import app
from tests.cli.photos import assert_one_clear_line
from tests.models.prompts import GOLDEN


def run(*arguments):
    return CliRunner().invoke(app, list(arguments))


@pytest.fixture(scope="module")
def default(tmp_path_factory):
    """The default demo, run once: its result and the picture."""
    picture = tmp_path_factory.mktemp("demo") / "demo.png"
    return run("demo", "--output", str(picture), "--repeats", "1"), picture


def test_table_of_the_default_demo(default):
    """One scene on which the policy that finds more boxes in all scenes finds this one, and the other does not."""
    result, _ = default
    assert result.exit_code == 0, result.output
    example = demo.example()
    assert example.prompt in result.output
    rows = {row[0]: row[1:] for row in table_rows(result.output) if row[0]}
    assert rows["unrouted"][3:5] == ["144.0", "2,416"]
    # 49.5 tokens on average: (2 * 144 + 14 * 36) / 16 visual tokens a layer, and 7 text tokens.
    assert rows["remove"][3:5] == rows["reroute"][3:5] == ["49.5", "904"]
    assert rows["reroute"][5] == f"{904 * 2 * 128 * 4:,}"
    found = {name: float(row[1]) for name, row in rows.items() if name in example.rates}
    better, worse = sorted(("remove", "reroute"), key=lambda name: example.rates[name][0], reverse=True)
    assert min(found["unrouted"], found[better]) >= 0.5 > found[worse]
    for name, (rate, _, _) in example.rates.items():
        assert rows[name][2].startswith(f"{rate:.1%} [")
    assert rows["2"][:2] == ["36", "108"]
    assert int(rows["4"][2]) > 0
    assert f"on {example.scenes:,} held-out scenes" in result.output


def table_rows(output):
    return [[cell.strip() for cell in line.strip("│ ").split("│")] for line in output.splitlines() if line[:1] == "│"]


def test_picture_of_the_default_demo(default):
    _, picture = default
    with Image.open(picture) as image:
        assert image.format == "PNG"
        assert min(image.size) > 300
        assert len(image.convert("RGB").getcolors(2**24)) > 1000


def test_chat_template_and_schedule(tmp_path):
    picture = tmp_path / "other.jpg"
    arguments = (
        "--chat",
        "--prompt",
        "What is this?",
        "--policy",
        "2:0.5,9:0.1",
        "--max-new-tokens",
        "2",
        "--repeats",
        "1",
    )
    result = run("demo", *arguments, "--output", str(picture))
    assert result.exit_code == 0, result.output
    assert {"2", "9"} <= {row[0] for row in table_rows(result.output)}
    assert picture.exists()


@pytest.fixture
def unreadable(tmp_path):
    path = tmp_path / "photo.jpg"
    path.write_text("no photo")
    return path


def checkpoint(folder, **config):
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda path: ("--image", str(path / "missing.jpg")), "image must be an existing file, got .*missing.jpg"),
        (lambda path: ("--image", str(path)), "image must be readable, got"),
        (lambda path: ("--prompt", "no token"), "prompt must hold the image token '<image>' once .* got 'no token'"),
        (lambda path: ("--prompt", "<image> and <image>"), "prompt must hold the image token '<image>' once"),
        (lambda path: ("--chat", "--prompt", "<image>"), "prompt must hold the image token '<image>' once"),
        (
            lambda path: ("--model", checkpoint(path, model_type="llama")),
            r"\(.*aria, .*, vipllava\), got .* type 'llama'",
        ),
        (
            lambda path: ("--model", checkpoint(path, model_type="unheard_of")),
            r"\(.*aria, .*, vipllava\), got .*unheard_of",
        ),
        (lambda path: ("--model", str(path / "missing")), "model must be a checkpoint folder or hub id"),
        (lambda path: ("--model", checkpoint(path, model_type="llava")), "could not be loaded"),
        (lambda path: ("--policy", "nonsense"), "policy must be a preset like .* got 'nonsense'"),
        (lambda path: ("--policy", "3:1.5"), r"keep must be in \(0, 1\], got 1.5 at layer 3"),
        (lambda path: ("--policy", "40:0.5"), "schedule must stay below layer 16 .* got layer 40"),
        (lambda path: ("--policy", "llava-1.5-7b/fastv/100"), "avg_tokens must be one of 192, 128, 64, got 100"),
        (lambda path: ("--device", "nowhere"), "device must be one of this machine's, got 'nowhere'"),
        (lambda path: ("--dtype", "int8"), "dtype must be float32, float16 or bfloat16, got 'int8'"),
        (lambda path: ("--output", str(path / "missing" / "x.png")), "output must be a file that can be written"),
        (lambda path: ("--output", str(path / "x.txt")), "output must end in one of .png"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_one_clear_line_and_exit_code_2(arguments, message, tmp_path):
    result = run("demo", "--repeats", "1", "--max-new-tokens", "1", *arguments(tmp_path))
    assert_one_clear_line(result, message)
    assert not list(tmp_path.glob("*.png"))


def test_unreadable_image(unreadable):
    result = run("demo", "--image", str(unreadable))
    assert result.exit_code == 2
    assert "image must be readable" in result.stderr


@pytest.mark.parametrize("columns", [80, 140])
def test_presets_are_listed(columns, monkeypatch):
    monkeypatch.setattr("reroute_kernels.cli.commands._console", lambda: Console(width=columns))
    result = run("presets")
    assert result.exit_code == 0
    for name in rk.presets():
        assert "/".join(map(str, name)) in result.output
    assert "191.8" in result.output


@pytest.mark.parametrize(
    ("texts", "model_type", "layers", "names"),
    [
        ([], "llava", 32, ["llava-1.5-7b/fastv/192", "llava-1.5-7b/reroute-fastv/192"]),
        ([], "qwen2_5_vl", 28, ["qwen2.5-vl-7b/fastv/192", "qwen2.5-vl-7b/reroute-fastv/192"]),
        ([], "llava", 16, ["remove:2:0.238,4:0.238,8:0.238,12:0.238", "2:0.238,4:0.238,8:0.238,12:0.238"]),
        ([], "idefics3", 3, ["remove:0:0.3333,1:0.3333,2:0.3333", "0:0.3333,1:0.3333,2:0.3333"]),
        (["remove:3:.5"], "llava", 32, ["remove:3:0.5", "3:0.5"]),
        (["freeze:3:.5"], "llava", 32, ["remove:3:0.5", "freeze:3:0.5"]),
        (["align-stage:3:.5"], "llava", 32, ["remove:3:0.5", "align-stage:3:0.5"]),
        (["reroute-pdrop/64"], "llava", 32, ["llava-1.5-7b/pdrop/64", "llava-1.5-7b/reroute-pdrop/64"]),
        (["fastv-original/192"], "llava", 32, ["fastv-original/192", "fastv-original/192, but reroute"]),
        (["3:.5", "fastv/64"], "llava", 32, ["3:.5", "fastv/64"]),
        (["visionzip/64"], "llava", 32, ["llava-1.5-7b/visionzip/64", "llava-1.5-7b/reroute-visionzip/64"]),
        (["reroute-fastv/64"], "qwen3_vl", 36, ["fastv/64", "reroute-fastv/64"]),
        (["flashvid/12%"], "qwen3_vl", 36, ["flashvid/12%", "reroute-flashvid/12%"]),
    ],
)
def test_policies(texts, model_type, layers, names):
    text = SimpleNamespace(num_hidden_layers=layers)
    config = SimpleNamespace(model_type=model_type, get_text_config=lambda: text)
    named = demo.parse_policies(texts, config)
    assert [name for name, _ in named] == names
    if len(texts) < 2:
        other = "freeze" if names[1].startswith("freeze") else "reroute"
        assert [policy.action for _, policy in named] == ["remove", other]
    for name, policy in named:
        assert max((stage.layer for stage in policy.schedule), default=0) < layers
        if "but" not in name:
            assert policy == notation.parse_policy(name, config)


def test_policies_in_files(tmp_path):
    """One is shown beside the same with the other action."""
    path, text = str(tmp_path / "a:b.json"), SimpleNamespace(num_hidden_layers=32)
    policy = rk.Policy([rk.Stage(3, 0.5, rk.rankings.KeyNorm())], "remove")
    policy.save(path)
    config = SimpleNamespace(model_type="llava", get_text_config=lambda: text)
    (first, removes), (second, reroutes) = demo.parse_policies([path], config)
    assert (first, removes) == (path, policy)
    assert (second, reroutes) == (f"{path}, but reroute", dataclasses.replace(policy, action="reroute"))
    assert demo.parse_policies([path, "3:.5"], config)[0] == (path, policy)
    for policy in (rk.Policy([rk.Stage(3, 0.5)], align="stage"), rk.Policy([rk.Stage(3, 0.5)], "freeze")):
        policy.save(path)
        removal = rk.Policy(policy.schedule, "remove")
        assert demo.parse_policies([path], config) == ((f"{path}, but remove", removal), (path, policy))


def test_stage_shares_tell_what_came_back():
    selected = [[10, 12], [11, 12], [11]]
    stages = [_Stage(layer, [torch.tensor(positions)]) for layer, positions in zip((2, 5, 8), selected, strict=True)]
    first, second, third = demo.stage_shares(_Trace(stages, "reroute"), [10, 11, 12])
    assert (first.ran, first.deferred, first.returned) == ({0, 2}, {1}, set())
    assert (second.ran, second.deferred, second.returned) == ({1, 2}, {0}, {1})
    assert (third.ran, third.deferred, third.returned) == ({1}, {0, 2}, set())
    assert not first.removed | second.removed | third.removed


def test_frozen_tokens_may_come_back():
    stages = [_Stage(layer, [torch.tensor(positions)]) for layer, positions in ((2, [10, 12]), (5, [11]))]
    first, second = demo.stage_shares(_Trace(stages, "freeze"), [10, 11, 12])
    assert first.freezes
    assert (first.deferred, first.removed, second.deferred, second.returned) == ({1}, set(), {0, 2}, {1})
    assert not demo.stage_shares(_Trace(stages, "reroute"), [10, 11, 12])[0].freezes


def test_names_of_runs():
    policies = {
        action: notation.parse_policy(text) for action, text in (("remove", "remove:3:.5"), ("freeze", "freeze:3:.5"))
    }
    assert demo._names_of_runs([policies["remove"], policies["freeze"]]) == ["remove", "freeze"]
    assert demo._names_of_runs([policies["freeze"]] * 2) == ["remove", "reroute"]
    assert demo._names_of_runs([policies["remove"]] * 2) == ["remove", "reroute"]


def test_stage_shares_tell_what_is_gone():
    stages = [_Stage(layer, [torch.tensor(positions)]) for layer, positions in ((2, [10, 12]), (5, [12]))]
    first, second = demo.stage_shares(_Trace(stages, "remove"), [10, 11, 12])
    assert (first.ran, first.deferred, first.removed, first.returned) == ({0, 2}, set(), {1}, set())
    assert (second.ran, second.deferred, second.removed, second.returned) == ({2}, set(), {0, 1}, set())
    reduction = _Stage(0, [torch.tensor([11, 12])])
    first, second = demo.stage_shares(_Trace([_Stage(2, [torch.tensor([12])])] * 2, "reroute", reduction), [10, 11, 12])
    assert (first.deferred, first.removed, second.returned) == ({1}, {0}, set())


class _Stage:
    def __init__(self, layer, selected):
        self.layer, self.selected = layer, selected


class _Trace:
    def __init__(self, stages, action, reduction=None):
        self.stages, self.reduction = stages, reduction
        self.policy = rk.Policy([rk.Stage(0, 0.5)], action)


def test_grid_of_qwen_follows_the_merged_patches():
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(GOLDEN / "qwen2_5_vl")
    inputs = {"image_grid_thw": torch.tensor([[1, 20, 28]])}
    picture, grid = demo.seen_picture(config, None, inputs, Image.new("RGB", (640, 480)))
    assert grid == (10, 14)
    assert picture.size == (28 * 14, 20 * 14)
