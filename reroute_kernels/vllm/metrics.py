"""Counters of routing on vLLM's page of metrics, and a check of requests as they arrive.

All of it is known from counts alone, so it is done in the process that takes requests.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

from prometheus_client import Counter

from .plan import Plan
from .settings import Settings
from .visual import deferred_of, option_of, opts_out, visual_stretches

_LABELS = ("model_name",)

PROMPTS = Counter("reroute:prompts", "Prompts with visual tokens that are routed.", _LABELS)
OPTED_OUT = Counter("reroute:prompts_opted_out", "Prompts with visual tokens that asked not to be routed.", _LABELS)
VISUAL_TOKENS = Counter("reroute:visual_tokens", "Visual tokens of the routed prompts.", _LABELS)
VISUAL_TOKENS_RUN = Counter("reroute:visual_tokens_run", "Those of them that run, mean over the layers.", _LABELS)
KV_TOKENS_SAVED = Counter(
    "reroute:kv_tokens_saved", "Tokens of routed prompts that are not cached, mean over the layers.", _LABELS
)


def install() -> None:
    """Have vLLM count and check the requests of an engine that routes; once a process."""
    from vllm.v1.engine.input_processor import InputProcessor

    process = InputProcessor.process_inputs
    if getattr(process, "counts", False):
        return
    signature = inspect.signature(process)

    @functools.wraps(process)
    def process_inputs(self, *args, **kwargs):
        config = self.vllm_config
        if not isinstance(config.additional_config, dict) or "reroute" not in config.additional_config:
            return process(self, *args, **kwargs)
        given = signature.bind(self, *args, **kwargs).arguments
        check_request(given.get("params"), bool(given.get("resumable")) or given.get("session_id") is not None)
        request = process(self, *args, **kwargs)
        if not hasattr(self, "_routing"):
            self._routing = routing_of(config)
        count(*self._routing, request, config.model_config.served_model_name)
        return request

    process_inputs.counts = True  # type: ignore[attr-defined]
    InputProcessor.process_inputs = process_inputs


def check_request(sampling: Any, goes_on: bool = False) -> None:
    """Refuse a request whose parameters cannot be followed.

    Args:
        sampling: its sampling parameters.
        goes_on: whether later requests continue it, on the cache that it leaves.

    Raises:
        vllm.exceptions.VLLMValidationError: they cannot; a server answers so with code 400.
    """
    from vllm.exceptions import VLLMValidationError

    given = option_of(sampling)
    if given not in ("on", "off"):
        raise VLLMValidationError(f"reroute must be 'on' or 'off' among vllm_xargs, got {given!r}")
    if given == "off" and goes_on:
        raise VLLMValidationError("reroute must be 'on' among vllm_xargs in a session, got 'off'")


def routing_of(config: Any) -> tuple[Settings, Plan]:
    """The settings and the plan of an engine, from vLLM's configuration of it."""
    settings = Settings.of(config.additional_config["reroute"])
    return settings, Plan(settings.policy, config.model_config.hf_config.get_text_config().num_hidden_layers)


def count(settings: Settings, plan: Plan, request: Any, name: str) -> None:
    """Count a request.

    Args:
        settings, plan: of the engine.
        request: vLLM's `EngineCoreRequest`.
        name: of the model that is served.
    """
    features = request.mm_features or []
    visual = sum(last - first + 1 for first, last in visual_stretches(features))
    if not visual:
        return
    if opts_out(request.sampling_params):
        OPTED_OUT.labels(name).inc()
        return
    deferred = deferred_of(plan, features, len(request.prompt_token_ids), request.sampling_params)
    waits = sum(len(stage) * tokens for stage, tokens in zip(plan.stages, deferred, strict=True)) / plan.layers
    PROMPTS.labels(name).inc()
    VISUAL_TOKENS.labels(name).inc(visual)
    VISUAL_TOKENS_RUN.labels(name).inc(visual - waits)
    if settings.own_groups:
        KV_TOKENS_SAVED.labels(name).inc(waits)
