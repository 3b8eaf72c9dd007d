"""The released configurations, against the paper's table typed a second time."""

import re
from types import SimpleNamespace

import pytest

import reroute_kernels as rk
from reroute_kernels import Policy, Stage
from reroute_kernels.presets import MODELS, ORIGINALS, REDUCED, tiers
from reroute_kernels.rankings import LastQuery, TextRaters
from reroute_kernels.reducers import Nuwa

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


def test_originals_come_on_request():
    names = rk.presets(originals=True)
    added = [name for name in names if name not in rk.presets()]
    assert len(set(names)) == len(names) == 36 + len(added)
    listed = {(model, method) for model in LAYERS for method in ORIGINALS}
    listed |= {("qwen2.5-vl-7b" if "vid" in method else "llava-1.5-7b", method) for method in REDUCED}
    assert {(name.model, name.method) for name in added} == listed
    for name in names:
        assert name.avg_tokens in tiers(name.model, name.method)
        rk.preset(*name)


@pytest.mark.parametrize("model", LAYERS)
@pytest.mark.parametrize(("tier", "selected"), [(192, 152), (128, 82), (64, 11)])
def test_fastv_of_its_authors(model, tier, selected):
    policy = rk.preset(model, "fastv-original", tier)
    assert policy.selected_counts(576) == (selected,)
    assert policy.stage_layers == (3,)
    assert policy == Policy(policy.schedule, "remove", LastQuery(layer="previous"))


@pytest.mark.parametrize(("model", "layers"), [("llava-1.5-7b", (8, 16, 24)), ("qwen2.5-vl-7b", (7, 14, 21))])
def test_pyramiddrop_of_its_authors(model, layers):
    stages = [Stage(layer, keep) for layer, keep in zip(layers, (0.5, 0.25, 0.125), strict=True)]
    policy = rk.preset(model, "pdrop-original", 270)
    assert policy == Policy(stages, "remove", LastQuery(), positions="contiguous")
    assert rk.cost.average_visual_tokens(policy, MODELS[model].decoder.layers, 576) == 576 * 0.46875 == 270


# The first stage's share and proposals, then the tokens that it leaves, those that the second keeps, and the average.
NUWA = {
    ("llava-1.5-7b", 64): (112 / 576, 1, 112, 16, 64),
    ("llava-1.5-7b", 128): (224 / 576, 2, 224, 32, 128),
    ("llava-1.5-7b", 192): (336 / 576, 3, 336, 48, 192),
    ("qwen2.5-vl-7b", 144): (0.35, 3, 202, 84, (15 * 202 + 13 * 84) / 28),
    ("qwen2.5-vl-7b", 288): (0.6, 3, 346, 228, (15 * 346 + 13 * 228) / 28),
    ("qwen2.5-vl-7b", 432): (0.85, 4, 490, 343, (15 * 490 + 13 * 343) / 28),
}


@pytest.mark.parametrize(("model", "tier"), NUWA)
@pytest.mark.parametrize("method", ["nuwa", "reroute-nuwa"])
def test_nuwa(model, tier, method):
    share, per_cell, anchors, selected, average = NUWA[model, tier]
    policy = rk.preset(model, method, tier)
    if model == "llava-1.5-7b":
        reducer, ranking, layers = Nuwa(share, per_cell), LastQuery("previous"), (16, 23)
    else:
        reducer = Nuwa(share, per_cell, distance=0.8, quantile=0.1, keeps_own=False)
        ranking, layers = LastQuery("previous", queries=3, head_reduction="max"), (15, 21)
    action = "remove" if method == "nuwa" else "reroute"
    assert policy == Policy(policy.schedule, action, ranking, reducer=reducer)
    assert policy.stage_layers == (0, *layers[: 1 if method == "nuwa" else 2])
    assert reducer.survivors(576) == anchors
    assert set(policy.selected_counts(576, anchors)) == {selected}
    assert rk.cost.average_visual_tokens(policy, MODELS[model].decoder.layers, 576) == average


@pytest.mark.parametrize(("model", "layers"), [("llava-1.5-7b", (3, 7, 16)), ("qwen2.5-vl-7b", (3, 6, 14))])
@pytest.mark.parametrize(
    ("tier", "selected", "means"),
    [(192, (300, 200, 110), (9, 4, 3)), (128, (303, 110, 36), (9, 7, 3)), (64, (66, 30, 17), (16, 2, 1))],
)
def test_sparsevlm(model, layers, tier, selected, means):
    published, deferring = (rk.preset(model, method, tier) for method in ("sparsevlm", "reroute-sparsevlm"))
    assert published == Policy(published.schedule, "remove", TextRaters(), recycle=0.3)
    assert deferring == Policy(deferring.schedule, "reroute", TextRaters())
    assert published.stage_layers == deferring.stage_layers == layers
    counts = published.selected_counts(576)
    assert counts == tuple(map(sum, zip(selected, means, strict=True)))
    assert tuple(clusters for _, clusters in published.recycled_counts(counts, 576)) == means
    assert len(set(deferring.selected_counts(576))) == 1
    total = MODELS[model].decoder.layers
    mine, theirs = (rk.cost.average_visual_tokens(each, total, 576) for each in (deferring, published))
    assert theirs - 1 < mine <= theirs


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
            "'reroute-pdrop-stagewise', 'fastv-original', 'pdrop-original', 'nuwa', 'reroute-nuwa', 'sparsevlm', "
            "'reroute-sparsevlm', 'visionzip', "
            "'reroute-visionzip', 'divprune', 'reroute-divprune', 'cdpruner', 'reroute-cdpruner', 'holov', "
            "'reroute-holov', 'vispruner', 'reroute-vispruner', 'flashvid', 'reroute-flashvid', 'vidcom2', "
            "'reroute-vidcom2', got 'fastv-stagewise'",
        ),
        (("llava-1.5-7b", "fastv", 100), "avg_tokens must be one of 192, 128, 64, got 100"),
        (("llava-1.5-7b", "pdrop-original", 192), "avg_tokens must be one of 270, got 192"),
        (("llava-1.5-7b", "nuwa", 144), "avg_tokens must be one of 192, 128, 64, got 144"),
        (("qwen2.5-vl-7b", "reroute-nuwa", 64), "avg_tokens must be one of 432, 288, 144, got 64"),
    ],
)
def test_other_names_are_refused(arguments, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        rk.preset(*arguments)


def model(layers, kinds=None, model_type="qwen3_vl", shared=0):
    text = SimpleNamespace(num_hidden_layers=layers, layer_types=kinds, num_kv_shared_layers=shared)
    return SimpleNamespace(model_type=model_type, get_text_config=lambda: text)


@pytest.mark.parametrize(
    ("of", "method", "layers"),
    [
        (model(64), "reroute-fastv", [6, 14, 30, 46]),
        (model(36), "reroute-fastv", [3, 8, 17, 26]),
        (model(36), "fastv", [3]),
        (model(36), "pdrop", [2, 8, 17, 26]),
        (model(40, (["linear_attention"] * 3 + ["full_attention"]) * 10), "reroute-fastv-stagewise", [3, 7, 19, 27]),
        (model(48, (["sliding_attention"] * 5 + ["full_attention"]) * 8), "reroute-fastv", [5, 11, 23, 35]),
        # The last layer before those that read keys of others stands at 29, the last with a window at 28.
        (model(60, (["sliding_attention"] * 5 + ["full_attention"]) * 10, shared=30), "reroute-fastv", [5, 11, 23]),
        (model(4), "reroute-fastv", [0, 1, 2, 3]),  # layer 1 alone would cost 144 tokens
        (model(32, model_type="llava"), "reroute-fastv", [3, 7, 15, 23]),
    ],
)
def test_other_models_decide_at_the_depths_of_published_ones(of, method, layers):
    policy = rk.preset(of, method, 65)
    assert [stage.layer for stage in policy.schedule] == layers
    assert policy.action == ("reroute" if method.startswith("reroute") else "remove")
    count = of.get_text_config().num_hidden_layers
    assert 64 <= rk.cost.average_visual_tokens(policy, count, 576) <= 65
    assert policy.budget.limit == 65


WINDOWED = (["sliding_attention"] * 5 + ["full_attention"]) * 4


@pytest.mark.parametrize(
    ("where", "name", "stated", "count", "limit"),
    [
        ("config", "mm_tokens_per_image", 256, 256, 66),
        ("config", "vision_soft_tokens_per_image", 280, 280, 66),
        ("text_config", "num_image_tokens", 256, 256, 66),
        ("vision_config", "num_image_tokens", 300, 300, 66),
        ("config", "image_seq_length", 256, 576, 130),  # of a tile
    ],
)
def test_budgets_are_of_the_visual_tokens_of_an_image(where, name, stated, count, limit):
    """A decoder that decides from layer 5 of 24 on costs 121 of 576 tokens."""
    of = model(24, WINDOWED)
    vars(of if where == "config" else vars(of).setdefault(where, SimpleNamespace()))[name] = stated
    policy = rk.preset(of, "reroute-fastv", limit)
    assert policy.schedule[0].layer == 5
    assert limit - 3 <= rk.cost.average_visual_tokens(policy, 24, count) <= limit
    assert policy == rk.preset(of, "reroute-fastv", limit, visual_tokens=count)
    assert policy == rk.Policy.parse(f"reroute-fastv/{limit}", of)


def test_gemma4_has_the_images_of_its_processor():
    policies = [rk.preset(model(24, WINDOWED, each), "reroute-pdrop", 66) for each in ("gemma4", "gemma4_unified")]
    assert policies == [rk.preset(model(24, WINDOWED), "reroute-pdrop", 66, visual_tokens=280)] * 2


@pytest.mark.parametrize("of", ["llava-1.5-7b", model(32, model_type="llava")])
def test_published_schedules_are_solved_for_other_numbers_of_visual_tokens(of):
    policy = rk.preset(of, "reroute-fastv", 192, visual_tokens=1024)
    assert [stage.layer for stage in policy.schedule] == [3, 7, 15, 23]
    assert 191 < rk.cost.average_visual_tokens(policy, 32, 1024) <= 192
    removing, deferring = (
        rk.cost.average_visual_tokens(rk.preset(of, each, 192, matched=True, visual_tokens=1024), 32, 1024)
        for each in ("pdrop", "reroute-pdrop")
    )
    assert 0 <= removing - deferring < 0.5
    reducing = rk.preset(of, "reroute-visionzip", 64, visual_tokens=1024)
    assert reducing.reducer.survivors(1024) == 128
    assert 63 < rk.cost.average_visual_tokens(reducing, 32, 1024) <= 64


def test_published_models_keep_their_presets():
    of = model(28, model_type="qwen2_5_vl")
    assert rk.preset(of, "reroute-fastv", 192) == rk.preset("qwen2.5-vl-7b", "reroute-fastv", 192)
    assert rk.preset(of, "nuwa", 144) == rk.preset("qwen2.5-vl-7b", "nuwa", 144)


def test_matched_pairs_of_other_models_run_as_many_tokens():
    averages = [
        rk.cost.average_visual_tokens(rk.preset(model(36), method, 100, matched=True), 36, 576)
        for method in ("pdrop", "reroute-pdrop")
    ]
    assert 0 <= averages[0] - averages[1] < 0.5


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((model(36), "nuwa", 64), ValueError, "method must be one of 'fastv', .*, got 'nuwa'"),
        ((model(36), "fastv", "64"), TypeError, "avg_tokens must be a number, got '64'"),
        ((model(36), "fastv", 0.5), ValueError, "avg_tokens must be 1.0 or more"),
        ((model(2, ["sliding_attention"] * 2), "fastv", 64), ValueError, "must have layers with full attention"),
        ((model(8, ["linear_attention"] * 7 + ["full_attention"]), "fastv", 64), ValueError, "avg_tokens must be 504"),
        ((3, "fastv", 64), TypeError, "config_or_model must be a transformers model or configuration"),
        ((model(24, WINDOWED), "fastv", 64), ValueError, "avg_tokens must be 120"),
    ],
)
def test_presets_that_other_models_cannot_have(arguments, error, message):
    with pytest.raises(error, match=message):
        rk.preset(*arguments)


@pytest.mark.parametrize(
    ("count", "error", "message"),
    [(0, ValueError, "visual_tokens must be 1 or more, got 0"), (2.5, TypeError, "visual_tokens must be an integer")],
)
@pytest.mark.parametrize("method", ["fastv", "visionzip"])
def test_numbers_of_visual_tokens_that_are_refused(count, error, message, method):
    with pytest.raises(error, match=message):
        rk.preset("llava-1.5-7b", method, 64, visual_tokens=count)
