"""The routed architectures: vLLM's own classes, whose decoder can be driven stage by stage."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor
from vllm.forward_context import get_forward_context
from vllm.logger import init_logger
from vllm.model_executor.models.llava import LlavaForConditionalGeneration
from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration
from vllm.model_executor.models.qwen2_vl import Qwen2VLForConditionalGeneration
from vllm.model_executor.models.qwen3_vl import Qwen3VLForConditionalGeneration
from vllm.model_executor.models.qwen3_vl_moe import Qwen3VLMoeForConditionalGeneration

from .decoder import check_decoder, run_routed
from .groups import StageSpec
from .settings import WORKER
from .step import RoutedStep
from .validate import check_config

logger = init_logger("vllm.reroute_kernels")


class RoutedModel:
    """Mixin that adds routing to one of vLLM's model classes.

    Attributes:
        settings, plan: of the engine.
        stages: the stage of each attention layer that is in one, by the layer's name.
        state: the `RoutedModelState`, under the model runner V2 alone.
    """

    state = None

    def __init__(self, *, vllm_config, prefix: str = ""):
        if vllm_config.parallel_config.worker_cls != WORKER:
            raise ValueError(
                f"worker_cls must be {WORKER!r} for {type(self).__name__}, which routes nothing otherwise; got "
                f"{vllm_config.parallel_config.worker_cls!r}"
            )
        settings, plan = check_config(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        check_decoder(self.language_model.model)
        self.settings, self.plan, self.stages = settings, plan, {}
        for number, layer in enumerate(self.language_model.model.layers):
            stage, attention = plan.stage_of(number), layer.self_attn.attn
            if stage is not None:
                self.stages[attention.layer_name] = stage
                if settings.own_groups:
                    attention.get_kv_cache_spec = StageSpec.in_stage(attention.get_kv_cache_spec, stage)
        groups = "own KV groups" if settings.own_groups else "one KV group"
        logger.info("%s routes by %s, with %s", type(self).__name__, settings.policy, groups)

    @staticmethod
    def get_model_state_cls():
        """Class of the model state, for model runner V2."""
        from .model_state import RoutedModelState

        return RoutedModelState

    def forward(self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None, **kwargs):
        """vLLM's own forward; under the model runner V2, with the changes that `RoutedModelState` has prepared."""
        prepared = None if self.state is None else self.state.take_forward()
        if prepared is not None:
            get_forward_context().slot_mapping.update(prepared.slots)
            if prepared.step is not None:
                tokens = prepared.step.tokens
                hidden = self.forward_routed(positions[..., :tokens], inputs_embeds[:tokens], prepared.step)
                self.state.keep_traces(prepared.step)
                return hidden
        return super().forward(input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs)

    def forward_routed(self, positions: Tensor, embeddings: Tensor, step: RoutedStep) -> Tensor:
        """One step in which a prompt with visual tokens starts.

        Args:
            positions: (T,) or (3, T) rotary positions of all tokens of the step.
            embeddings: (T, d).
            step: the state of the step, which selects tokens.

        Returns:
            (T, d), the result of `forward`.
        """
        with self.additions(len(embeddings)) as additions:
            return run_routed(self.language_model.model, positions, embeddings, step, additions)

    @contextmanager
    def additions(self, tokens: int) -> Iterator[list[Tensor]]:
        """(T, d) each, what the model adds to the hidden states after its first layers, while the block lasts."""
        yield []


class RerouteLlavaForConditionalGeneration(RoutedModel, LlavaForConditionalGeneration):
    """LLaVA-1.5."""


class RerouteQwen2VLForConditionalGeneration(RoutedModel, Qwen2VLForConditionalGeneration):
    """Qwen2-VL."""


class RerouteQwen2_5_VLForConditionalGeneration(RoutedModel, Qwen2_5_VLForConditionalGeneration):
    """Qwen2.5-VL."""


class DeepStack(RoutedModel):
    """Mixin for models that add visual features after their first layers."""

    @contextmanager
    def additions(self, tokens: int) -> Iterator[list[Tensor]]:
        features = self._get_deepstack_input_embeds(tokens)
        try:
            yield [] if features is None else list(features.tensors.values())
        finally:
            self._clear_deepstack_input_embeds(tokens)


class RerouteQwen3VLForConditionalGeneration(DeepStack, Qwen3VLForConditionalGeneration):
    """Qwen3-VL."""


class RerouteQwen3VLMoeForConditionalGeneration(DeepStack, Qwen3VLMoeForConditionalGeneration):
    """Qwen3-VL with a mixture of experts."""
