"""Routing inside vLLM answers as the adapter for transformers does, in float32 on a CPU."""

from __future__ import annotations

from functools import cache

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm has an environment with it")

from reroute_kernels.vllm import Settings, worker
from reroute_kernels.vllm.plan import stage_layout
from tests.vllm.engines import answers, scheduler
from tests.vllm.requests import SHAPES

TOLERANCE = 1e-4
EVEN = {"schedule": "2:0.4,5:0.2,8:0.1"}
SCHEDULES = {
    "reroute": EVEN,
    "remove": EVEN | {"action": "remove"},
    "uneven": {"schedule": "1:0.6,2:0.05,9:0.3"},
    "first layer": {"schedule": "0:0.3,4:0.1"},
    "three queries, most of a head": {**EVEN, "queries": 3, "head_reduction": "max"},
}


@pytest.fixture(scope="module")
def expected(oracle, asked):
    """What the oracle answers to every request under a policy, once."""

    @cache
    def of(name):
        policy = None if name is None else Settings.of(SCHEDULES[name]).policy
        return lambda prompts: [
            oracle.answer(request, prompt, policy) for request, prompt in zip(asked, prompts, strict=True)
        ]

    return of


def same(got, expected) -> None:
    """Answers equal those of the oracle: tokens and selections exactly, log-probabilities closely."""
    assert len(got) == len(expected) == len(SHAPES)
    for name, mine, other in zip(SHAPES, got, expected, strict=True):
        assert mine.selected == other.selected, name
        assert mine.tokens == other.tokens, name
        assert mine.logprobs == pytest.approx(other.logprobs, abs=TOLERANCE), name


def check(got, expected, name) -> None:
    wanted = expected(name)([answer.prompt for answer in got])
    same(got, wanted)
    if name is not None:
        routed = [answer.selected for answer in wanted if answer.selected]
        assert len(routed) == len(SHAPES) - 2, "a prompt with an image was not routed"


def test_unrouted_parity(engine, asked, expected):
    with engine() as llm:
        check(answers(llm, asked), expected, None)


@pytest.mark.parametrize("own_groups", [False, True], ids=["one group", "own groups"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_batched_and_alone(engine, asked, expected, name, own_groups):
    with engine(SCHEDULES[name] | {"own_groups": own_groups}) as llm:
        check(answers(llm, asked), expected, name)
        alone = [answers(llm, [request])[0] for request in asked]
        check(alone, expected, name)
        pool = scheduler(llm).kv_cache_manager.block_pool
        assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1, "blocks were not given back"
