"""Engines on two cores, and their outputs."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from reroute_kernels.vllm import Settings, engine_arguments
from tests.vllm.requests import STEPS, Answer, Request

ARCHITECTURES = {
    "llava": "LlavaForConditionalGeneration",
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
    "qwen3_vl_moe": "Qwen3VLMoeForConditionalGeneration",
}
LENGTH = 512


def arguments(family: str, reroute: dict | None = None) -> dict[str, object]:
    """Arguments of `vllm.LLM`; three requests run at a time."""
    routed = {"max_model_len": LENGTH, "max_num_batched_tokens": LENGTH}
    routed |= {"enable_chunked_prefill": False, "enable_prefix_caching": False}
    if reroute is not None:
        settings = Settings.of({"trace": True} | reroute)
        routed = engine_arguments(ARCHITECTURES[family], settings, LENGTH)
    return routed | {
        "dtype": "float32",
        "enforce_eager": True,
        "block_size": 32,
        "max_num_seqs": 3,
        "max_num_batched_tokens": 3 * LENGTH,
        "limit_mm_per_prompt": {"image": 2, **({} if family == "llava" else {"video": 0})},
        "kv_cache_memory_bytes": 48 << 20,
        "seed": 0,
    }


@contextmanager
def engine(family: str, folder: Path, reroute: dict | None = None, **options) -> Iterator:
    """An engine under settings of `additional_config["reroute"]`, or unrouted; gone when the block ends."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.triton_utils import dispatcher

    # A second engine in a process looks through all modules, and fails over one of numba's, which n-grams bring.
    dispatcher.vars = lambda value: each if isinstance(each := vars(value), dict) else {}
    llm = LLM(str(folder), **arguments(family, reroute) | options)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def answers(llm, requests: Sequence[Request], steps: int = STEPS, out: Sequence[int] = ()) -> list[Answer]:
    """Greedy answers to requests that are all there at once; those at the places `out` ask not to be routed."""
    from vllm import SamplingParams

    sampling = [
        SamplingParams(
            temperature=0,
            max_tokens=steps,
            ignore_eos=True,
            logprobs=0,
            extra_args={"reroute": "off" if place in out else "on"},
        )
        for place in range(len(requests))
    ]
    outputs = llm.generate([request.as_prompt() for request in requests], sampling, use_tqdm=False)
    traces = {}
    if llm.llm_engine.vllm_config.additional_config.get("reroute"):
        # By the number that LLM gave the request, with vLLM's suffix.
        traces = {name.split("-")[0]: trace for name, trace in llm.collective_rpc("routing_traces")[0].items()}
    made = []
    for output in outputs:
        (completion,) = output.outputs
        logprobs = [each[token].logprob for each, token in zip(completion.logprobs, completion.token_ids, strict=True)]
        selected = traces.get(output.request_id)
        made.append(Answer(output.prompt_token_ids, list(completion.token_ids), logprobs, selected))
    return made


def scheduler(llm):
    """The scheduler of an engine in this process."""
    return llm.llm_engine.engine_core.engine_core.scheduler


def model_runner(llm):
    """The model runner of an engine in this process."""
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner


def preemptions(llm) -> list[str]:
    """The requests that an engine throws out of its cache from now on, in a list that grows."""
    its, preempted = scheduler(llm), []
    preempt = its._preempt_request

    def noted(request, *args, **kwargs):
        preempted.append(request.request_id)
        return preempt(request, *args, **kwargs)

    its._preempt_request = noted
    return preempted
