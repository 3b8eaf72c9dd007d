"""No tensor of the package takes its dtype or its device from a default that a user set."""

import ast
from pathlib import Path

import pytest

import reroute_kernels as rk

ROOTS = [Path(rk.__file__).parent, Path(__file__).parents[1] / "models"]
FILES = sorted(path for root in ROOTS for path in root.rglob("*.py"))
# Functions that make floats unless a dtype is given; and functions whose dtype follows the values handed in.
FILLED = ("zeros", "ones", "empty", "rand", "randn", "linspace", "logspace", "eye", "empty_strided", "normal")
VALUED = ("full", "tensor", "arange", "range", "scalar_tensor", "as_tensor", "asarray", "randint", "randperm")
# Values of these are integers or bools, whatever the default dtype is.
COUNTED = {"randint", "randperm"}


def tensors_made(tree):
    """(call, name) of every `torch.zeros(...)` and its like, and of those handed on by name, as to `map`."""
    called = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and (name := factory(node.func)):
            called.add(node.func)
            yield node, name
    for node in ast.walk(tree):
        if node not in called and (name := factory(node)):
            yield node, name


def factory(node) -> str | None:
    is_torch = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch"
    return node.attr if is_torch and node.attr in FILLED + VALUED else None


def holds_no_float(node: ast.expr) -> bool:
    """Whether a value has no float written in it, nor a division, nor a constant such as `math.inf`."""
    floats = {"inf", "nan", "pi", "e"}
    return not any(
        (isinstance(part, ast.Constant) and isinstance(part.value, float))
        or (isinstance(part, ast.Attribute) and part.attr in floats)
        or (isinstance(part, ast.BinOp) and isinstance(part.op, ast.Div))
        for part in ast.walk(node)
    )


def faults(source: str) -> list[str]:
    found = []
    for node, name in tensors_made(ast.parse(source)):
        if not isinstance(node, ast.Call):
            found.append(f"line {node.lineno}: torch.{name} handed on without a device")
            continue
        given = {keyword.arg for keyword in node.keywords}
        is_whole = name in VALUED and (name in COUNTED or all(map(holds_no_float, node.args)))
        if "dtype" not in given and not is_whole:
            found.append(f"line {node.lineno}: torch.{name} without a dtype")
        if "device" not in given:
            found.append(f"line {node.lineno}: torch.{name} without a device")
    return found


@pytest.mark.parametrize(
    ("source", "missing"),
    [
        ("torch.zeros(3, device=d)", "dtype"),
        ("torch.full((3,), math.inf, device=d)", "dtype"),
        ("torch.tensor([0.5], device=d)", "dtype"),
        ("torch.arange(3)", "device"),
        ("map(torch.arange, sizes)", "device"),
        ("torch.randn(3, dtype=torch.float32, generator=g)", "device"),
        ("torch.arange(3, device=d)", None),
        ("torch.tensor([[1, 2]], device=d)", None),
        ("torch.ones(3, dtype=torch.bool, device=d)", None),
        ("torch.zeros_like(x)", None),
    ],
)
def test_what_is_noticed(source, missing):
    assert [each.rpartition(" ")[2].rstrip(".") for each in faults(source)] == ([missing] if missing else [])


@pytest.mark.parametrize("path", FILES, ids=lambda path: "/".join(path.parts[-2:]))
def test_every_tensor_is_made_with_a_dtype_and_a_device(path):
    assert not faults(path.read_text())
