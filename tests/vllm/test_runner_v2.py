"""Under vLLM's model runner V2, on a CPU, routing answers as the adapter for transformers does."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm has an environment with it")

from reroute_kernels.vllm import Settings
from tests.vllm.interpreted import start
from tests.vllm.requests import SHAPES
from tests.vllm.runner_v2 import halved, not_added, off_by_one, run
from tests.vllm.test_engine import (
    CROWDED,
    EITHER,
    EVEN,
    OUT,
    SCHEDULES,
    check,
    check_out,
    expected,  # noqa: F401
    groups,
    same,
)

RUNNER = "vllm.v1.worker.cpu.model_runner"


def process() -> ProcessPoolExecutor:
    """A process in which vLLM takes the runner V2."""
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), start)


@pytest.fixture(scope="module")
def under_v2():
    """`run`, in one process for all engines of the module."""
    with process() as pool:
        yield lambda *args, **kwargs: pool.submit(run, *args, **kwargs).result()


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl"], indirect=True)
def test_unrouted_parity(under_v2, family, folder, expected):  # noqa: F811
    made = under_v2(family, folder, None)
    assert made.runner == RUNNER
    assert not made.steps
    check(made.answers, expected, None)


@pytest.mark.parametrize(
    ("family", "name", "own_groups"),
    [
        ("llava", "reroute", False),
        ("qwen2_5_vl", "reroute", True),
        ("llava", "remove", True),
        ("qwen2_5_vl", "first layer", False),
        ("qwen2_5_vl", "memory without position", True),
        ("qwen3_vl", "reroute", True),
        ("qwen3_vl", "first layer", False),
        ("qwen3_vl", "memory, remove, mixed", False),
        ("qwen3_vl_moe", "reroute", False),
    ],
    indirect=["family"],
    ids=lambda value: value if isinstance(value, str) else groups(value),
)
def test_batched_and_alone(under_v2, family, folder, expected, name, own_groups):  # noqa: F811
    made = under_v2(family, folder, SCHEDULES[name] | {"own_groups": own_groups}, alone=name == "reroute")
    assert made.runner == RUNNER
    check(made.answers, expected, name)
    if made.alone:
        check(made.alone, expected, name)
    assert {starts for starts, *_ in made.steps} == {True, False}, "steps of both kinds"
    assert len({addresses for _, addresses, _ in made.steps}) == 1, "buffers moved, which graphs hold"
    assert made.leaked == 0


@pytest.mark.parametrize("family", ["qwen3_vl"], indirect=True)
def test_requests_that_opt_out(under_v2, family, folder, expected):  # noqa: F811
    made = under_v2(family, folder, EVEN | {"own_groups": True}, out=OUT)
    check_out(made.answers, expected)
    assert made.leaked == 0


@pytest.mark.parametrize("family", ["llava"], indirect=True)
def test_compiled(under_v2, family, folder, expected):  # noqa: F811
    made = under_v2(family, folder, EVEN, enforce_eager=False)
    check(made.answers, expected, "reroute")


@EITHER
def test_guesses_of_ngrams(family, folder, expected, own_groups):  # noqa: F811
    """In a process of its own, as under the older runner."""
    speculative = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2, "prompt_lookup_min": 1}
    with process() as pool:
        made = pool.submit(
            run, family, folder, EVEN | {"own_groups": own_groups}, speculative_config=speculative
        ).result()
    check(made.answers, expected, "reroute")
    assert max(width for *_, width in made.steps) > 1, "nothing was guessed"


@EITHER
def test_preemption(under_v2, family, folder, oracle, asked, own_groups):
    names, length, blocks = CROWDED[family]
    limits = {"max_model_len": length, "num_gpu_blocks_override": blocks[own_groups]}
    made = under_v2(family, folder, EVEN | {"own_groups": own_groups}, names, 48, **limits)
    assert made.preempted, "nothing was preempted"
    policy, wanted = Settings.of(EVEN).policy, []
    for name, answer in zip((name for name in SHAPES if name in names), made.answers, strict=True):
        request = asked[list(SHAPES).index(name)]
        wanted.append(oracle.answer(request, answer.prompt, policy, 48))
    same(made.answers, wanted, names)
    assert made.leaked == 0


@pytest.mark.parametrize("family", ["qwen3_vl"], indirect=True)
def test_features_that_are_not_added_to_deferred_tokens_show(under_v2, family, folder, expected):  # noqa: F811
    """Qwen3-VL adds visual features after its first three layers, and a decision may come before."""
    made = under_v2(family, folder, SCHEDULES["first layer"], change=not_added)
    with pytest.raises(AssertionError):
        check(made.answers, expected, "first layer")


@pytest.mark.parametrize("family", ["llava"], indirect=True)
def test_a_length_that_is_off_by_one_shows(under_v2, family, folder, expected):  # noqa: F811
    made = under_v2(family, folder, EVEN, change=off_by_one)
    with pytest.raises(AssertionError):
        check(made.answers, expected, "reroute")


@pytest.mark.parametrize("family", ["llava"], indirect=True)
def test_a_part_of_a_prompt_is_refused(family, folder):
    """The engine ends with it, and so does the process of the test."""
    with process() as pool, pytest.raises(RuntimeError, match="prefilled in one step"):
        pool.submit(run, family, folder, EVEN, ["image first"], change=halved).result()
