"""Neither `torch.set_default_dtype` nor `torch.set_default_device` has a part in a routed call."""

import contextlib

import pytest
import torch

import reroute_kernels as rk
from reroute_kernels.cli.environment import check_decision
from reroute_kernels.rankings import AllText, KeyNorm, LastQuery, Mixed, Random, Remembered, TextRaters, Uniform
from tests.models.prompts import batch, cached_lengths, selections
from tests.models.test_reducers import LLAVA, QWEN

STAGES = (rk.Stage(2, 0.4), rk.Stage(5, 0.2))
GREEDY = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
RANKINGS = [
    LastQuery(),
    LastQuery("previous", queries=3, query_reduction="max"),
    AllText(head_reduction="max"),
    TextRaters(),
    KeyNorm(),
    Random(3),
    Uniform(),
    Mixed(Remembered(LastQuery(rotary=False), decay=0.7), uniform=0.3),
]


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def routed(model, inputs, policy):
    """Selections and cached lengths, scores, and the logits of a prompt and of two tokens behind it."""
    with rk.apply(model, policy) as routing:
        answer = model.generate(**inputs, **GREEDY, return_dict_in_generate=True, output_logits=True)
        trace = routing.trace
    rows = range(len(inputs["input_ids"]))
    selected = [selections(trace, row) for row in rows], cached_lengths(answer.past_key_values)
    return selected, [stage.scores[row] for stage in trace.stages for row in rows], torch.stack(answer.logits)


@pytest.mark.everyday(3)
@pytest.mark.parametrize("action", ["reroute", "remove"])
@pytest.mark.parametrize("reduces", [False, True], ids=["no reducer", "reducer"])
def test_every_ranking_under_every_default_dtype(model, family, prompt, action, reduces):
    inputs = batch([prompt(2, 3, 8, seed=2), prompt(1, 5, 6, seed=1)])
    reducer = {"llava": LLAVA, "qwen2_5_vl": QWEN}[family] if reduces else None
    for ranking in RANKINGS:
        policy = rk.Policy(STAGES, action, ranking, reducer=reducer)
        selected, scores, logits = routed(model, inputs, policy)
        for dtype in (torch.float16, torch.bfloat16, torch.float64):
            with default_dtype(dtype):
                got = routed(model, inputs, policy)
            assert got[0] == selected, (ranking, dtype)
            for each, expected in zip(got[1], scores, strict=True):
                assert torch.equal(each.nan_to_num(-1), expected.nan_to_num(-1)), (ranking, dtype)
            torch.testing.assert_close(got[2], logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_environment_is_checked_under_every_default_dtype(dtype):
    with default_dtype(dtype):
        check_decision("cpu")


def test_the_environment_is_checked_under_another_default_device():
    with torch.device("meta"):
        check_decision("cpu")


@pytest.mark.parametrize("family", ["llava"], indirect=True, scope="session")  # transformers' Qwen does not run so
@pytest.mark.parametrize("reducer", [None, LLAVA], ids=["no reducer", "reducer"])
def test_another_default_device(model, inputs, reducer):
    policy = rk.Policy(STAGES, reducer=reducer)
    with rk.apply(model, policy) as routing, torch.no_grad():
        expected = model(**inputs).logits
        selected = selections(routing.trace)
        with torch.device("meta"):
            got = model(**inputs).logits
        assert selections(routing.trace) == selected
    assert torch.equal(got, expected)
