"""Norms of layers that an operation computes in place of their modules: by class, if nothing was put around them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from reroute_kernels.checks import FLOATING
from reroute_kernels.rankings import Norm

from .modules import Module

# Classes by qualified name. Those with an attribute `variance_epsilon` round a row, then multiply it by their weight;
# those with `eps` multiply it by 1 + weight in float32, then round. The tests hold each against the operation.
ROUNDED_FIRST = (
    "transformers.models.glm4v.modeling_glm4v.Glm4vRMSNorm",
    "transformers.models.glm4v_moe.modeling_glm4v_moe.Glm4vMoeTextRMSNorm",
    "transformers.models.llama.modeling_llama.LlamaRMSNorm",
    "transformers.models.mistral.modeling_mistral.MistralRMSNorm",
    "transformers.models.qwen2.modeling_qwen2.Qwen2RMSNorm",
    "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl.Qwen2_5_VLRMSNorm",
    "transformers.models.qwen2_vl.modeling_qwen2_vl.Qwen2VLRMSNorm",
    "transformers.models.qwen3.modeling_qwen3.Qwen3RMSNorm",
    "transformers.models.qwen3_vl.modeling_qwen3_vl.Qwen3VLTextRMSNorm",
    "transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe.Qwen3VLMoeTextRMSNorm",
)
ZERO_CENTERED = (
    "transformers.models.qwen3_5.modeling_qwen3_5.Qwen3_5RMSNorm",
    "transformers.models.qwen3_5_moe.modeling_qwen3_5_moe.Qwen3_5MoeRMSNorm",
)


def known_norm(module: Module, hidden: Tensor) -> Norm | None:
    """The norm that a module computes of hidden states, or None if only the module itself can tell.

    Its class is one of those above, with the forward pass that it was defined with, and neither the instance nor all
    modules have another one or hooks: those of PyTorch, those of accelerate, kernels from the hub. Modules around it
    (PEFT's, `torch.compile`'s, checkpoints) are of other classes. The weight is a plain tensor of the dtype and on the
    device of the hidden states.

    Args:
        module: the norm.
        hidden: (B, L, d), its input.
    """
    kind = type(module)
    name = f"{kind.__module__}.{kind.__qualname__}"
    is_one_plus = name in ZERO_CENTERED
    if not (is_one_plus or name in ROUNDED_FIRST) or not _runs_as_defined(module):
        return None
    weight = module.weight
    if type(weight) not in (Tensor, nn.Parameter) or weight.shape != hidden.shape[2:]:
        return None
    if weight.dtype != hidden.dtype or hidden.dtype not in FLOATING or weight.device != hidden.device:
        return None
    return Norm(weight, module.eps if is_one_plus else module.variance_epsilon, is_one_plus)


def _runs_as_defined(module: Module) -> bool:
    """Whether a call of the module runs the forward pass of its class as it was defined, and nothing besides."""
    kind, own = type(module), vars(module)
    forward = kind.forward
    if (forward.__module__, forward.__qualname__) != (kind.__module__, f"{kind.__qualname__}.forward"):
        return False
    everywhere = torch.nn.modules.module
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        everywhere._global_forward_hooks,
        everywhere._global_forward_pre_hooks,
    )
    return not (any(hooks) or "forward" in own or "_hf_hook" in own)
