"""Heads split over two processes by vLLM: both select what one process selects."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm has an environment with it")

from reroute_kernels.vllm import Settings
from tests.vllm.test_engine import SCHEDULES, TOLERANCE

UNPACKED = "tests.vllm.unpacked_worker.UnpackedWorker"


def run(family: str, folder: str, output: str, schedule: str, extension: str) -> None:
    """The answers of two ranks, as JSON; with an extension of the workers also what their decisions projected."""
    from vllm import LLM

    from tests.vllm.engines import answers, arguments
    from tests.vllm.requests import requests

    options = {"tensor_parallel_size": 2, "kv_cache_memory_bytes": 16 << 20, "worker_extension_cls": extension}
    llm = LLM(folder, **arguments(family, SCHEDULES[schedule]) | options)
    asked = requests(family)
    ranks = []
    collect = llm.collective_rpc
    llm.collective_rpc = lambda name: ranks.append(collect(name)) or ranks[-1]
    made = answers(llm, asked)
    ((first, second),) = ranks
    written = [[answer.prompt, answer.tokens, answer.logprobs, answer.selected] for answer in made]
    decisions = collect("decisions") if extension else None
    result = {"answers": written, "first": first, "second": second, "decisions": decisions}
    Path(output).write_text(json.dumps(result))


@pytest.mark.parametrize(
    ("schedule", "extension"),
    [("reroute", ""), ("reroute", UNPACKED), ("memory, remove, mixed", "")],
    ids=["packed", "unpacked", "memory"],
)
@pytest.mark.parametrize("family", ["qwen2_5_vl"], indirect=True)
def test_equals_one_process(family, folder, oracle, asked, tmp_path, schedule, extension):
    output = tmp_path / "answers.json"
    command = [sys.executable, "-m", __name__, family, str(folder), str(output), schedule, extension]
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_WORKER_MULTIPROC_METHOD": "spawn"}
    environment |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    result = json.loads(output.read_text())
    assert result["first"], "no prompt was routed"
    assert result["first"] == result["second"]
    for made in result["decisions"] or ():
        assert made, "a rank made no decision"
        assert all(each["flops"] == each["needed"] and not each["whole"] for each in made)
    policy = Settings.of(SCHEDULES[schedule]).policy
    for request, (prompt, tokens, logprobs, selected) in zip(asked, result["answers"], strict=True):
        expected = oracle.answer(request, prompt, policy)
        assert selected == expected.selected
        assert tokens == expected.tokens
        assert logprobs == pytest.approx(expected.logprobs, abs=TOLERANCE)


if __name__ == "__main__":
    run(*sys.argv[1:])
