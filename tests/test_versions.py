"""The supported versions: stated once, and the same wherever else a file has to name them."""

import re
import warnings
from pathlib import Path

import pytest

import reroute_kernels as rk
from reroute_kernels import versions
from reroute_kernels.versions import SUPPORTED, Versions, install_command

ROOT = Path(__file__).parents[1]
TRANSFORMERS = SUPPORTED["transformers"]
PINS = {
    path.stem: dict(re.findall(r"^([\w-]+)==([\w.]+)$", path.read_text(), flags=re.MULTILINE))
    for path in (ROOT / "requirements").glob("*.txt")
}


def minor(version):
    return ".".join(version.split(".")[:2])


def test_pyproject_asks_for_the_oldest():
    text = (ROOT / "pyproject.toml").read_text()
    assert f'requires-python = ">={SUPPORTED["python"].oldest}"' in text
    for name in ("torch", "triton", "transformers"):
        assert re.findall(rf'"{name}>=([\d.]+)[;"]', text) == [SUPPORTED[name].oldest]


def test_pins_are_the_ends_of_the_range_and_two_between():
    pinned = [minor(PINS[name]["transformers"]) for name in ("oldest", "middle", "previous", "dev")]
    assert (pinned[0], pinned[-1]) == TRANSFORMERS
    assert pinned == sorted(set(pinned), key=lambda version: [int(part) for part in version.split(".")])
    for name in ("oldest", "middle", "previous"):
        same = PINS[name].keys() - {"transformers", "tokenizers", "huggingface_hub"}
        assert {package: PINS[name][package] for package in same} == {package: PINS["dev"][package] for package in same}


def test_kernels_are_compiled_with_both_ends_of_tritons_range():
    (compiled,) = re.findall(r"^TRITONS := (.*)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert (minor(compiled.split()[0]), minor(compiled.split()[-1])) == SUPPORTED["triton"]


@pytest.mark.parametrize("path", ["README.md", "tests/golden/README.md"])
def test_texts_name_the_range(path):
    assert re.findall(r"transformers (5[.\d]* to 5[.\d]*\d)", (ROOT / path).read_text()) == [str(TRANSFORMERS)]


@pytest.mark.parametrize(
    ("version", "older", "newer"),
    [
        ("4.57.6", True, False),
        ("5.3.9", True, False),
        ("5.4.0", False, False),
        ("5.10.0", False, False),
        ("5.24.3", False, False),
        ("5.25.0.dev0", False, True),
        ("6.0.0rc1", False, True),
    ],
)
def test_order_of_versions(version, older, newer):
    within = Versions("5.4", "5.24")
    assert (within.is_older(version), within.is_newer(version)) == (older, newer)
    assert not Versions("5.4").is_newer(version)


@pytest.fixture
def tiny():
    from tests.models.test_lifecycle import TINY, tiny_llava

    return *tiny_llava(), TINY


def test_a_newer_transformers_is_warned_of_once(tiny, monkeypatch):
    model, inputs, policy = tiny
    monkeypatch.setattr("transformers.__version__", "6.1.0")
    versions._warn_of.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            with rk.apply(model, policy) as routing:
                model(**inputs)
            assert len(routing.trace.stages) == 2
    (warning,) = (each for each in caught if "newer" in str(each.message))
    assert re.fullmatch(rf"transformers 6\.1\.0 is newer .* transformers {TRANSFORMERS}", str(warning.message))
    assert (warning.category, warning.filename) == (UserWarning, __file__)


def test_a_tested_transformers_is_not_warned_of(tiny, monkeypatch):
    monkeypatch.setattr("transformers.__version__", f"{TRANSFORMERS.tested}.9")
    versions._warn_of.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rk.apply(tiny[0], tiny[2]).remove()


def test_an_older_transformers_is_refused(tiny, monkeypatch):
    monkeypatch.setattr("transformers.__version__", "4.57.6")
    with pytest.raises(
        NotImplementedError, match=rf"transformers must be {TRANSFORMERS.oldest} or later, got 4\.57\.6"
    ):
        rk.apply(tiny[0], tiny[2])


def test_a_model_that_is_built_differently_names_the_range(tiny):
    model, _, policy = tiny
    layer = model.model.language_model.layers[1]
    del layer.input_layernorm
    with pytest.raises(AttributeError, match=rf"input_layernorm' \(known to work: transformers {TRANSFORMERS}\)$"):
        rk.apply(model, policy)


@pytest.mark.parametrize(
    ("module", "package"), [("typer", "typer"), ("PIL", "Pillow"), ("sklearn.datasets", "scikit-learn")]
)
def test_install_command_names_the_distribution(module, package):
    assert install_command(ModuleNotFoundError(name=module)) == f"pip install {package}"
