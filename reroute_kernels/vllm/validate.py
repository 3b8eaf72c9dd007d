"""Features of vLLM that cannot be combined with routing, refused by name when the engine starts."""

from __future__ import annotations

from vllm.config import CompilationMode, CUDAGraphMode, VllmConfig
from vllm.platforms import current_platform

from . import check_version
from .plan import Plan
from .settings import ARCHITECTURES, SCHEDULER, WORKER, Settings


def check_config(config: VllmConfig) -> tuple[Settings, Plan]:
    """The settings of an engine, once it is sure that they can be kept.

    Raises:
        RuntimeError: another vLLM than a tested one.
        TypeError, ValueError: `additional_config["reroute"]` is missing or wrong, or another argument does not fit it.
        NotImplementedError: a feature is on that cannot be combined with routing.
    """
    check_version()
    additional = config.additional_config
    if not isinstance(additional, dict) or "reroute" not in additional:
        raise ValueError(f'additional_config must hold "reroute", got {additional!r}')
    settings = Settings.of(additional["reroute"])
    model, cache, parallel = config.model_config, config.cache_config, config.parallel_config
    scheduler, speculative = config.scheduler_config, config.speculative_config
    routed = tuple(ARCHITECTURES.values())
    if not set(model.architectures) & set(routed):
        raise ValueError(f"hf_overrides must name an architecture of {', '.join(routed)}, got {model.architectures}")
    if parallel.worker_cls != WORKER:
        raise ValueError(f"worker_cls must be {WORKER!r}, got {parallel.worker_cls!r}")
    plan = Plan(settings.policy, model.hf_config.get_text_config().num_hidden_layers)
    multimodal = model.multimodal_config
    on_cpu = current_platform.is_cpu()
    # A CPU captures no graphs, whatever the mode.
    mode = CUDAGraphMode.NONE if on_cpu else config.compilation_config.cudagraph_mode or CUDAGraphMode.NONE
    # The runner V2 prepares decode steps for full graphs; the older one reads the lengths of each layer's cache anew.
    with_graphs = CUDAGraphMode.FULL_DECODE_ONLY if config.use_v2_model_runner else CUDAGraphMode.PIECEWISE
    graphs = (CUDAGraphMode.NONE, with_graphs)
    refused = {
        "enable_chunked_prefill": scheduler.enable_chunked_prefill,
        "enable_prefix_caching": cache.enable_prefix_caching,
        "pipeline_parallel_size above 1": parallel.pipeline_parallel_size > 1,
        "decode_context_parallel_size above 1": parallel.decode_context_parallel_size > 1,
        "prefill_context_parallel_size above 1": getattr(parallel, "prefill_context_parallel_size", 1) > 1,
        "enable_dbo (micro-batches)": getattr(parallel, "use_ubatching", False),
        "enable_lora": config.lora_config is not None,
        "kv_transfer_config (KV connectors)": config.kv_transfer_config is not None,
        "ec_transfer_config (encoder connectors)": config.ec_transfer_config is not None,
        "cascade attention (disable_cascade_attn=False)": not getattr(model, "disable_cascade_attn", True),
        "video_pruning_rate": bool(multimodal and multimodal.is_multimodal_pruning_enabled()),
        "enable_prompt_embeds": model.enable_prompt_embeds,
        "kv_sharing_fast_prefill": cache.kv_sharing_fast_prefill,
        # Two steps at once may fill the encoder's cache. vLLM then cuts a prompt at an image nevertheless.
        "async_scheduling": bool(scheduler.async_scheduling),
        "long_prefill_token_threshold": scheduler.long_prefill_token_threshold > 0,
        "the compilation mode STOCK_TORCH_COMPILE": config.compilation_config.mode
        == CompilationMode.STOCK_TORCH_COMPILE,
        f"cudagraph_mode {mode.name} (only {' or '.join(each.name for each in graphs)})": mode not in graphs,
        "the model runner V2 on a GPU (tested on a CPU only; set VLLM_USE_V2_MODEL_RUNNER=0, or `untested_runner`)": (
            config.use_v2_model_runner and not on_cpu and not settings.untested_runner
        ),
    }
    if speculative is not None and speculative.method != "ngram":
        refused[f"speculative decoding by {speculative.method!r} (only 'ngram')"] = True
    found = [name for name, is_on in refused.items() if is_on]
    if found:
        raise NotImplementedError(f"reroute does not go with {'; nor with '.join(found)}: turn it off")
    if scheduler.max_num_batched_tokens < model.max_model_len:
        raise ValueError(
            f"max_num_batched_tokens must be at least max_model_len = {model.max_model_len}, so that a prompt is "
            f"prefilled in one step, got {scheduler.max_num_batched_tokens}"
        )
    if settings.own_groups and scheduler.scheduler_cls != SCHEDULER:
        raise ValueError(f"scheduler_cls must be {SCHEDULER!r} with own_groups, got {scheduler.scheduler_cls!r}")
    if settings.own_groups and scheduler.disable_hybrid_kv_cache_manager:
        raise ValueError("disable_hybrid_kv_cache_manager must be False with own_groups, got True")
    return settings, plan
