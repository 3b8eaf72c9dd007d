"""`vllm serve`, started for real on this machine, answers as the engine does without a server."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm has an environment with it")

from openai import BadRequestError, OpenAI
from PIL import Image

from bench.grounding.answers import held_out_item
from tests.vllm.checkpoints import LLAVA
from tests.vllm.engines import LENGTH

REROUTE = {"schedule": "2:0.1,8:0.05", "own_groups": True}
REQUESTS, STEPS = 8, 12
COMMON = ["--dtype", "float32", "--enforce-eager", "--block-size", "32", "--max-num-seqs", "3"]
COMMON += ["--kv-cache-memory-bytes", str(48 << 20)]
UNROUTED = ["--max-model-len", str(LENGTH), "--max-num-batched-tokens", str(LENGTH)]
UNROUTED += ["--no-enable-chunked-prefill", "--no-enable-prefix-caching"]
LIMIT_S = 400


@contextmanager
def serving(arguments: list[str], log: Path):
    """The address of a server on this machine, once it is ready; it is gone when the block ends."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).with_name("vllm")), "serve", str(LLAVA), "--host", "127.0.0.1"]
    command += ["--port", str(port), "--served-model-name", "tiny", *COMMON, *arguments]
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment |= {"VLLM_LOGGING_LEVEL": "INFO"}
    with log.open("w") as output:
        server = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
    try:
        end = time.monotonic() + LIMIT_S
        while not _is_ready(port):
            assert server.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() < end, log.read_text()[-4000:]
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)


def _is_ready(port: int) -> bool:
    try:
        return urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).status == 200
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def conversation(number: int) -> list[dict]:
    """A held-out scene and a question about it."""
    item = held_out_item(number)
    picture = io.BytesIO()
    Image.fromarray(item.scene.image).save(picture, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(picture.getvalue()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": item.question.text}]
    return [{"role": "user", "content": content}]


def over_http(address: str) -> list[str]:
    """Answers to eight requests at once."""
    client = OpenAI(base_url=address, api_key="none")

    def ask(number):
        answer = client.chat.completions.create(
            model="tiny",
            messages=conversation(number),
            temperature=0,
            max_tokens=STEPS,
            extra_body={"ignore_eos": True, "skip_special_tokens": False},
        )
        return answer.choices[0].message.content

    with ThreadPoolExecutor(REQUESTS) as pool:
        return list(pool.map(ask, range(REQUESTS)))


def check_metrics(address: str) -> None:
    """The page of metrics tells of the eight requests, and of one that opts out; a wrong option is refused."""

    def ask(option):
        client, options = OpenAI(base_url=address, api_key="none"), {"vllm_xargs": {"reroute": option}}
        return client.chat.completions.create(
            model="tiny", messages=conversation(0), temperature=0, max_tokens=1, extra_body=options
        )

    with pytest.raises(BadRequestError, match="reroute must be 'on' or 'off' among vllm_xargs, got 'maybe'"):
        ask("maybe")
    ask("off")
    page = urllib.request.urlopen(address.removesuffix("/v1") + "/metrics", timeout=10).read().decode()
    assert f'reroute:prompts_total{{model_name="tiny"}} {REQUESTS}.0' in page
    assert 'reroute:prompts_opted_out_total{model_name="tiny"} 1.0' in page
    assert f'reroute:visual_tokens_total{{model_name="tiny"}} {144 * REQUESTS}.0' in page


def offline(llm) -> list[str]:
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=STEPS, ignore_eos=True, skip_special_tokens=False)
    outputs = llm.chat([conversation(number) for number in range(REQUESTS)], sampling, use_tqdm=False)
    return [output.outputs[0].text for output in outputs]


@pytest.mark.parametrize("family", ["llava"], indirect=True)
def test_eight_requests_at_once(family, engine, tmp_path):
    answers = {}
    for name, reroute in {"unrouted": None, "routed": REROUTE}.items():
        arguments, log = UNROUTED, tmp_path / f"{name}.log"
        if reroute:
            arguments = ["--max-model-len", str(LENGTH), "--additional-config", json.dumps({"reroute": reroute})]
        with serving(arguments, log) as address:
            answers[name] = over_http(address)
            if reroute:
                check_metrics(address)
        assert ("routes by " in log.read_text()) == (reroute is not None)
        with engine(reroute) as llm:
            assert offline(llm) == answers[name]
    assert answers["routed"] != answers["unrouted"], "the policy is so severe that some answers must differ"
