"""Work of the host for a decision on a GPU, counted against a stand-in for the driver library."""

import shutil

import pytest

from bench.speed.host import measure_in_new_process

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="Triton's launcher needs a C compiler")


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    return measure_in_new_process(tmp_path_factory.mktemp("host"))


def test_no_prompt_waits_for_the_compiler_after_a_warm_up(measured):
    prompts = measured["prompts"]
    assert prompts["count"] == 120
    assert prompts["kernels"] == prompts["stalls"] == 0
    assert 0 < prompts["kernels_of_warm_up"] <= 16


def test_launches(measured):
    assert {name: row["launches"] for name, row in measured["decision"].items()} == {
        "rank_tokens": 2,
        "select_tokens": 1,
        "gather_tokens": 1,
        "scatter_tokens_": 1,
        "scatter_norm_tokens_": 1,
        "route_tokens": 4,
        "decision": 5,
    }


def test_a_decision_calls_few_functions(measured):
    # 566 when each launch bound its arguments anew and each call went through the dispatcher.
    assert measured["decision"]["decision"]["python_calls"] <= 240


def test_launch_hooks_see_every_launch(measured):
    assert measured["hook"] == {"launches": 2, "seen": 2}


def test_threads_share_a_plan(measured):
    assert measured["threads"] == 32 * 3  # without tensors to compact
