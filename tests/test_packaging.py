"""The wheel holds the library, the adapters under their installed name, and nothing else."""

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import reroute_kernels as rk

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    source, output = tmp_path_factory.mktemp("source") / "tree", tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "build", "*.egg-info", "golden", "__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", output, source]
    subprocess.run(command, check=True, capture_output=True)
    (path,) = output.iterdir()
    return path


def test_contents(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"reroute_kernels"}
    expected = [path.relative_to(ROOT) for path in (ROOT / "reroute_kernels").rglob("*.py")]
    expected += [
        Path("reroute_kernels") / path.relative_to(ROOT)
        for path in (ROOT / "models").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    ]
    assert {str(path) for path in expected} | {"reroute_kernels/py.typed"} <= set(names)


def test_source_distribution_holds_the_package_and_no_tests(tmp_path):
    """Tests without their data and fixtures would all fail."""
    source = tmp_path / "tree"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "build", "*.egg-info", "golden", "__pycache__"))
    code = "from setuptools import build_meta; print(build_meta.build_sdist('..'))"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=source)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    assert {"README.md", "LICENSE", "models/hooks.py", "models/tiny_grounding/config.json"} <= names
    assert {"reroute_kernels/py.typed", "reroute_kernels/cli/view.html"} <= names
    assert not [name for name in names if name.split("/")[0] in ("tests", "bench")]


def test_import_from_the_wheel_alone(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import reroute_kernels.models as models, reroute_kernels as rk;"
        "assert models.__file__.startswith(sys.argv[1]), models.__file__;"
        f"assert list(models.ADAPTERS) == {list(rk.models.ADAPTERS)};"
        "assert rk.apply is models.apply; assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, cwd=tmp_path)
