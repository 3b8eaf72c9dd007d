"""The public package type-checks, and so does a script of a user who installed it."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mypy", reason="mypy is not installed: make test has an environment with it")

ROOT = Path(__file__).parents[1]
SCRIPT = """
import reroute_kernels as rk
from torch import Tensor, nn


class Middle:
    def rank(self, candidates: rk.rankings.Candidates) -> Tensor:
        return -(candidates.ordinals - 100).abs().float()


def route(model: nn.Module) -> list[Tensor]:
    policy = rk.Policy(schedule=[rk.Stage(3, 0.25), rk.Stage(layer=7, keep=0.1)], ranking=Middle())
    solved = rk.solve("llava-1.5-7b", [3, 7], avg_tokens=96)
    print(rk.cost("llava-1.5-7b", solved, 64, 576).prefill_flops / 1e12, str(rk.suggest(model, keep=0.5)))
    with rk.apply(model, policy) as routing, rk.backend("ref"):
        trace = routing.trace
    assert trace is not None
    return trace.stages[0].selected


index: Tensor = rk.ops.select_tokens(Tensor(1, 4), Tensor(1, 4), Tensor(1, 4), keep=[2], length=2)
wrong: int = rk.preset("llava-1.5-7b", "fastv", 64)
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """The package as it is installed, with models/ inside."""
    folder = tmp_path_factory.mktemp("types")
    ignored = shutil.ignore_patterns("__pycache__", "tiny_grounding")
    shutil.copytree(ROOT / "reroute_kernels", folder / "reroute_kernels", ignore=ignored)
    shutil.copytree(ROOT / "models", folder / "reroute_kernels" / "models", ignore=ignored)
    return folder


def mypy(folder, *arguments):
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), *arguments]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    return result.stdout


def test_package(package):
    assert mypy(package, "-p", "reroute_kernels").splitlines()[-1].startswith("Success: no issues found in ")


def test_script_of_a_user(package):
    """One mistake is made, so that a check which sees nothing does not pass."""
    (package / "script.py").write_text(SCRIPT)
    *found, last = mypy(package, "--strict", "--follow-imports=silent", "script.py").splitlines()
    assert len(found) == 1, "\n".join(found)
    assert 'error: Incompatible types in assignment (expression has type "Policy", variable has type "int")' in found[0]
    assert last.startswith("Found 1 error in 1 file")
