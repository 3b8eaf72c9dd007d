"""Features that routing does not go with are refused by name when the engine starts."""

import os
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm has an environment with it")

from vllm.config import CompilationMode, CUDAGraphMode, KVTransferConfig, LoRAConfig
from vllm.engine.arg_utils import EngineArgs

from reroute_kernels.vllm import Settings, validate
from reroute_kernels.vllm.settings import WORKER
from reroute_kernels.vllm.validate import check_config
from tests.vllm.checkpoints import LLAVA
from tests.vllm.engines import arguments

REROUTE = {"schedule": "2:0.4,5:0.2"}
UNROUTED = {"architectures": ["LlavaForConditionalGeneration"]}
OTHERS_WORKER = "vllm.v1.worker.cpu_worker.CPUWorker"


@pytest.fixture
def config():
    """A configuration of vLLM that is accepted, made anew for each test."""

    def make(**options):
        given = arguments("llava", REROUTE) | options
        return EngineArgs(model=str(LLAVA), **given).create_engine_config()

    return make


def test_accepted(config):
    settings, plan = check_config(config())
    assert settings == Settings.of(REROUTE | {"trace": True})
    assert plan.layers == 16
    check_config(config(speculative_config={"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}))


def altered(**changes):
    """Sets attributes of a configuration by their paths, as vLLM itself would refuse some of them on a CPU."""

    def change(config):
        for path, value in changes.items():
            *parents, name = path.split("__")
            owner = config
            for parent in parents:
                owner = getattr(owner, parent)
            object.__setattr__(owner, name, value)

    return change


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (altered(scheduler_config__enable_chunked_prefill=True), "enable_chunked_prefill"),
        (altered(cache_config__enable_prefix_caching=True), "enable_prefix_caching"),
        (altered(parallel_config__pipeline_parallel_size=2), "pipeline_parallel_size above 1"),
        (altered(parallel_config__decode_context_parallel_size=2), "decode_context_parallel_size above 1"),
        (altered(parallel_config__prefill_context_parallel_size=2), "prefill_context_parallel_size above 1"),
        (altered(scheduler_config__async_scheduling=True), "async_scheduling"),
        (altered(scheduler_config__long_prefill_token_threshold=9), "long_prefill_token_threshold"),
        (
            altered(compilation_config__mode=CompilationMode.STOCK_TORCH_COMPILE),
            "the compilation mode STOCK_TORCH_COMPILE",
        ),
        (altered(lora_config=LoRAConfig()), "enable_lora"),
        (altered(kv_transfer_config=KVTransferConfig()), "kv_transfer_config"),
        (altered(ec_transfer_config=object()), "ec_transfer_config"),
        (altered(model_config__disable_cascade_attn=False), "cascade attention"),
        (altered(model_config__multimodal_config__video_pruning_rate=0.5), "video_pruning_rate"),
        (altered(model_config__enable_prompt_embeds=True), "enable_prompt_embeds"),
        (altered(cache_config__kv_sharing_fast_prefill=True), "kv_sharing_fast_prefill"),
        (altered(parallel_config__enable_dbo=True), "enable_dbo"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refused(config, change, name):
    made = config()
    change(made)
    with pytest.raises(NotImplementedError, match=f"^reroute does not go with {name}.*: turn it off$"):
        check_config(made)


def test_all_that_is_wrong_is_named_at_once(config):
    made = config()
    altered(scheduler_config__enable_chunked_prefill=True, cache_config__enable_prefix_caching=True)(made)
    with pytest.raises(NotImplementedError, match="with enable_chunked_prefill; nor with enable_prefix_caching: turn"):
        check_config(made)


def test_other_guesses(config):
    made = config(speculative_config={"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2})
    altered(speculative_config__method="eagle")(made)
    with pytest.raises(NotImplementedError, match=r"speculative decoding by 'eagle' \(only 'ngram'\)"):
        check_config(made)


@pytest.fixture
def on_gpu(monkeypatch):
    """As if the platform were a GPU."""
    monkeypatch.setattr(validate, "current_platform", SimpleNamespace(is_cpu=lambda: False))


def test_the_other_model_runner(config, monkeypatch):
    """It is tested on a CPU, and needs no setting there."""
    made = config()
    monkeypatch.setattr(type(made), "use_v2_model_runner", True)
    assert not check_config(made)[0].untested_runner


def test_the_other_model_runner_on_a_gpu(config, monkeypatch, on_gpu):
    """Refused until a GPU has run it, unless asked for by name."""
    made, asked_for = config(), config(additional_config={"reroute": REROUTE | {"untested_runner": True}})
    monkeypatch.setattr(type(made), "use_v2_model_runner", True)
    with pytest.raises(NotImplementedError, match=r"V2 on a GPU .*VLLM_USE_V2_MODEL_RUNNER=0, or `untested_runner`"):
        check_config(made)
    assert check_config(asked_for)[0].untested_runner


@pytest.mark.parametrize(
    ("runner_v2", "mode", "accepted"),
    [
        (False, "PIECEWISE", True),
        (False, "FULL_DECODE_ONLY", False),
        (False, "FULL_AND_PIECEWISE", False),
        (True, "FULL_DECODE_ONLY", True),
        (True, "PIECEWISE", False),
        (True, "FULL", False),
    ],
)
def test_graphs(config, monkeypatch, on_gpu, runner_v2, mode, accepted):
    made = config(additional_config={"reroute": REROUTE | {"untested_runner": True}})
    monkeypatch.setattr(type(made), "use_v2_model_runner", runner_v2)
    altered(compilation_config__cudagraph_mode=CUDAGraphMode[mode])(made)
    if accepted:
        check_config(made)
    else:
        with pytest.raises(
            NotImplementedError, match=rf"^reroute does not go with cudagraph_mode {mode} \(only NONE or"
        ):
            check_config(made)


@pytest.mark.parametrize("runner_v2", [False, True])
def test_a_cpu_has_no_graphs(config, monkeypatch, runner_v2):
    made = config()
    monkeypatch.setattr(type(made), "use_v2_model_runner", runner_v2)
    altered(compilation_config__cudagraph_mode=CUDAGraphMode.PIECEWISE)(made)
    check_config(made)


def test_steps_shorter_than_a_prompt(config):
    made = config()
    altered(scheduler_config__max_num_batched_tokens=511)(made)
    with pytest.raises(ValueError, match=r"max_num_batched_tokens must be at least max_model_len = 512, .*, got 511$"):
        check_config(made)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"additional_config": {}}, r'additional_config must hold "reroute", got \{\}'),
        ({"additional_config": {"reroute": {"schedule": "16:0.5"}}}, "below layer 16 of this model, got layer 16"),
        ({"hf_overrides": UNROUTED}, "hf_overrides must name an architecture of Reroute"),
        ({"worker_cls": OTHERS_WORKER}, f"worker_cls must be '{WORKER}', got"),
        (
            {
                "additional_config": {"reroute": REROUTE | {"own_groups": True}},
                "scheduler_cls": "vllm.v1.core.sched.scheduler.Scheduler",
            },
            "scheduler_cls must be",
        ),
    ],
)
def test_arguments_that_do_not_fit(config, options, message):
    with pytest.raises(ValueError, match=message):
        check_config(config(**options))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("worker_cls", OTHERS_WORKER, "worker_cls must"),
        ("hf_overrides", UNROUTED, "hf_overrides must"),
        ("additional_config", {}, 'additional_config must hold "reroute"'),
    ],
)
def test_half_of_the_arguments_never_runs_unrouted(name, value, message):
    """An engine whose arguments do not fit together does not start."""
    from vllm import LLM

    given = arguments("llava", REROUTE) | {name: value}
    assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    with pytest.raises(ValueError, match=message):
        LLM(str(LLAVA), **given)
