"""The comparison of methods that reduce: equal budgets, the control, and the part of the page."""

import pytest
import torch

import reroute_kernels as rk
from bench.grounding import answers, policies, reducers, reducers_report
from bench.grounding.comparison import budget_of
from bench.grounding.scenes import KINDS
from reroute_kernels.reduced import REDUCED, is_for_videos
from reroute_kernels.reducers import VisionFeatures


def average(run):
    return rk.cost(policies.decoder(), reducers.policy_for(run), 7, policies.VISUAL_TOKENS).average_visual_tokens


def test_both_actions_have_the_same_budget():
    for run in reducers.all_runs():
        budget = int(budget_of(run.keep))
        policy = reducers.policy_for(run)
        assert policy.positions == "original"
        if run.method == reducers.FASTV:
            assert budget - 0.5 <= average(run) < budget + 1
        elif run.method == reducers.SPARSEVLM:
            assert budget - 0.3 < average(run) <= budget
            assert (policy.stage_layers, policy.recycle) == ((2, 4, 8), 0.3 if run.action == reducers.REMOVE else 0)
        elif run.action == reducers.REMOVE:
            assert (average(run), policy.schedule) == (budget, ())
        else:
            assert budget - 0.2 < average(run) <= budget
            assert policy.reducer.survivors(144) == min(144, 2 * budget)
            assert policy.stage_layers == (0, 2, 4, 8, 12)


def test_control_leaves_tokens_at_even_distances():
    image = VisionFeatures(torch.randn(2, 12, 3), (3, 4), lambda: None, lambda: None)
    index, features = reducers.Even(keep=5 / 12).reduce(image)
    assert index.tolist() == [[0, 2, 4, 7, 9]] * 2
    assert torch.equal(features, image.features[:, [0, 2, 4, 7, 9]])


def made_up_results():
    """A record of answers that are right, but for removing, which answers every other scene."""
    items = answers.held_out_items(24)
    right = [item.question.answer for item in items]
    some = [answer if number % 2 else "" for number, answer in enumerate(right)]
    given = {run: some if run.action == reducers.REMOVE else right for run in reducers.all_runs()}
    return {
        "items": {kind: sum(item.question.kind == kind for item in items) for kind in KINDS},
        "budgets": {str(keep): budget_of(keep) for keep in reducers.KEEPS},
        "runs": [reducers.figures(items, given, run) for run in given],
    }


def test_page_tells_which_action_is_better():
    record = made_up_results()
    for run in record["runs"]:
        assert run["box"]["score"][0] == (
            1 if run["action"] == "reroute" else 6 / 14
        )  # of 14 boxes 6 are at odd places
        assert ("less fastv" in run["box"]) == (run["method"] != "fastv")
    page = "\n".join(reducers_report.reducers_section(record))
    assert "Of 25 pairs of a method and a budget, rerouting finds more boxes in 25, fewer in 0, and 0 are" in page
    assert "less `fastv`, both remove: 0/0/25" in page
    assert page.count("| vispruner |") == 4
    assert [row[:2] for row in reducers_report.boxes_by_method(record)][:2] == [
        ["visionzip", "remove"],
        ["visionzip", "reroute"],
    ]
    assert "They wait to be run." in reducers_report.reducers_section(None)


@pytest.fixture(scope="module")
def answerer():
    return answers.Answerer()


@pytest.mark.parametrize("method", REDUCED)
def test_every_method_runs_by_name(answerer, method):
    """A batch is answered as its samples alone, and as many tokens run as are counted."""
    text = f"{method}/{'20%' if is_for_videos(method) else 128}"
    boxes = [item for item in answers.held_out_items(24) if item.question.kind == "box"]
    items = [item for item in boxes if len(item.question.text.split()) == len(boxes[0].question.text.split())][:2]
    with rk.apply(answerer.model, text) as routing:
        together = answerer.answer(answerer.inputs(items))
        trace = routing.trace
        assert together == [answerer.answer(answerer.inputs([item]))[0] for item in items]
    counted = [stage.visual_tokens for stage in rk.cost(answerer.model, text, 7, 144).stages]
    for row in range(len(items)):
        ran = [len(stage.selected[row]) for stage in (trace.reduction, *trace.stages)]
        if "vidcom2" in method:
            assert ran[0] == 144  # it leaves images whole
        else:  # FlashVID may exceed its budget by one token a frame
            assert 0 <= ran[0] - counted[0] <= ("flashvid" in method)
        assert ran[1:] == counted[1:]
