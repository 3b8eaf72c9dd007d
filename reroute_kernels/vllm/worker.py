"""The worker, whose model runner knows how many tokens of each request every layer caches."""

from __future__ import annotations

import torch
from torch import Tensor
from vllm.forward_context import get_forward_context
from vllm.platforms import current_platform
from vllm.v1.attention.backend import CommonAttentionMetadata

from ..trace import Trace
from .groups import check_groups, split_by_stage
from .plan import Share, StageLayout, stage_layout
from .step import RoutedStep
from .validate import check_config
from .visual import deferred_of, visual_stretches

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as Worker
else:
    from vllm.v1.worker.gpu_worker import Worker


class RoutedRunner:
    """Mixin that adds routing to vLLM's model runner."""

    def start_routing(self, settings, plan) -> None:
        self.settings, self.plan = settings, plan
        self.traces: dict[str, Trace] = {}
        self._deferred: dict[tuple[str, int, int], tuple[int, ...]] = {}
        self._groups = None

    def initialize_kv_cache(self, kv_cache_config, *args, **kwargs) -> None:
        if self.settings.own_groups:
            check_groups(kv_cache_config.kv_cache_groups, self.model.stages)
        self._groups = None
        super().initialize_kv_cache(kv_cache_config, *args, **kwargs)

    def _model_forward(
        self,
        input_ids: Tensor | None = None,
        positions: Tensor | None = None,
        intermediate_tensors=None,
        inputs_embeds: Tensor | None = None,
        **model_kwargs,
    ):
        shares = self._shares()
        if any(share.is_routed for share in shares):
            self._replace_metadata(shares)
            if any(share.is_routed and share.starts for share in shares):
                tokens = sum(share.scheduled for share in shares)
                return self._start(shares, positions[..., :tokens], inputs_embeds[:tokens])
        return super()._model_forward(
            input_ids=input_ids,
            positions=positions,
            intermediate_tensors=intermediate_tensors,
            inputs_embeds=inputs_embeds,
            **model_kwargs,
        )

    def _start(self, shares: list[Share], positions: Tensor, embeddings: Tensor) -> Tensor:
        names = self.input_batch.req_ids[: len(shares)]
        stretches = [visual_stretches(self.requests[name].mm_features) for name in names]
        step = RoutedStep(self.plan, shares, stretches, embeddings.device)
        hidden = self.model.forward_routed(positions, embeddings, step)
        if self.settings.trace:
            self.traces |= {names[number]: trace for number, trace in step.traces().items()}
        return hidden

    def _shares(self) -> list[Share]:
        batch = self.input_batch
        names = batch.req_ids[: batch.num_reqs]
        requests = [self.requests[name] for name in names]
        # A session that goes on keeps its name, and its prompt grows.
        keys = [
            (name, each.num_prompt_tokens, len(each.mm_features)) for name, each in zip(names, requests, strict=True)
        ]
        self._deferred = {
            key: self._deferred.get(key)
            or deferred_of(self.plan, each.mm_features, each.num_prompt_tokens, each.sampling_params)
            for key, each in zip(keys, requests, strict=True)
        }
        starts = self.query_start_loc.np[: len(names) + 1].tolist()
        return [
            Share(
                int(batch.num_computed_tokens_cpu[number]),
                starts[number + 1] - starts[number],
                int(batch.num_prompt_tokens[number]),
                self._deferred[keys[number]],
            )
            for number in range(len(names))
        ]

    def _replace_metadata(self, shares: list[Share]) -> None:
        """Hand every routed layer the metadata of the tokens that run and are cached there, by its own backend."""
        context = get_forward_context()
        if self._groups is None:
            self._groups = split_by_stage(self.attn_groups, self.model.stages, self.vllm_config, self.device)
        for stage, groups in enumerate(self._groups):
            if not any(share.deferred[stage] for share in shares):
                continue
            layout = stage_layout(shares, stage)
            for number, of_number in enumerate(groups):
                for group in of_number:
                    common = self._common_metadata(shares, layout, number)
                    metadata = group.build_metadata(common)
                    for name in group.layer_names:
                        context.attn_metadata[name] = metadata
                        context.slot_mapping[name] = common.slot_mapping

    def _common_metadata(self, shares: list[Share], layout: StageLayout, group: int) -> CommonAttentionMetadata:
        table = self.input_batch.block_table[group]
        blocks = table.get_device_tensor(len(shares))
        requests, rows = (torch.from_numpy(each).to(self.device) for each in (layout.requests, layout.rows))
        size = table.block_size
        slots = blocks[requests, rows // size].long() * size + rows % size
        starts = torch.zeros(len(shares) + 1, dtype=torch.int32, device="cpu")
        starts[1:] = torch.from_numpy(layout.query_lens).cumsum(0)
        seq_lens = torch.from_numpy(layout.seq_lens).int()
        return CommonAttentionMetadata(
            query_start_loc=starts.to(self.device),
            query_start_loc_cpu=starts,
            seq_lens=seq_lens.to(self.device),
            seq_lens_cpu_upper_bound=seq_lens,
            num_reqs=len(shares),
            num_actual_tokens=len(rows),
            max_query_len=int(layout.query_lens.max()),
            max_seq_len=int(layout.seq_lens.max()),
            block_table_tensor=blocks,
            slot_mapping=slots,
            causal=True,
            is_prefilling=torch.tensor([share.computed < share.prompt for share in shares], device="cpu"),
        )


class RoutedWorker(Worker):
    """vLLM's worker for this platform, with a model runner that routes."""

    def __init__(self, vllm_config, *args, **kwargs):
        self.reroute = check_config(vllm_config)
        super().__init__(vllm_config, *args, **kwargs)

    def init_device(self):
        super().init_device()
        if self.vllm_config.use_v2_model_runner:
            return  # there the model's own `RoutedModelState` routes
        runner = self.model_runner
        runner.__class__ = type(f"Routed{type(runner).__name__}", (RoutedRunner, type(runner)), {})
        runner.start_routing(*self.reroute)

    def routing_traces(self) -> dict[str, list[list[int]]]:
        """Selections of prompts since the last call: by request, for each stage the ascending visual positions.

        To be called by `LLM.collective_rpc("routing_traces")`, if `trace` is set.
        """
        runner = self.model_runner
        owner = runner.model_state if self.vllm_config.use_v2_model_runner else runner
        traces, owner.traces = owner.traces, {}
        return {name: [stage.selected[0].tolist() for stage in trace.stages] for name, trace in traces.items()}
