"""The names and signatures that users and other tools import."""

import inspect
from importlib.metadata import version

import pytest

import reroute_kernels as rk

OPERATIONS = [
    "align_tokens_",
    "column_saliency",
    "gather_tokens",
    "merge_tokens",
    "rank_tokens",
    "route_tokens",
    "scatter_norm_tokens_",
    "scatter_tokens_",
    "select_diverse",
    "select_dpp",
    "select_tokens",
]
RANKING = (
    "query: Tensor, key: Tensor, cos: Tensor | None = None, sin: Tensor | None = None, "
    "key_mask: Tensor | None = None, query_index: Tensor | None = None, past_key: Tensor | None = None, "
    "past_mask: Tensor | None = None, *, scale: float | None = None, query_reduction: str = mean, "
    "head_reduction: str = mean, rotary_style: str = rotate_half"
)


def test_names():
    classes = "Adapter Attention Calibration Cost Memory Policy Preset Routing Stage Trace"
    functions = (
        "apply backend calibrate cost measure_layers models ops preset presets rankings reducers ref remove routing_of "
        "solve suggest triton warm_up"
    )
    assert rk.__all__ == f"{classes} {functions}".split()
    assert dir(rk) == sorted([*rk.__all__, "__version__"])


@pytest.mark.parametrize("name", rk.__all__)
def test_every_name_resolves(name):
    if name in ("Adapter", "Routing", "apply", "models", "remove", "routing_of", "warm_up"):
        pytest.importorskip("transformers")
    assert getattr(rk, name) is not None


def test_operations_of_every_backend():
    assert rk.ref.__all__ == OPERATIONS
    assert rk.triton.__all__ == OPERATIONS
    assert all(callable(getattr(rk.ops, name)) for name in OPERATIONS)


def test_signatures():
    signatures = {name: str(inspect.signature(getattr(rk.ops, name))).replace("'", "") for name in OPERATIONS}
    assert signatures == {
        "align_tokens_": "(full: Tensor, index: Tensor, compact: Tensor, pool: Tensor) -> Tensor",
        "column_saliency": "(query: Tensor, key: Tensor, cu_seqlens: Tensor | None = None, *, "
        "scale: float | None = None, query_reduction: str = mean) -> Tensor",
        "gather_tokens": "(index: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]",
        "merge_tokens": "(features: Tensor, assignment: Tensor, groups: int) -> tuple[Tensor, Tensor]",
        "rank_tokens": f"({RANKING}) -> Tensor",
        "route_tokens": f"({RANKING}, pool: Tensor, pinned: Tensor, keep: int | Sequence[int] | Tensor, length: int, "
        "tensors: Sequence[Tensor] = (), return_scores: bool = False, memory: Memory | None = None) -> "
        "tuple[Tensor, tuple[Tensor, ...]] | tuple[Tensor, tuple[Tensor, ...], Tensor]",
        "scatter_norm_tokens_": "(full: Tensor, index: Tensor | None, compact: Tensor | None, weight: Tensor, "
        "eps: float, *, one_plus: bool = False) -> Tensor",
        "scatter_tokens_": "(full: Tensor, index: Tensor, compact: Tensor) -> Tensor",
        "select_diverse": "(features: Tensor, weights: Tensor | None = None, *, keep: int, "
        "lengths: Tensor | None = None) -> Tensor",
        "select_dpp": "(features: Tensor, relevance: Tensor, *, keep: int, lengths: Tensor | None = None) -> Tensor",
        "select_tokens": "(scores: Tensor, pool: Tensor, pinned: Tensor, keep: int | Sequence[int] | Tensor, "
        "length: int, memory: Memory | None = None) -> Tensor | tuple[Tensor, Tensor]",
    }


@pytest.mark.parametrize("module", [rk.ref, rk.triton], ids=["ref", "triton"])
@pytest.mark.parametrize("name", [name for name in OPERATIONS if name not in ("select_tokens", "route_tokens")])
def test_backends_have_the_same_signatures(module, name):
    assert inspect.signature(getattr(module, name)) == inspect.signature(getattr(rk.ops, name))


@pytest.mark.parametrize("name", ["select_tokens", "route_tokens"])
def test_selection_takes_counts_as_a_tensor_below_the_boundary(name):
    public, reference, kernels = (inspect.signature(getattr(module, name)) for module in (rk.ops, rk.ref, rk.triton))
    assert reference == kernels
    assert list(reference.parameters) == list(public.parameters)
    assert reference.parameters["keep"].annotation == "Tensor"


def test_unknown_name():
    with pytest.raises(AttributeError, match=r"^module 'reroute_kernels' has no attribute 'nothing'$"):
        _ = rk.nothing
    assert not hasattr(rk, "nothing")


def test_version_is_that_of_the_distribution():
    assert rk.__version__ == version("reroute-kernels")
