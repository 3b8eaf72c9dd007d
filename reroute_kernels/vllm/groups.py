"""KV cache groups for the layers of each stage, which take blocks for the tokens that run there only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields

from vllm.config import set_current_vllm_config
from vllm.utils.math_utils import cdiv
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, KVCacheSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry, register_kv_cache_spec
from vllm.v1.worker.utils import AttentionGroup


class StageManager(FullAttentionManager):
    """Allocates blocks for the tokens of a request that the stage does not leave out.

    The scheduler sets `deferred`, which gives the number of left-out tokens of a request for every stage.
    """

    deferred: Callable[[str], tuple[int, ...]] | None = None

    def _left(self, request_id: str, tokens: int) -> int:
        return max(tokens - self.deferred(request_id)[self.kv_cache_spec.stage], 0)

    def get_num_blocks_to_allocate(self, request_id: str, num_tokens: int, *args, **kwargs) -> int:
        return super().get_num_blocks_to_allocate(request_id, self._left(request_id, num_tokens), *args, **kwargs)

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int):
        left = self._left(request_id, num_tokens)
        return super().allocate_new_blocks(request_id, left, self._left(request_id, num_tokens_main_model))


@dataclass(frozen=True, kw_only=True)
class StageSpec(AttentionSpec):
    """The cache of a layer in a stage; no `FullAttentionSpec`, all of which vLLM merges into one group."""

    stage: int

    @classmethod
    def of(cls, spec: KVCacheSpec, stage: int) -> StageSpec:
        """Raises: NotImplementedError, if the layer has no full attention."""
        if type(spec) is not FullAttentionSpec or spec.sliding_window or spec.attention_chunk_size:
            raise NotImplementedError(f"own_groups needs layers with full attention, got {spec}")
        return cls(**{each.name: getattr(spec, each.name) for each in fields(AttentionSpec)}, stage=stage)

    @classmethod
    def in_stage(cls, get_spec: Callable[..., KVCacheSpec], stage: int) -> Callable[..., StageSpec]:
        """Replacement of `get_kv_cache_spec` for a layer in a stage."""
        return lambda config: cls.of(get_spec(config), stage)

    def max_memory_usage_bytes(self, vllm_config) -> int:
        """The maximum, of a prompt without visual tokens, of which no token is left out."""
        return cdiv(vllm_config.model_config.max_model_len, self.block_size) * self.page_size_bytes

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        return all(spec == self for spec in kv_cache_specs.values())


def register() -> None:
    """Tell vLLM the manager of `StageSpec`, after its own."""
    KVCacheSpecRegistry._ensure_registered()
    register_kv_cache_spec(manager_class=StageManager)(StageSpec)


def check_groups(groups, stages: Mapping[str, int]) -> None:
    """Make sure that every group has layers of one stage only, and those of a stage take blocks for it.

    Args:
        groups: of vLLM's `KVCacheConfig`.
        stages: the stage of each attention layer that is in one, by the layer's name.

    Raises:
        RuntimeError: vLLM grouped the layers otherwise.
    """
    for group in groups:
        expected = {stages.get(name) for name in group.layer_names}
        spec = group.kv_cache_spec
        stage = spec.stage if isinstance(spec, StageSpec) else None
        if expected != {stage}:
            raise RuntimeError(
                f"own_groups needs a KV cache group to hold the layers of one stage, got {group.layer_names} of stages "
                f"{expected} under {spec}"
            )


def split_by_stage(attn_groups, stages: Mapping[str, int], config, device) -> list[list[list[AttentionGroup]]]:
    """The routed layers of a runner's attention groups, with builders of metadata for each stage alone.

    A builder may keep the metadata that it built last, as FlashInfer's does: a builder for two stages would make the
    first read the lengths of the second.

    Args:
        attn_groups: of the runner: for each KV cache group a list.
        stages: the stage of each attention layer that is in one, by the layer's name.
        config: vLLM's.
        device: of the metadata.

    Returns:
        For each stage and each KV cache group a list.
    """
    split = []
    for stage in range(max(stages.values()) + 1):
        split.append([])
        for groups in attn_groups:
            split[-1].append([])
            for group in groups:
                names = [name for name in group.layer_names if stages.get(name) == stage]
                if names:
                    split[-1][-1].append(_own_builder(group, names, config, device))
    return split


def _own_builder(group: AttentionGroup, names: list[str], config, device) -> AttentionGroup:
    builder = group.get_metadata_builder(0)
    own = AttentionGroup(group.backend, names, group.kv_cache_spec, group.kv_cache_group_id)
    with set_current_vllm_config(config):  # backends ask it for their version and their block sizes
        own.create_metadata_builders(config, device, kernel_block_size=builder.kv_cache_spec.block_size)
    if own.kernel_block_size != group.kernel_block_size:
        raise RuntimeError(
            f"blocks of {group.backend} must stay {group.kernel_block_size}, got {own.kernel_block_size}"
        )
    own.kernel_block_stride = group.kernel_block_stride
    if hasattr(builder, "set_workspace_buffer"):
        own.get_metadata_builder(0).set_workspace_buffer(builder._get_workspace_buffer())
    return own


register()
