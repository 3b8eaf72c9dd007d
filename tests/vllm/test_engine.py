"""Routing inside vLLM answers as the adapter for transformers does, in float32 on a CPU."""

from __future__ import annotations

import dataclasses
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from functools import cache

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm has an environment with it")

from vllm import LLM, SamplingParams
from vllm.exceptions import VLLMValidationError

from reroute_kernels.vllm import Settings, worker
from reroute_kernels.vllm.plan import stage_layout
from tests.vllm.engines import answers, arguments, preemptions, scheduler
from tests.vllm.requests import SHAPES, requests

TOLERANCE = 1e-4


def groups(own: bool) -> str:
    return "own groups" if own else "one group"


EITHER = pytest.mark.parametrize(
    ("family", "own_groups"),
    [("llava", False), ("qwen2_5_vl", True)],
    indirect=["family"],
    ids=["llava-one group", "qwen2_5_vl-own groups"],
)
"""Tests that take a family with each kind of groups, for their time."""

EVEN = {"schedule": "2:0.4,5:0.2,8:0.1"}
SCHEDULES = {
    "reroute": EVEN,
    "remove": EVEN | {"action": "remove"},
    "uneven": {"schedule": "1:0.6,2:0.05,9:0.3"},
    "first layer": {"schedule": "0:0.3,4:0.1"},
    "three queries, most of a head": {**EVEN, "queries": 3, "head_reduction": "max"},
    "memory without position": {**EVEN, "decay": 0.8, "rotary": False},
    "memory, remove, mixed": {**EVEN, "action": "remove", "decay": 0.8, "uniform": 0.3},
}

# Three requests that run at once, and blocks that hold their prompts, but not their generated tokens as well.
CROWDED = {
    "llava": (("image first", "image in the middle", "image last"), 256, {False: 20, True: 74}),
    "qwen2_5_vl": (("image first", "image in the middle", "image before long text"), 224, {False: 12, True: 68}),
}


@pytest.fixture(scope="module")
def expected(oracle, asked):
    """The oracle's answers to every request under a policy, computed once."""

    @cache
    def of(name):
        policy = None if name is None else Settings.of(SCHEDULES[name]).policy
        return lambda prompts: [
            oracle.answer(request, prompt, policy) for request, prompt in zip(asked, prompts, strict=True)
        ]

    return of


def same(got, expected, names=tuple(SHAPES)) -> None:
    """Answers equal those of the oracle: tokens and selections exactly, log-probabilities closely."""
    for name, mine, other in zip(names, got, expected, strict=True):
        assert mine.selected == other.selected, name
        assert mine.tokens == other.tokens, name
        assert mine.logprobs == pytest.approx(other.logprobs, abs=TOLERANCE), name


def check(got, expected, name) -> None:
    wanted = expected(name)([answer.prompt for answer in got])
    same(got, wanted)
    if name is not None:
        routed = [answer.selected for answer in wanted if answer.selected]
        assert len(routed) == len(SHAPES) - 2, "a prompt with an image was not routed"


OUT = range(0, len(SHAPES), 2)
"""Places of requests that opt out."""


def counted() -> dict[str, float]:
    """The library's counters on vLLM's page of metrics, for the model `counted`."""
    from prometheus_client import REGISTRY

    names = ("prompts", "prompts_opted_out", "visual_tokens", "visual_tokens_run", "kv_tokens_saved")
    values = {name: REGISTRY.get_sample_value(f"reroute:{name}_total", {"model_name": "counted"}) for name in names}
    return {name: value or 0.0 for name, value in values.items()}


def mean_run(llm, answer) -> float:
    """Visual tokens of a prompt that ran under `EVEN`, mean over the layers."""
    config = llm.llm_engine.vllm_config.model_config.hf_config
    layers = config.get_text_config().num_hidden_layers
    ran = [token == config.image_token_id for token in answer.prompt]
    last = len(ran) - 1  # of the prompt: it runs in every stage
    counts = [len({*selected, *([last] if ran[last] else [])}) for selected in answer.selected]
    return (2 * sum(ran) + 3 * counts[0] + 3 * counts[1] + (layers - 8) * counts[2]) / layers


def check_out(got, expected) -> None:
    """Answers to requests of which every other one opted out."""
    prompts = [answer.prompt for answer in got]
    unrouted, routed = (expected(name)(prompts) for name in (None, "reroute"))
    same(got, [(unrouted if place in OUT else routed)[place] for place in range(len(SHAPES))])
    assert any(answer.selected for answer in got)
    assert any(mine.tokens != other.tokens for mine, other in zip(unrouted, routed, strict=True))


def test_unrouted_parity(engine, asked, expected):
    with engine() as llm:
        check(answers(llm, asked), expected, None)


@pytest.mark.parametrize(
    ("name", "own_groups"),
    [
        ("reroute", False),
        ("reroute", True),
        ("remove", False),
        ("uneven", True),
        ("first layer", False),
        ("first layer", True),
        ("three queries, most of a head", False),
        ("memory without position", True),
        ("memory, remove, mixed", False),
    ],
    ids=lambda value: value if isinstance(value, str) else groups(value),
)
def test_batched_and_alone(engine, asked, expected, name, own_groups):
    with engine(SCHEDULES[name] | {"own_groups": own_groups}) as llm:
        check(answers(llm, asked), expected, name)
        if name in ("reroute", "remove"):
            check([answers(llm, [request])[0] for request in asked], expected, name)
        pool = scheduler(llm).kv_cache_manager.block_pool
        assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1, "blocks were not given back"


@EITHER
def test_requests_that_opt_out(engine, asked, expected, own_groups):
    with engine(EVEN | {"own_groups": own_groups}, served_model_name="counted") as llm:
        before = counted()
        got = answers(llm, asked, out=OUT)
        added = {name: value - before[name] for name, value in counted().items()}
        with pytest.raises(VLLMValidationError, match="reroute must be 'on' or 'off' among vllm_xargs, got 'maybe'"):
            llm.generate(asked[0].as_prompt(), SamplingParams(extra_args={"reroute": "maybe"}), use_tqdm=False)
        assert counted() == {name: before[name] + value for name, value in added.items()}
    check_out(got, expected)
    assert added["prompts"] == sum(bool(answer.selected) for answer in got)
    assert added["prompts"] + added["prompts_opted_out"] == len(SHAPES) - 2
    ran = sum(mean_run(llm, answer) for answer in got if answer.selected)
    assert added["visual_tokens_run"] == pytest.approx(ran)
    waits = added["visual_tokens"] - added["visual_tokens_run"]
    assert added["kv_tokens_saved"] == pytest.approx(waits if own_groups else 0)


@pytest.mark.parametrize("family", ["qwen3_vl"], indirect=True)
def test_features_between_layers(engine, asked, expected):
    """Qwen3-VL adds visual features after its first three layers, and a decision comes before."""
    with engine(SCHEDULES["first layer"] | {"own_groups": True}) as llm:
        check(answers(llm, asked), expected, "first layer")


@pytest.mark.parametrize("family", ["llava"], indirect=True)
def test_compiled(engine, asked, expected):
    with engine(EVEN, enforce_eager=False) as llm:
        check(answers(llm, asked), expected, "reroute")


def guess(family, folder, reroute):
    """Answers with n-grams guessed, and how many tokens of a request a step had behind its prompt."""
    speculative = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2, "prompt_lookup_min": 1}
    widths, shares_of = set(), worker.RoutedRunner._shares

    def recorded(runner):
        shares = shares_of(runner)
        widths.update(share.scheduled for share in shares if not share.starts)
        return shares

    worker.RoutedRunner._shares = recorded
    llm = LLM(str(folder), **arguments(family, reroute), speculative_config=speculative)
    return answers(llm, requests(family)), widths


@EITHER
def test_guesses_of_ngrams(family, folder, expected, own_groups):
    """Several tokens a step behind a routed prompt, some of them taken back.

    In a process of its own: n-grams bring numba, after which another engine of a process has other image features.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        got, widths = pool.submit(guess, family, folder, EVEN | {"own_groups": own_groups}).result()
    check(got, expected, "reroute")
    assert max(widths) > 1, "nothing was guessed"


@pytest.mark.parametrize("own_groups", [False, True], ids=groups)
def test_preemption(engine, oracle, asked, own_groups):
    """Requests that are thrown out of the cache while they decode start anew, and are ranked as at first."""
    steps = 48
    names, length, blocks = CROWDED[oracle.family]
    crowd = [asked[list(SHAPES).index(name)] for name in names]
    limits = {"max_model_len": length, "num_gpu_blocks_override": blocks[own_groups]}
    with engine(EVEN | {"own_groups": own_groups}, **limits) as llm:
        preempted = preemptions(llm)
        got = answers(llm, crowd, steps)
    assert preempted, "nothing was preempted"
    policy = Settings.of(EVEN).policy
    same(got, [oracle.answer(*each, policy, steps) for each in zip(crowd, [a.prompt for a in got], strict=True)], names)


def test_a_length_that_is_off_by_one_shows(engine, asked, expected, monkeypatch):
    """The tests above would see it."""

    def off_by_one(shares, stage):
        layout = stage_layout(shares, stage)
        decodes = [not share.starts and share.is_routed for share in shares]
        layout.seq_lens[decodes] += 1
        return layout

    monkeypatch.setattr(worker, "stage_layout", off_by_one)
    with engine(EVEN) as llm, pytest.raises(AssertionError):
        check(answers(llm, asked), expected, "reroute")


def test_a_part_of_a_prompt_is_refused(engine, asked, monkeypatch):
    """As if chunked prefill were on nevertheless."""
    monkeypatch.setattr(worker.RoutedRunner, "_shares", _halved(worker.RoutedRunner._shares))
    with engine(EVEN) as llm, pytest.raises(Exception, match="prefilled in one step"):
        answers(llm, [request for request in asked if request.images])


def _halved(shares_of):
    def shares(runner):
        return [
            dataclasses.replace(share, scheduled=share.prompt // 2) if share.starts else share
            for share in shares_of(runner)
        ]

    return shares
