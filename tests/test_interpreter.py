"""Work that the tests leave out of Triton's interpreter: nothing that a kernel sees."""

import pytest
import torch

import reroute_kernels as rk
from tests.conftest import HAS_GPU

pytestmark = pytest.mark.skipif(HAS_GPU, reason="looks into Triton's interpreter")


@pytest.fixture
def patched(monkeypatch):
    """Names of the modules and classes of the language that the interpreter patched, in order."""
    from triton.runtime import interpreter

    seen, patch = [], interpreter._patch_builtin
    monkeypatch.setattr(
        interpreter, "_patch_builtin", lambda package, *rest: seen.append(package.__name__) or patch(package, *rest)
    )
    return seen


@pytest.mark.parametrize("kept", [1, 20])
def test_the_language_is_patched_once_a_launch(patched, kept):
    full = torch.randn(1, 20, 8)
    rk.triton.gather_tokens(torch.arange(kept)[None], full)
    assert patched.count("tensor") == 1
    patched.clear()
    rk.triton.scatter_norm_tokens_(full, None, None, torch.ones(8), 1e-6)  # calls functions of the language, too
    assert 2 <= patched.count("tensor") <= 3  # in two modules, one of which can be patched beside the other again


def test_a_launch_leaves_the_language_as_it_was():
    from triton import language as tl

    before = dict(vars(tl)), dict(vars(tl.tensor)), dict(vars(tl.math))
    rk.triton.gather_tokens(torch.zeros(1, 1, dtype=torch.int64), torch.randn(1, 2, 8))
    assert (dict(vars(tl)), dict(vars(tl.tensor)), dict(vars(tl.math))) == before


def test_a_failed_launch_leaves_the_language_as_it_was(monkeypatch):
    from triton import language as tl
    from triton.runtime import interpreter

    before = dict(vars(tl))
    with monkeypatch.context() as patch:
        patch.setattr(interpreter.InterpreterBuilder, "create_masked_load", lambda *_: 1 / 0)
        with pytest.raises(interpreter.InterpreterError, match="ZeroDivisionError"):
            rk.triton.gather_tokens(torch.zeros(1, 1, dtype=torch.int64), torch.randn(1, 2, 8))
    assert dict(vars(tl)) == before
    assert rk.triton.gather_tokens(torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 2, 8))[0].eq(1).all()


def test_dtypes_are_those_of_the_interpreter():
    import numpy as np
    from triton import language as tl
    from triton.runtime import interpreter

    of = interpreter._get_np_dtype
    assert [of(dtype) for dtype in (tl.float16, tl.bfloat16, tl.float32, tl.int1, tl.int64)] == [
        np.dtype(name) for name in ("float16", "uint16", "float32", "bool", "int64")
    ]
    assert of(tl.pointer_type(tl.float32)) == of(tl.block_type(tl.pointer_type(tl.int8), [2])) == np.dtype("uint64")
    assert of(tl.block_type(tl.int8, [4])) == np.dtype("int8")
