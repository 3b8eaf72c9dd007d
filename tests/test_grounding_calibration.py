"""The comparison of calibrated decision layers on the grounding model, and its part of the page."""

import json
import re
from functools import partial
from itertools import combinations, count

import pytest

import reroute_kernels as rk
from bench.grounding import calibration, calibration_report, policies
from bench.grounding.answers import batches, held_out_items
from bench.grounding.calibration import AGREEMENT, CHOICES, GRID, LABELS, PUBLISHED, SEARCH, Run
from bench.grounding.policies import KEEPS, decoder
from reroute_kernels.calibration import LayerQuality


@pytest.fixture(scope="module")
def runs():
    return calibration.searched_runs()


def test_the_search_tries_all_that_a_budget_admits(runs):
    for keep in KEEPS:
        admitted = []
        for layers in combinations(GRID, calibration.DECISIONS):
            least = rk.Policy([rk.Stage(layer, 1e-9) for layer in layers])
            if rk.cost(decoder(), least, 7, 144).average_visual_tokens <= calibration.budget_of(keep):
                admitted.append(layers)
        assert [run.layers for run in runs if run.keep == keep] == admitted
        assert calibration.PUBLISHED_LAYERS in admitted
    assert len(runs) == 125
    for run in (runs[0], runs[-1]):
        assert run.policy.budget.reached <= calibration.budget_of(run.keep)


def test_published_layers_are_those_of_the_comparison():
    """At the same counts as in bench/grounding/policies.py, and one more where the budget has room for it."""
    for keep in KEEPS:
        paper = policies.policy_of(policies.Way("fastv", "reroute", keep))
        policy = Run(calibration.PUBLISHED_LAYERS, keep).policy
        assert [stage.layer for stage in policy.schedule] == [stage.layer for stage in paper.schedule]
        assert policy.selected_counts(144) == paper.selected_counts(144)


def made_up(best):
    """A calibration with one layer that stands out."""
    qualities = [LayerQuality(layer, 1.0 if layer == best else 0.5 + layer / 100, 0.0, 1.0) for layer in range(2, 16)]
    return rk.Calibration(
        "tiny", 16, qualities, early=2, share=0.2, decoder=decoder(), visual_tokens=144, text_tokens=7
    )


def test_choices_at_every_budget(runs):
    searched = {run: (run.layers == (2, 4, 6, 10)) + number / 1e4 for number, run in enumerate(runs)}
    found = calibration.chosen_layers({AGREEMENT: made_up(9), LABELS: made_up(5)}, searched)
    assert set(found) == {(choice, keep) for choice in CHOICES for keep in KEEPS}
    for keep in KEEPS:
        assert found[PUBLISHED, keep] == (2, 4, 8, 12)
        assert found[SEARCH, keep] == (2, 4, 6, 10)
        assert 9 in found[AGREEMENT, keep]
        assert 5 in found[LABELS, keep]
    for choice, each in ((AGREEMENT, made_up(9)), (LABELS, made_up(5))):
        assert found[choice, 0.5] == each.best_layers(4)
    exact = {run: made_up(9).objective(run.layers) for run in searched}
    assert list(calibration.correlations(made_up(9), exact).values()) == [pytest.approx(1.0)] * len(KEEPS)
    assert list(calibration.correlations(made_up(9), dict.fromkeys(runs, 0.5)).values()) == [None] * len(KEEPS)


@pytest.fixture(scope="module")
def measured():
    """The calibrations of few scenes and two layers, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rk, "measure_layers", partial(rk.measure_layers, layers=[2, 9]))
        return {choice: calibration.calibration(4, choice == LABELS) for choice in (AGREEMENT, LABELS)}


def test_labels_are_the_share_of_right_answers(measured):
    """As counted by hand for one layer."""
    items = held_out_items(4, seed=calibration.CALIBRATION_SEED)
    answerer, right = calibration._answerer(), []
    assert list(measured[LABELS].quality) == [2, 9]
    for places in batches(items):
        inputs = answerer.inputs([items[place] for place in places])
        # One decision at the early layer keeps what that layer ranks highest.
        with rk.apply(answerer.model, rk.Policy([rk.Stage(2, 0.2)], "remove")):
            answers = answerer.answer(inputs)
        right += calibration.rights([items[place] for place in places], answers)
    assert measured[LABELS].quality[2] == sum(right) / 4
    assert measured[LABELS].model == measured[AGREEMENT].model == "tiny_grounding"
    assert measured[AGREEMENT].measure == "agreement"
    assert (measured[LABELS].measure, measured[LABELS].samples) == ("right answers", 4)


def test_answers_come_back_in_the_order_of_the_scenes():
    run = Run(calibration.PUBLISHED_LAYERS, 0.5)
    answers = calibration.answers_under(run, 4, calibration.SEARCH_SEED)
    items = held_out_items(4, seed=calibration.SEARCH_SEED)
    answerer = calibration._answerer()
    with rk.apply(answerer.model, run.policy):
        assert answers == [answerer.answer(answerer.inputs([item]))[0] for item in items]


def test_the_section_tells_every_figure(measured):
    """Each figure of made-up results stands in the text or a table."""
    numbers = (0.2 + number / 1000 for number in count())

    def value():
        mean = next(numbers)
        return [mean, mean - 0.05, mean + 0.05]

    layers = [2, 4, 8, 12]
    kinds = ("all", *calibration.KINDS)
    results = {
        "items": dict.fromkeys(calibration.KINDS, 1000),
        "decisions": 4,
        "grid": list(GRID),
        "budgets": {str(keep): calibration.budget_of(keep) for keep in KEEPS},
        "calibration": {"seed": 4, "scenes": 200},
        "calibrations": {choice: each.to_dict() for choice, each in measured.items()},
        "correlations": {choice: {str(keep): 0.25 if keep > 0.1 else None for keep in KEEPS} for choice in measured},
        "search": {
            "seed": 5,
            "scenes": 400,
            "runs": [{"keep": keep, "layers": layers, "right": next(numbers)} for keep in KEEPS],
        },
        "runs": [
            {"choice": choice, "keep": keep, "layers": layers}
            | {kind: {"score": value(), "less published": value()} for kind in kinds}
            for choice in CHOICES
            for keep in KEEPS
        ],
    }
    lines = calibration_report.calibration_section(json.loads(json.dumps(results)))
    text = "\n".join(lines)
    assert lines[0] == "## Which layers decide"
    assert "calibrated without labels, 5 better, 0 worse, 0 undecided" in text
    assert "5,000 held-out scenes" in text
    for run in results["runs"]:
        assert f"{100 * run['all']['score'][0]:.1f} [" in text
        if run["choice"] != PUBLISHED:
            for kind in kinds:
                assert f"{100 * run[kind]['less published'][0]:+.1f} [" in text
    for each in measured.values():
        assert all(f"{quality.mean:.3f} [" in text for quality in each.qualities)
    columns = {len(re.findall(r"(?<!\\)\|", line)) for line in lines if line.startswith("| layers | 81.0")}
    assert columns == {len(KEEPS) + 2}
