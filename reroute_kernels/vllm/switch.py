"""The one switch: an engine whose `additional_config` holds `"reroute"` is given all else that routing needs."""

from __future__ import annotations

import functools
import logging
import os
from typing import Any

from .settings import ARCHITECTURES, Settings, engine_arguments

MOST_TOKENS = 4096
"""Tokens that a request may have where `max_model_len` is not given, if the model takes so many."""

_NOT_GIVEN = {"worker_cls": ("auto",), "max_model_len": (None, -1)}
"""Values of arguments that are not given, where these are others than None."""

_RUNNER = "VLLM_USE_V2_MODEL_RUNNER"


def install() -> None:
    """Have vLLM's arguments of an engine completed before it makes a configuration of them; once a process.

    The process that does so takes the requests, too, and counts them.
    """
    from vllm.engine.arg_utils import EngineArgs

    make = EngineArgs.create_engine_config
    if getattr(make, "completes", False):
        return

    @functools.wraps(make)
    def create_engine_config(self, *args, **kwargs):
        if isinstance(self.additional_config, dict) and "reroute" in self.additional_config:
            from . import metrics  # whose counters appear on the page of metrics

            complete(self)
            metrics.install()
        return make(self, *args, **kwargs)

    create_engine_config.completes = True  # type: ignore[attr-defined]
    EngineArgs.create_engine_config = create_engine_config


def complete(arguments: Any) -> None:
    """Fill in what routing needs and is not given. What is given stays, and is checked when the engine starts.

    On a GPU the older model runner is taken, by its environment variable, unless another one is asked for.

    Args:
        arguments: vLLM's `EngineArgs`, whose `additional_config` holds `"reroute"`; changed in place.

    Raises:
        TypeError, ValueError, NotImplementedError: the settings are wrong, or the architecture of the checkpoint is not
            routed.
    """
    from vllm.platforms import current_platform

    settings = Settings.of(arguments.additional_config["reroute"])
    model = arguments.create_model_config()
    found = [name for name, routed in ARCHITECTURES.items() if {name, routed} & set(model.architectures)]
    if not found:
        raise ValueError(
            f'additional_config holds "reroute", so the architecture of {arguments.model} must be one of '
            f"{', '.join(ARCHITECTURES)}, got {', '.join(model.architectures)}"
        )
    length = arguments.max_model_len
    if length is None or length < 0:  # vLLM has -1 for the largest that fits
        length = min(model.max_model_len, MOST_TOKENS)
    # Every process is to have the same policy, whatever becomes of a file.
    arguments.additional_config = arguments.additional_config | {"reroute": settings.as_dict()}
    needed = engine_arguments(found[0], settings, length)
    filled = {name: value for name, value in needed.items() if _fill(arguments, name, value)}
    if not current_platform.is_cpu() and not settings.untested_runner and _RUNNER not in os.environ:
        os.environ[_RUNNER] = filled[_RUNNER] = "0"  # for the processes that this one starts, too
    logging.getLogger("vllm.reroute_kernels").info("routing needs these, which were not given: %s", filled)


def _fill(arguments: Any, name: str, value: Any) -> bool:
    """Set an argument that is not given; returns whether it was set."""
    if name == "additional_config":
        return False
    if name == "compilation_config":
        return _fill_mode(arguments.compilation_config, value["cudagraph_mode"])
    given = getattr(arguments, name)
    if name == "hf_overrides":
        if not isinstance(given, dict):
            raise ValueError(f"hf_overrides must be a mapping where an engine routes, got {given!r}")
        if "architectures" in given:
            return False
        value = {**given, **value}
    elif given not in _NOT_GIVEN.get(name, (None,)):
        return False
    setattr(arguments, name, value)
    return True


def _fill_mode(compilation: Any, mode: str) -> bool:
    from vllm.config import CUDAGraphMode

    if compilation.cudagraph_mode is not None:
        return False
    compilation.cudagraph_mode = CUDAGraphMode[mode]
    return True
