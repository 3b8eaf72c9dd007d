"""The released configurations, against the paper's table typed a second time."""

import re

import pytest

import reroute_kernels as rk
from reroute_kernels import Policy, Stage

# Keep ratios by tier: FastV, PyramidDrop, Reroute matched to FastV, Reroute matched to PyramidDrop.
RATIOS = {
    192: {
        "fastv": [0.2644],
        "pdrop": [0.5965, 0.3558, 0.2123, 0.1266],
        "reroute-fastv": [0.2644, 0.2644, 0.2644, 0.2644],
        "reroute-pdrop": [0.4502, 0.4502, 0.2251, 0.1126],
    },
    128: {
        "fastv": [0.1418],
        "pdrop": [0.4570, 0.2088, 0.0954, 0.0436],
        "reroute-fastv": [0.1418, 0.1418, 0.1418, 0.1418],
        "reroute-pdrop": [0.2655, 0.2655, 0.1328, 0.0664],
    },
    64: {
        "fastv": [0.01916],
        "pdrop": [0.2789, 0.0937, 0.0315, 0.0106],
        "reroute-fastv": [0.01916, 0.01916, 0.01916, 0.01916],
        "reroute-pdrop": [0.1392, 0.1392, 0.0696, 0.0348],
    },
}
LAYERS = {
    "llava-1.5-7b": {
        "fastv": [3],
        "pdrop": [2, 7, 15, 23],
        "reroute-fastv": [3, 7, 15, 23],
        "reroute-pdrop": [2, 7, 15, 23],
    },
    "qwen2.5-vl-7b": {
        "fastv": [3],
        "pdrop": [2, 6, 13, 20],
        "reroute-fastv": [3, 6, 13, 20],
        "reroute-pdrop": [2, 6, 13, 20],
    },
}
ACTIONS = {"fastv": "remove", "pdrop": "remove", "reroute-fastv": "reroute", "reroute-pdrop": "reroute"}
CONFIGURATIONS = [(model, method, tier) for model in LAYERS for method in ACTIONS for tier in RATIOS]


@pytest.mark.parametrize(("model", "method", "tier"), CONFIGURATIONS)
def test_schedules_are_the_published_ones(model, method, tier):
    expected = Policy(
        schedule=[Stage(*stage) for stage in zip(LAYERS[model][method], RATIOS[tier][method], strict=True)],
        action=ACTIONS[method],
        ranking="last_query",
        positions="original",
    )
    assert rk.preset(model, method, tier) == expected
    assert rk.preset(model=model, method=method, avg_tokens=tier) == expected
    if method.startswith("reroute"):
        assert rk.preset(model, f"{method}-stagewise", tier) == expected


def test_there_are_36():
    names = rk.presets()
    assert len(names) == len(set(names)) == 36
    stagewise = [(m, f"{method}-stagewise", t) for m, method, t in CONFIGURATIONS if method.startswith("reroute")]
    assert set(names) == {*CONFIGURATIONS, *stagewise}
    assert all(isinstance(name, rk.Preset) and isinstance(rk.preset(*name), Policy) for name in names)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("llava-7b", "fastv", 192),
            "model must be one of 'llava-1.5-7b', 'qwen2.5-vl-7b', got 'llava-7b'",
        ),
        (
            ("llava-1.5-7b", "fastv-stagewise", 192),
            "method must be one of 'fastv', 'pdrop', 'reroute-fastv', 'reroute-fastv-stagewise', 'reroute-pdrop', "
            "'reroute-pdrop-stagewise', got 'fastv-stagewise'",
        ),
        (("llava-1.5-7b", "fastv", 100), "avg_tokens must be one of 192, 128, 64, got 100"),
    ],
)
def test_other_names_are_refused(arguments, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        rk.preset(*arguments)
