"""The README's code runs as it stands, on a tiny checkpoint and the default photo."""

import re
from pathlib import Path

import pytest
import torch

import reroute_kernels as rk
from reroute_kernels.cli.demo import open_image
from tests.models.prompts import IMAGE, policy
from tests.models.test_families import make_case

README = (Path(__file__).parents[2] / "README.md").read_text()
DESIGN = (Path(__file__).parents[2] / "docs" / "design.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_first_block_routes_a_llava(tiny_llava, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    open_image(None).save("photo.jpg")
    code = BLOCKS[0].replace("llava-hf/llava-1.5-7b-hf", tiny_llava).replace('"cuda"', '"cpu"')
    names = {}
    exec(code, names)
    stages = names["routing"].trace.stages
    assert [stage.layer for stage in stages] == [3, 7, 15, 23]
    assert [len(stage.selected[0]) for stage in stages] == [152] * 4
    assert "tensor([" in capsys.readouterr().out


def test_second_block_registers_a_model_that_is_not_listed(monkeypatch):
    monkeypatch.setattr(rk.models, "ADAPTERS", dict(rk.models.ADAPTERS))
    assert len([line for line in BLOCKS[1].splitlines() if line.strip()]) < 10
    exec(BLOCKS[1], {"rk": rk})
    model, inputs = make_case("internvl-llama")
    monkeypatch.setattr(model.config, "model_type", "my_vlm")
    with rk.apply(model, policy("reroute", (rk.Stage(1, 0.4),))) as routing, torch.no_grad():
        model(**inputs)
    assert len(routing.trace.stages[0].selected[0]) == int(0.4 * (inputs["input_ids"] == IMAGE).sum())


def test_every_block_is_executed_here():
    assert len(BLOCKS) == 2


@pytest.mark.parametrize(
    "name", re.findall(r"^  ((?:[\w*]+\.py )*[\w*]+(?:\.py|/)) ", DESIGN.partition("## Map")[2], flags=re.MULTILINE)
)
def test_map_names_what_exists(name):
    root = Path(__file__).parents[2]
    for file in name.split():
        assert any(list((root / folder).glob(file)) for folder in ("reroute_kernels", "models", "tests", "bench")), file


@pytest.mark.parametrize(
    "folder",
    [
        "reroute_kernels",
        "reroute_kernels/cli",
        "reroute_kernels/reducers",
        "reroute_kernels/vllm",
        "models",
        "bench",
        "bench/speed",
        "bench/pages",
    ],
)
def test_map_names_every_file(folder):
    mapped = DESIGN.partition("## Map")[2].partition("## Rules")[0]
    for path in (Path(__file__).parents[2] / folder).glob("*.py"):
        is_benchmark = path.name.startswith("bench_")
        assert path.name.startswith("__") or is_benchmark or path.name in mapped, path.name
