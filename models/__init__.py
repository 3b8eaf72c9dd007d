"""Drop-in adapters that route transformers models: `apply(model, policy)`."""

from __future__ import annotations

from torch import nn

from ..policy import Policy
from .adapter import Adapter
from .hooks import Routing
from .llava import LlavaAdapter
from .qwen2_5_vl import Qwen2_5_VLAdapter

__all__ = ["ADAPTERS", "Adapter", "Routing", "apply"]

ADAPTERS: dict[str, type[Adapter]] = {
    "llava": LlavaAdapter,
    "qwen2_5_vl": Qwen2_5_VLAdapter,
}
"""Adapter of each supported `config.model_type`."""


def apply(model: nn.Module, policy: Policy) -> Routing:
    """Route this model's prompts by a policy, until the handle is removed.

    Only this instance changes, through PyTorch's forward hooks; `generate` and plain calls work as before. A call
    without visual tokens runs untouched.

    Args:
        model: a transformers model of a type in `ADAPTERS`.
        policy: what to route.

    Returns:
        The handle: a context manager with `remove()` and `trace`.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: the model type is not supported, the model is routed already, or the policy does not fit it.
        NotImplementedError: the model or the policy asks for something that is not supported, which is named.
        AttributeError: this version of transformers builds the model differently, which is named.
    """
    if not isinstance(policy, Policy):
        raise TypeError(f"policy must be a Policy, got {type(policy).__name__}")
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if not isinstance(model, nn.Module) or model_type is None:
        raise TypeError(f"model must be a transformers model, got {type(model).__name__}")
    if model_type not in ADAPTERS:
        raise ValueError(f"model must be of a supported type ({', '.join(ADAPTERS)}), got {model_type!r}")
    return Routing(ADAPTERS[model_type](model), policy)
