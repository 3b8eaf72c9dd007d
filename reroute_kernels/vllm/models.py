"""The routed architectures: vLLM's own classes, whose decoder can be driven stage by stage."""

from __future__ import annotations

from torch import Tensor
from vllm.model_executor.models.llava import LlavaForConditionalGeneration
from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration
from vllm.model_executor.models.qwen2_vl import Qwen2VLForConditionalGeneration

from .decoder import check_decoder, run_routed
from .settings import WORKER
from .step import RoutedStep
from .validate import check_config


class Routed:
    """What is before one of vLLM's classes to make it route."""

    def __init__(self, *, vllm_config, prefix: str = ""):
        if vllm_config.parallel_config.worker_cls != WORKER:
            raise ValueError(
                f"worker_cls must be {WORKER!r} for {type(self).__name__}, which routes nothing otherwise; got "
                f"{vllm_config.parallel_config.worker_cls!r}"
            )
        check_config(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        check_decoder(self.language_model.model)

    def forward_routed(self, positions: Tensor, embeddings: Tensor, step: RoutedStep) -> Tensor:
        """One step in which a prompt with visual tokens starts.

        Args:
            positions: (T,) or (3, T) rotary positions of all tokens of the step.
            embeddings: (T, d).
            step: what to do with them.

        Returns:
            (T, d), what `forward` returns.
        """
        return run_routed(self.language_model.model, positions, embeddings, step)


class RerouteLlavaForConditionalGeneration(Routed, LlavaForConditionalGeneration):
    """LLaVA-1.5."""


class RerouteQwen2VLForConditionalGeneration(Routed, Qwen2VLForConditionalGeneration):
    """Qwen2-VL."""


class RerouteQwen2_5_VLForConditionalGeneration(Routed, Qwen2_5_VLForConditionalGeneration):
    """Qwen2.5-VL."""
