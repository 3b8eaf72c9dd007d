"""Tensors that do not fit are refused wherever an operation can be called: registered, by backend, or compiled."""

import pytest
import torch

import reroute_kernels as rk
from reroute_kernels import checks


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


def flags(*shape):
    return torch.zeros(shape, dtype=torch.bool)


def positions(*shape):
    return torch.zeros(shape, dtype=torch.int64)


RANKING = {
    "query": zeros(2, 1, 4, 16),
    "key": zeros(2, 20, 2, 16),
    "cos": zeros(2, 20, 8),
    "sin": zeros(2, 20, 8),
    "key_mask": flags(2, 20),
    "query_index": positions(2, 1),
    "past_key": zeros(2, 7, 2, 16),
    "past_mask": flags(2, 7),
}
NAMES = {"query_reduction": "mean", "head_reduction": "mean", "rotary_style": "rotate_half"}
SELECTION = {"pool": flags(2, 20), "pinned": flags(2, 20), "keep": positions(2), "length": 12}
GREEDY = {"select_diverse": "weights", "select_dpp": "relevance"}
ACCEPTED = {
    "rank_tokens": RANKING,
    "select_tokens": {"scores": zeros(2, 20), **SELECTION},
    "select_diverse": {"features": zeros(2, 20, 4), "weights": zeros(2, 20), "keep": 3, "lengths": positions(2)},
    "select_dpp": {"features": zeros(2, 20, 4), "relevance": zeros(2, 20), "keep": 3, "lengths": positions(2)},
    "gather_tokens": {"index": positions(2, 3), "tensors": (zeros(2, 20, 4), zeros(2, 20))},
    "scatter_tokens_": {"full": zeros(2, 20, 4), "index": positions(2, 3) - 1, "compact": zeros(2, 3, 4)},
    "route_tokens": {**RANKING, **SELECTION, "tensors": (zeros(2, 20, 4),)},
    "align_tokens_": {
        "full": zeros(2, 20, 4),
        "index": positions(2, 3) - 1,
        "compact": zeros(2, 3, 4),
        "pool": flags(2, 20),
    },
    "column_saliency": {"query": zeros(2, 20, 4, 16), "key": zeros(2, 20, 2, 16), "cu_seqlens": positions(3)},
    "merge_tokens": {"features": zeros(2, 20, 4), "assignment": positions(2, 20), "groups": 3},
    "scatter_norm_tokens_": {
        "full": zeros(2, 20, 4),
        "index": positions(2, 3) - 1,
        "compact": zeros(2, 3, 4),
        "weight": zeros(4),
        "eps": 1e-6,
        "one_plus": False,
    },
}
REFUSED = [
    ("rank_tokens", "query", zeros(4, 1, 4, 16)),
    ("rank_tokens", "key", zeros(2, 20, 2, 8)),
    ("rank_tokens", "key", zeros(2, 20, 3, 16)),
    ("rank_tokens", "cos", zeros(2, 19, 8)),
    ("rank_tokens", "cos", zeros(2, 20, 18)),
    ("rank_tokens", "sin", zeros(1, 20, 8)),
    ("rank_tokens", "key_mask", flags(2, 10)),
    ("rank_tokens", "query_index", positions(1, 1)),
    ("rank_tokens", "query_index", positions(2, 1).int()),
    ("rank_tokens", "past_key", zeros(1, 7, 2, 16)),
    ("rank_tokens", "past_mask", flags(2, 5)),
    *(("rank_tokens", name, "sum") for name in NAMES),
    ("select_tokens", "scores", zeros(2, 20).double()),
    ("select_tokens", "pool", flags(2, 10)),
    ("select_tokens", "pinned", flags(1, 20)),
    ("select_tokens", "pinned", positions(2, 20)),
    ("select_tokens", "keep", positions(1)),
    ("select_tokens", "length", -1),
    *((name, "features", zeros(2, 20)) for name in GREEDY),
    *((name, "features", zeros(2, 20, 4).double()) for name in GREEDY),
    *((name, "keep", -1) for name in GREEDY),
    *((name, "lengths", positions(3)) for name in GREEDY),
    *((name, "lengths", positions(2).short()) for name in GREEDY),
    *((name, values, zeros(2, 19)) for name, values in GREEDY.items()),
    *((name, values, zeros(2, 20).half()) for name, values in GREEDY.items()),
    ("gather_tokens", "index", positions(4, 3)),
    ("gather_tokens", "index", positions(2, 3).int()),
    ("gather_tokens", "tensors", (zeros(2, 20, 4), zeros(2, 5, 4))),
    ("gather_tokens", "tensors", (zeros(2, 20, 4), zeros(1, 20, 4))),
    ("gather_tokens", "tensors", (zeros(2),)),
    ("scatter_tokens_", "index", positions(4, 3)),
    ("scatter_tokens_", "full", zeros(1, 20, 4)),
    ("scatter_tokens_", "compact", zeros(2, 2, 4)),
    ("scatter_tokens_", "compact", zeros(2, 3, 5)),
    ("scatter_tokens_", "compact", zeros(2, 3, 4).double()),
    ("route_tokens", "key", zeros(2, 10, 2, 16)),
    *(("route_tokens", name, "sum") for name in NAMES),
    ("route_tokens", "pool", flags(2, 10)),
    ("route_tokens", "keep", positions(3)),
    ("route_tokens", "tensors", (zeros(2, 10, 4),)),
    ("route_tokens", "tensors", (zeros(2, 20, 4), zeros(2, 10, 4))),
    ("align_tokens_", "full", zeros(2, 20, 4).double()),
    ("align_tokens_", "full", zeros(2, 20)),
    ("align_tokens_", "full", zeros(1, 20, 4)),
    ("align_tokens_", "index", positions(4, 3)),
    ("align_tokens_", "index", positions(2, 3).int()),
    ("align_tokens_", "compact", zeros(2, 2, 4)),
    ("align_tokens_", "compact", zeros(2, 3, 4).half()),
    ("align_tokens_", "pool", zeros(2, 20)),
    ("align_tokens_", "pool", flags(2, 3)),
    ("column_saliency", "query", zeros(2, 20, 4, 8)),
    ("column_saliency", "query", zeros(2, 19, 4, 16)),
    ("column_saliency", "query", zeros(2, 20, 3, 16)),
    ("column_saliency", "key", zeros(2, 20, 2, 16).half()),
    ("column_saliency", "key", zeros(1, 20, 2, 16)),
    ("column_saliency", "cu_seqlens", positions(1)),
    ("column_saliency", "cu_seqlens", positions(3, 1)),
    ("column_saliency", "cu_seqlens", zeros(3)),
    ("column_saliency", "query_reduction", "max"),
    ("merge_tokens", "features", zeros(2, 20)),
    ("merge_tokens", "features", zeros(2, 20, 4).double()),
    ("merge_tokens", "assignment", positions(2, 19)),
    ("merge_tokens", "assignment", positions(2, 20).int()),
    ("merge_tokens", "groups", -1),
    ("scatter_norm_tokens_", "index", positions(4, 3)),
    ("scatter_norm_tokens_", "full", zeros(2, 20, 5)),
    ("scatter_norm_tokens_", "full", zeros(1, 20, 4)),
    ("scatter_norm_tokens_", "full", zeros(2, 20, 4).double()),
    ("scatter_norm_tokens_", "full", zeros(2, 20)),
    ("scatter_norm_tokens_", "compact", zeros(2, 2, 4)),
    ("scatter_norm_tokens_", "compact", zeros(2, 3, 4).half()),
    ("scatter_norm_tokens_", "weight", zeros(3)),
    ("scatter_norm_tokens_", "weight", zeros(4).half()),
]
IDS = [f"{name}-{argument}-{number}" for number, (name, argument, _) in enumerate(REFUSED)]


def registered(name, arguments):
    values = dict(arguments)
    if name in ("rank_tokens", "route_tokens"):
        ranking = [values.pop(each) for each in RANKING]
        names = [values.pop(each, default) for each, default in NAMES.items()]
        return getattr(torch.ops.reroute_kernels, name)(*ranking, 1.0, *names, *values.values())
    if name == "column_saliency":
        reduction = values.pop("query_reduction", "mean")
        return torch.ops.reroute_kernels.column_saliency(*values.values(), 1.0, reduction)
    return getattr(torch.ops.reroute_kernels, name)(*values.values())


def of_backend(module):
    def call(name, arguments):
        values = dict(arguments)
        tensors = values.pop("tensors", ()) if name == "gather_tokens" else ()
        return getattr(module, name)(*values.values(), *tensors) if tensors else getattr(module, name)(**values)

    return call


WAYS = {"registered": registered, "ref": of_backend(rk.ref), "triton": of_backend(rk.triton)}


@pytest.mark.parametrize("name", ACCEPTED)
@pytest.mark.parametrize("way", WAYS)
def test_accepted(device, way, name):
    if device.type != "cpu":
        pytest.skip("tensors of this file are on the CPU")
    WAYS[way](name, ACCEPTED[name])


@pytest.mark.parametrize(("name", "argument", "value"), REFUSED, ids=IDS)
@pytest.mark.parametrize("way", WAYS)
def test_refused(way, name, argument, value, launches):
    """Before a kernel is launched that would read or write outside its tensors."""
    arguments = {**ACCEPTED[name], argument: value}
    written = arguments["full"].clone() if name.startswith("scatter") else None
    backend = "triton" if way == "registered" else None
    with rk.backend(backend), pytest.raises(ValueError, match=r"\w+(\[\d\])? must be .*, got"):
        WAYS[way](name, arguments)
    assert "copy_rows_to_full" not in [launched for launched, _ in launches]
    if written is not None:
        assert torch.equal(arguments["full"], written)
    if name != "route_tokens":
        assert launches == []


@pytest.mark.parametrize(("name", "argument", "value"), REFUSED, ids=IDS)
def test_refused_where_shapes_are_asked_for(name, argument, value):
    """The compiler runs an operation on tensors without memory."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:

        def fake(x):
            if isinstance(x, tuple):
                return tuple(map(fake, x))
            return mode.from_tensor(x) if isinstance(x, torch.Tensor) else x

        arguments = {name: fake(x) for name, x in {**ACCEPTED[name], argument: value}.items()}
        with pytest.raises(ValueError, match=r"must be .*, got"):
            registered(name, arguments)


@pytest.mark.parametrize("name", ACCEPTED)
def test_tensors_are_checked_once(name, monkeypatch, device):
    """Tensors are checked right before memory is touched and only there: twice would cost the host twice."""
    counted = []
    names = "ranking selection gather scatter norm align diverse dpp saliency merge"
    parts = "rank select gather scatter scatter_norm align diverse dpp saliency merge"
    for check in [f"check_{each}" for each in names.split()]:
        for module in (rk.ref, rk.triton):
            for part in parts.split():
                target = f"{module.__name__}.{part}.{check}"
                original = getattr(checks, check)

                def counting(*args, check=check, original=original):
                    counted.append(check)
                    return original(*args)

                monkeypatch.setattr(target, counting, raising=False)
    arguments = {
        key: tuple(x.to(device) for x in value)
        if isinstance(value, tuple)
        else value.to(device)
        if isinstance(value, torch.Tensor)
        else value
        for key, value in ACCEPTED[name].items()
    }
    tensors = arguments.pop("tensors") if name == "gather_tokens" else ()
    getattr(rk.ops, name)(*arguments.values(), *tensors) if tensors else getattr(rk.ops, name)(**arguments)
    expected = {
        "rank_tokens": ["check_ranking"],
        "select_tokens": ["check_selection"],
        "select_diverse": ["check_diverse"],
        "select_dpp": ["check_dpp"],
        "gather_tokens": ["check_gather"],
        "scatter_tokens_": ["check_scatter"],
        "route_tokens": ["check_ranking", "check_selection", "check_gather"],
        "scatter_norm_tokens_": ["check_norm", "check_scatter"],
        "align_tokens_": ["check_align"],
        "column_saliency": ["check_saliency"],
        "merge_tokens": ["check_merge"],
    }
    assert counted == expected[name]


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64])
@pytest.mark.parametrize("backend", ["ref", "triton"])
def test_scatter_where_inputs_lie_in_what_is_written(device, backend, dtype):
    """The index, or the rows, in the memory of the full sequence."""
    memory = torch.arange(8, device=device).flip(0).view(1, 8).to(dtype)
    index = memory[:, 4:] if dtype == torch.int64 else torch.tensor([[3, 2, 1, 0]], device=device)
    compact = memory[:, :4] + 10 if dtype == torch.int64 else memory[:, :4]
    expected = memory.clone()
    expected[0, index[0].clone()] = compact[0].clone()
    with rk.backend(backend):
        rk.ops.scatter_tokens_(memory, index, compact)
    assert torch.equal(memory, expected)


@pytest.mark.parametrize("name", ["scatter_tokens_", "scatter_norm_tokens_", "align_tokens_"])
@pytest.mark.parametrize("way", WAYS)
def test_writing_to_elements_that_share_memory_is_refused(way, name, launches):
    full = zeros(2, 1, 4).expand(2, 20, 4)
    backend = "triton" if way == "registered" else None
    with rk.backend(backend), pytest.raises(ValueError, match="full must not hold an element twice"):
        WAYS[way](name, {**ACCEPTED[name], "full": full, "index": positions(2, 3)})
    assert launches == []
