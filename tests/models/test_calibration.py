"""Qualities of layers against the same done the slow way; resumed runs; models that are left as they were."""

import json
import sys

import pytest
import torch
from torch.nn.functional import kl_div

import reroute_kernels as rk
from reroute_kernels.rankings import LastQuery, Mixed
from tests.models import slow_way
from tests.models.conftest import hooks
from tests.models.families import load
from tests.models.slow_way import SlowWay, decoder_of

LAYERS, EARLY, SHARE = [2, 4, 5], 2, 0.2
MEASURED = {"layers": LAYERS, "early": EARLY, "share": SHARE, "progress": False}


@pytest.fixture(scope="module", params=["llava", "qwen2_5_vl"])
def case(request):
    return load(request.param)


@pytest.fixture(autouse=True)
def _untouched():
    yield
    for name in ("llava", "qwen2_5_vl"):
        model = load(name).model
        assert rk.routing_of(model) is None
        assert not hooks(model)
        assert not any(module.training for module in model.modules())


@pytest.fixture(scope="module")
def prompts(case):
    return [case.prompt(1, 4, 9, seed=1), case.prompt(2, 7, 5, seed=2)]


@pytest.fixture(scope="module")
def samples(case, prompts):
    return [case.batch([prompt]) for prompt in prompts]


def values_of(path):
    """(samples, layers) values in a log."""
    return [json.loads(line)["layers"] for line in path.read_text().splitlines()[1:]]


@torch.no_grad()
def agreement_the_slow_way(model, inputs, layer):
    """exp(-KL) of the next token under all tokens and under the best of a layer, from the early one on."""
    reference = model(**inputs).logits[0, -1].log_softmax(-1)
    with SlowWay(model, rk.Policy([rk.Stage(layer, SHARE)])) as ranked:
        model(**inputs)
    (best,) = ranked.selected
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slow_way, "scored", lambda ranking, _, count, pool, *rest: {each: each in best for each in pool})
        with SlowWay(model, rk.Policy([rk.Stage(EARLY, SHARE)], "remove")) as limited:
            found = model(**inputs).logits[0, -1].log_softmax(-1)
    assert limited.selected == [best]
    return torch.exp(-kl_div(found, reference, log_target=True, reduction="sum")).item()


def test_qualities_are_those_of_the_slow_way(case, samples, tmp_path):
    path = tmp_path / "log.jsonl"
    found = rk.measure_layers(case.model, samples, resume=path, **MEASURED)
    expected = [[agreement_the_slow_way(case.model, each, layer) for layer in LAYERS] for each in samples]
    assert len({round(value, 3) for row in expected for value in row}) > 3, "the layers must differ"
    got = torch.tensor(values_of(path)).squeeze(-1)
    torch.testing.assert_close(got, torch.tensor(expected), atol=1e-4, rtol=0)
    means = torch.tensor(list(found.quality.values()))
    torch.testing.assert_close(means, got.mean(dim=0), atol=1e-6, rtol=0)
    assert list(found.quality) == LAYERS
    assert (found.measure, found.unrouted, found.samples) == ("agreement", 1.0, 2)
    counts = sorted(int((each["input_ids"] == 500).sum()) for each in samples)
    assert found.visual_tokens == counts[0]
    assert found.text_tokens == min(
        each["input_ids"].numel() - int((each["input_ids"] == 500).sum()) for each in samples
    )


@pytest.mark.filterwarnings("ignore:.*right-padding.*")
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_is_its_samples(side, tmp_path):
    """A row without an image has no value."""
    case = load("qwen2_5_vl")
    prompts = [case.prompt(1, 4, 9, seed=1), case.prompt(0, 9, 9, seed=3), case.prompt(2, 7, 5, seed=2)]
    alone, together = tmp_path / "alone", tmp_path / "together"
    rk.measure_layers(case.model, [case.batch([prompts[0]]), case.batch([prompts[2]])], resume=alone, **MEASURED)
    found = rk.measure_layers(case.model, [case.batch(prompts, side)], resume=together, **MEASURED)
    expected = torch.tensor(values_of(alone)).squeeze(-1)
    torch.testing.assert_close(torch.tensor(values_of(together))[0].T, expected, atol=1e-4, rtol=0)
    assert (found.samples, found.visual_tokens) == (2, 24)


def test_what_is_around_a_ranking_is_not_measured(tmp_path):
    case = load("qwen2_5_vl")
    samples = [case.batch([case.prompt(1, 4, 9, seed=1)])]
    mixed, alone = (
        rk.measure_layers(case.model, samples, ranking=ranking, **MEASURED)
        for ranking in (Mixed(LastQuery(rotary=False), 0.5), LastQuery(rotary=False))
    )
    assert mixed == alone
    assert alone.ranking == LastQuery(rotary=False)
    assert alone.quality != rk.measure_layers(case.model, samples, **MEASURED).quality


# Resumed


def calls(model):
    """Counts the calls of a model's decoder, until the handle is removed."""
    made = []
    handle = decoder_of(model).register_forward_pre_hook(lambda *_: made.append(True))
    return made, handle


def test_resumed_equals_whole(case, samples, tmp_path):
    path = tmp_path / "log.jsonl"

    def interrupted():
        yield samples[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rk.measure_layers(case.model, interrupted(), resume=path, **MEASURED)
    assert len(path.read_text().splitlines()) == 2
    made, handle = calls(case.model)
    try:
        resumed = rk.measure_layers(case.model, samples, resume=path, **MEASURED)
    finally:
        handle.remove()
    assert len(made) == 1 + len(LAYERS), "the first sample is not measured again"
    assert resumed == rk.measure_layers(case.model, samples, **MEASURED)
    assert rk.measure_layers(case.model, samples[:1], resume=path, **MEASURED).samples == 1
    with pytest.raises(ValueError, match=r"resume must hold the measurements of the same samples .* another sample 0"):
        rk.measure_layers(case.model, samples[::-1], resume=path, **MEASURED)


@pytest.mark.parametrize("changed", ["layers", "share", "seed", "early", "score", "ranking", "weights"])
def test_another_measurement_is_not_resumed(changed, tmp_path):
    case, path = load("qwen2_5_vl"), tmp_path / "log.jsonl"
    samples = [case.batch([case.prompt(1, 4, 9, seed=1)])]
    told = MEASURED | {"layers": [4]}
    rk.measure_layers(case.model, samples, resume=path, **told)
    others = {"layers": [5], "share": 0.3, "seed": 1, "early": 3, "score": length_of_answer}
    others |= {"ranking": LastQuery(rotary=False)}
    weight = next(case.model.parameters()).data.flatten()
    before = weight[0].item()
    if changed == "weights":
        weight[0] += 1
    try:
        with pytest.raises(ValueError, match=f"resume must hold measurements with {changed} "):
            rk.measure_layers(
                case.model, samples, resume=path, **told | {key: others[key] for key in others if key == changed}
            )
    finally:
        weight[0] = before


# With a score


def length_of_answer(model, sample):
    return 1.0


def test_a_score_is_the_users(case, samples):
    """It is asked without routing first, then under each layer's tokens, and may generate with beams."""
    asked = []

    def score(model, sample):
        inputs, truth = sample
        output = model.generate(**inputs, max_new_tokens=2, do_sample=False, num_beams=2)
        asked.append((truth, rk.routing_of(model) is not None, output.tolist()))
        return len(asked)

    found = rk.measure_layers(
        case.model, [(inputs, number) for number, inputs in enumerate(samples)], score=score, **MEASURED
    )
    assert [(truth, routed) for truth, routed, _ in asked] == [
        (number, routed) for number in range(2) for routed in (False, True, True, True)
    ]
    assert found.quality == {2: (2 + 6) / 2, 4: (3 + 7) / 2, 5: (4 + 8) / 2}
    assert found.unrouted == (1 + 5) / 2
    assert found.measure.endswith("score")
    assert asked[0][2] == case.model.generate(**samples[0], max_new_tokens=2, do_sample=False, num_beams=2).tolist()


def test_under_a_score_the_tokens_of_the_layer_run():
    """Even if they are handed on row by row or as beams, the prompt has the layer's best tokens."""
    case = load("llava")
    inputs = case.batch([case.prompt(1, 4, 9, seed=1)])
    with rk.apply(case.model, rk.Policy([rk.Stage(layer, 1.0) for layer in LAYERS])) as routing, torch.no_grad():
        case.model(**inputs)
    count = int(SHARE * 196)
    expected = [
        stage.scores[0].argsort(descending=True, stable=True)[:count].sort().values for stage in routing.trace.stages
    ]
    selected = []

    def score(model, sample):
        for _ in range(2):
            model.generate(**sample, max_new_tokens=1, num_beams=2)
        if routing := rk.routing_of(model):
            selected.extend(routing.trace.stages[0].selected)
        return torch.tensor([0.5])

    rk.measure_layers(case.model, [inputs], score=score, **MEASURED)
    assert len(selected) == 2 * len(LAYERS)
    first = int((inputs["input_ids"][0] == 500).nonzero()[0])
    for number, found in enumerate(selected):
        assert torch.equal(found - first, expected[number // 2])


@pytest.mark.parametrize(
    ("scored", "message"),
    [
        (-1.0, "score must return a finite number of 0 or more, .*, got -1.0 for sample 0"),
        (float("nan"), "score must return .* got nan for sample 0"),
        ("good", "score must return .* got 'good' for sample 0"),
        (None, "score must return .* got None"),
        ([1.0, 2.0], r"score must return .* got \[1.0, 2.0\]"),
        ([], r"score must return .* got \[\]"),
    ],
)
def test_scores_that_are_refused(scored, message):
    case = load("llava")
    with pytest.raises(ValueError, match=message):
        rk.measure_layers(case.model, [case.batch([case.prompt(1, 4, 9, seed=1)])], score=lambda *_: scored, **MEASURED)


def test_other_prompts_in_a_score_are_refused():
    case = load("qwen2_5_vl")
    other = case.batch([case.prompt(2, 7, 5, seed=2)])

    def score(model, sample):
        model(**other)
        return 1.0

    with pytest.raises(ValueError, match="score must call the model with the prompts of its sample alone"):
        rk.measure_layers(case.model, [case.batch([case.prompt(1, 4, 9, seed=1)])], score=score, **MEASURED)


# The model is left as it was


def test_modes_come_back_after_a_failure():
    case = load("llava")
    samples = [case.batch([case.prompt(1, 4, 9, seed=1)])]
    training = decoder_of(case.model).layers[1]
    training.training = True
    modes = {name: module.training for name, module in case.model.named_modules()}
    seen = []

    def score(model, sample):
        seen.append(any(module.training for module in model.modules()))
        if rk.routing_of(model):
            raise ArithmeticError
        return 1.0

    try:
        with pytest.raises(ArithmeticError):
            rk.measure_layers(case.model, samples, score=score, **MEASURED)
        assert {name: module.training for name, module in case.model.named_modules()} == modes
        assert seen == [False, False]
        assert torch.is_grad_enabled()
    finally:
        training.training = False


def test_a_routed_model_is_refused_and_stays_routed():
    case = load("llava")
    with rk.apply(case.model, "3:0.5") as routing:
        with pytest.raises(ValueError, match="routed"):
            rk.measure_layers(case.model, iter(()), **MEASURED)
        assert rk.routing_of(case.model) is routing


# In one call


def test_calibrate_measures_and_solves(case, samples):
    found, mixed = rk.measure_layers(case.model, samples, **MEASURED), Mixed(LastQuery())
    budget = found.visual_tokens / 3
    policy = rk.calibrate(
        case.model, iter(samples), decisions=2, shape="pyramid", avg_tokens=budget, ranking=mixed, **MEASURED
    )
    assert policy == found.policy(2, "pyramid", avg_tokens=budget, ranking=mixed)
    assert policy.budget.reached <= budget
    with rk.apply(case.model, policy), torch.no_grad():
        case.model(**samples[0])


def no_samples():
    raise AssertionError("nothing may be measured")
    yield


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({}, ValueError, "exactly one of avg_tokens, flops, kv_bytes must be given, got none"),
        ({"avg_tokens": 30, "decisions": 99}, ValueError, "decisions must be from 1 to 3, .*, got 99"),
        ({"avg_tokens": 30, "shape": "cone"}, ValueError, "shape must be one of 'uniform', 'pyramid' or numbers"),
        ({"avg_tokens": 30, "action": "drop"}, ValueError, "action must be one of .* got 'drop'"),
        ({"avg_tokens": 5, "visual_tokens": 196}, ValueError, "avg_tokens must be .* or more, .* got 5"),
        ({"avg_tokens": 30, "share": 1.0}, ValueError, r"share must be in \(0, 1\), got 1.0"),
        ({"avg_tokens": 30, "share": "x"}, TypeError, r"share must be a number in \(0, 1\), got 'x'"),
        ({"avg_tokens": 30, "early": 12}, ValueError, r"early must be a layer that may decide \(0, 1, .*\), got 12"),
        ({"avg_tokens": 30, "early": 2.5}, TypeError, "early must be an integer, got 2.5"),
        (
            {"avg_tokens": 30, "layers": [1, 4]},
            ValueError,
            r"layers must be .* from layer 2 on \(2, .*\), got \[1, 4\]",
        ),
        ({"avg_tokens": 30, "layers": "34"}, TypeError, "layers must be a sequence of integers, got '34'"),
        ({"avg_tokens": 30, "layers": [True]}, TypeError, "layers must be integers, got True"),
        ({"avg_tokens": 30, "ranking": "none"}, ValueError, "ranking must be 'last_query' or an object"),
        ({"avg_tokens": 30, "score": 3}, TypeError, "score must be callable .*, got 3"),
        ({"avg_tokens": 30, "seed": "x"}, TypeError, "seed must be an integer, got 'x'"),
        ({"avg_tokens": 30, "resume": 3}, TypeError, "resume must be a string or a path, got 3"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_arguments_are_refused_before_anything_runs(given, error, message):
    with pytest.raises(error, match=message):
        rk.calibrate(load("llava").model, no_samples(), **MEASURED | {"decisions": 2} | given)


@pytest.mark.parametrize(
    ("sample", "error", "message"),
    [
        (None, ValueError, "samples must hold at least one, got none"),
        (3, TypeError, "samples must hold mappings of the model's arguments, got int in sample 0"),
        (({},), TypeError, "samples must hold mappings of the model's arguments, got tuple in sample 0"),
        ({"labels": 0}, ValueError, "samples must hold prompts alone, got 'labels' in sample 0"),
        ({"past_key_values": 0}, ValueError, "samples must hold prompts alone, got 'past_key_values' in sample 0"),
        ({"input_ids": torch.tensor([[5, 6]])}, ValueError, "prompts with visual tokens, got none in sample 0"),
    ],
)
def test_samples_that_are_refused(sample, error, message):
    with pytest.raises(error, match=message):
        rk.measure_layers(load("llava").model, [] if sample is None else [sample], **MEASURED)


@pytest.mark.parametrize("progress", [None, True, False])
@pytest.mark.parametrize("installed", [True, False])
def test_a_bar_needs_rich(progress, installed, monkeypatch, capsys):
    case = load("llava")
    samples = [case.batch([case.prompt(1, 4, 9, seed=1)])]
    if not installed:
        monkeypatch.setitem(sys.modules, "rich.progress", None)
    told = MEASURED | {"layers": [4], "progress": progress}
    if progress and not installed:
        with pytest.raises(ModuleNotFoundError):
            rk.measure_layers(case.model, samples, **told)
        return
    rk.measure_layers(case.model, samples, **told)
    captured = capsys.readouterr()
    assert not captured.out
    assert progress is not False or not captured.err


def test_layers_without_full_attention_do_not_decide():
    case = load("qwen3_5")
    samples = [case.batch([case.prompt(1, 4, 9, seed=1)])]
    found = rk.measure_layers(case.model, samples, progress=False)
    assert list(found.quality) == [1, 3, 5]
    assert found.early == 1
    assert rk.apply(case.model, rk.Policy([rk.Stage(layer, 0.3) for layer in found.best_layers(2)])).remove() is None
    assert rk.Calibration.from_dict(found.to_dict()) == found
    with pytest.raises(NotImplementedError, match="model must have full attention in all layers"):
        rk.calibrate(case.model, no_samples(), avg_tokens=8)
    with pytest.raises(
        ValueError, match="model must have layers that may decide, got full_attention, linear_attention"
    ):
        rk.measure_layers(case.model, no_samples(), ranking=LastQuery(layer="previous"))
