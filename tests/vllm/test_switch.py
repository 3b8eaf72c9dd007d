"""An engine is given all that routing needs by one setting."""

import os
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm has an environment with it")

from vllm.config import CUDAGraphMode
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.platforms import current_platform

from reroute_kernels.vllm.settings import SCHEDULER, WORKER, Settings, engine_arguments
from reroute_kernels.vllm.switch import complete, install
from reroute_kernels.vllm.validate import check_config
from tests.vllm.checkpoints import LLAVA
from tests.vllm.engines import answers, engine
from tests.vllm.requests import requests

SCHEDULE = {"schedule": "2:0.5,8:0.2"}
MODEL = SimpleNamespace(architectures=["LlavaForConditionalGeneration"], max_model_len=512)
SMALL = {"dtype": "float32", "enforce_eager": True, "block_size": 32, "kv_cache_memory_bytes": 48 << 20}


def configured(of=EngineArgs, **arguments):
    return of(str(LLAVA), **SMALL | {"additional_config": {"reroute": SCHEDULE}} | arguments).create_engine_config()


@pytest.mark.parametrize("of", [EngineArgs, AsyncEngineArgs])
def test_one_setting_is_enough(of):
    config = configured(of)
    settings, _ = check_config(config)
    assert settings == Settings.of(SCHEDULE)
    assert config.parallel_config.worker_cls == WORKER
    assert config.scheduler_config.max_num_batched_tokens == config.model_config.max_model_len
    assert config.compilation_config.cudagraph_mode in (CUDAGraphMode.NONE, CUDAGraphMode.PIECEWISE)


def test_own_groups_bring_their_scheduler():
    config = configured(additional_config={"reroute": SCHEDULE | {"own_groups": True}}, max_model_len=256)
    check_config(config)
    assert config.scheduler_config.scheduler_cls == SCHEDULER
    assert config.model_config.max_model_len == config.scheduler_config.max_num_batched_tokens == 256


def test_what_is_given_stays():
    config = configured(max_num_batched_tokens=1024, hf_overrides={"bos_token_id": 3})
    check_config(config)
    assert config.scheduler_config.max_num_batched_tokens == 1024
    assert config.model_config.hf_config.bos_token_id == 3
    with pytest.raises(NotImplementedError, match="enable_prefix_caching"):
        check_config(configured(enable_prefix_caching=True))


def test_all_arguments_may_be_given():
    settings = Settings.of(SCHEDULE)
    check_config(configured(**engine_arguments("LlavaForConditionalGeneration", settings, 256)))


def test_other_engines_are_as_they_were():
    config = configured(additional_config={})
    assert config.parallel_config.worker_cls != WORKER
    assert config.model_config.architectures == ["LlavaForConditionalGeneration"]
    with pytest.raises(ValueError, match=r"architecture of .* must be one of LlavaFor.*, got LlamaForCausalLM"):
        configured(hf_overrides={"architectures": ["LlamaForCausalLM"]})
    with pytest.raises(ValueError, match="hf_overrides must be a mapping where an engine routes"):
        configured(hf_overrides=lambda config: config)
    with pytest.raises(ValueError, match="reroute must hold one of"):
        configured(additional_config={"reroute": {}})


@pytest.mark.parametrize(
    ("on_cpu", "given", "untested", "left"),
    [(True, None, False, None), (False, None, False, "0"), (False, "1", False, "1"), (False, None, True, None)],
)
def test_the_older_runner_on_a_gpu(monkeypatch, on_cpu, given, untested, left):
    name = "VLLM_USE_V2_MODEL_RUNNER"
    monkeypatch.setenv(name, given or "")  # put back behind the test, whatever is set in it
    if given is None:
        monkeypatch.delenv(name)
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda platform: on_cpu)
    arguments = EngineArgs(str(LLAVA), additional_config={"reroute": SCHEDULE | {"untested_runner": untested}})
    monkeypatch.setattr(arguments, "create_model_config", lambda: MODEL)
    complete(arguments)
    assert os.environ.get(name) == left
    mode = CUDAGraphMode.FULL_DECODE_ONLY if untested else CUDAGraphMode.PIECEWISE
    assert arguments.compilation_config.cudagraph_mode == mode


def test_it_is_installed_once():
    make = EngineArgs.create_engine_config
    install()
    assert EngineArgs.create_engine_config is make


def test_it_routes():
    reroute, asked = SCHEDULE | {"trace": True}, requests("llava")
    with engine("llava", LLAVA, reroute) as llm:
        expected = answers(llm, asked)
    left = dict.fromkeys(("enable_chunked_prefill", "enable_prefix_caching", "max_num_batched_tokens"))
    with engine("llava", LLAVA, None, additional_config={"reroute": reroute}, **left) as llm:
        got = answers(llm, asked)
    for mine, theirs in zip(got, expected, strict=True):
        assert (mine.tokens, mine.selected) == (theirs.tokens, theirs.selected)
    assert any(answer.selected for answer in got)
