"""The state beside a model that routes under vLLM's model runner V2.

The tests run it with that runner on a CPU. No GPU has run it yet: there an engine refuses it unless `untested_runner`
is set.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from vllm.config import CUDAGraphMode
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backends.utils import PAD_SLOT_ID
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from ..trace import Trace
from .groups import check_groups, split_by_stage
from .plan import Share, StageLayout, stage_layout
from .step import RoutedStep
from .visual import deferred_of, visual_stretches


@dataclass(frozen=True)
class Request:
    """State of a request, from its arrival to its end."""

    name: str
    prompt: int
    stretches: list[tuple[int, int]]
    deferred: tuple[int, ...]


@dataclass(frozen=True)
class Forward:
    """Changes to the model's next forward.

    Args:
        slots: by the name of a layer, the cache slots of its keys and values.
        step: the prompts that it routes; None if none starts, and the model runs as it is.
    """

    slots: dict[str, Tensor]
    step: RoutedStep | None


class RoutedModelState(DefaultModelState):
    """Model state of a routed model, returned by its `get_model_state_cls`.

    How many tokens of a request a layer leaves out of its cache is known when the request comes. In a decode step,
    lengths and slots are smaller by that number. They are computed on the device, into buffers whose addresses stay,
    because graphs that hold whole decode steps need that. A step in which a prompt with visual tokens starts has no
    graph.
    """

    def __init__(self, vllm_config, model, encoder_cache, device):
        super().__init__(vllm_config, model, encoder_cache, device)
        self.settings, self.plan, self.stages = model.settings, model.plan, model.stages
        self.traces: dict[str, Trace] = {}
        self._requests: dict[int, Request] = {}
        self._groups = self._next = None
        self._seq_lens = torch.zeros(len(self.plan.stages), self.max_num_reqs, dtype=torch.int32, device=device)
        model.state = self

    def add_request(self, req_index: int, new_req_data) -> None:
        super().add_request(req_index, new_req_data)
        features, prompt = new_req_data.mm_features, new_req_data.prompt_len
        deferred = deferred_of(self.plan, features, prompt, new_req_data.sampling_params)
        self._requests[req_index] = Request(new_req_data.req_id, prompt, visual_stretches(features), deferred)

    def initialize_kv_cache(self, kv_cache_config, block_tables) -> None:
        super().initialize_kv_cache(kv_cache_config, block_tables)
        if self.settings.own_groups:
            check_groups(kv_cache_config.kv_cache_groups, self.stages)
        self._groups, self._block_sizes = None, list(block_tables.block_sizes)
        shape = (len(self.plan.stages), len(self._block_sizes), self.max_num_tokens)
        self._slots = torch.full(shape, PAD_SLOT_ID, dtype=torch.int64, device=self.device)

    def prepare_attn(
        self,
        input_batch,
        cudagraph_mode: CUDAGraphMode,
        block_tables: tuple[Tensor, ...],
        slot_mappings: Tensor,
        attn_groups,
        kv_cache_config,
        for_capture: bool = False,
        **kwargs,
    ) -> dict[str, object]:
        def prepare(batch, slots, groups):
            return super(RoutedModelState, self).prepare_attn(
                batch, cudagraph_mode, block_tables, slots, groups, kv_cache_config, for_capture, **kwargs
            )

        self._next = None
        if self._groups is None:
            self._groups = split_by_stage(attn_groups, self.stages, self.vllm_config, self.device)
        metadata = prepare(input_batch, slot_mappings, attn_groups)
        is_dummy = not input_batch.prefill_len_np.any()  # no request stands behind it
        requests = self._requests_of(input_batch, is_dummy)
        shares = self._shares(input_batch, requests)
        starts = any(share.starts and share.is_routed for share in shares)
        if starts and cudagraph_mode != CUDAGraphMode.NONE:
            raise RuntimeError(f"a step in which a routed prompt starts must have no graph, got {cudagraph_mode}")
        slots_of_layer = {}
        for stage, groups in enumerate(self._groups):
            layout = stage_layout(shares, stage)
            batch = self._batch_of(stage, input_batch, layout, [share.deferred[stage] for share in shares])
            # If prompts start, nothing is padded; else the tokens behind the last one are, as in every layer.
            width = batch.num_tokens if starts else slot_mappings.shape[1]
            slots = self._slots[stage, :, :width].fill_(PAD_SLOT_ID)
            if not is_dummy:
                self._fill_slots(slots, batch, layout, block_tables)
            metadata |= prepare(batch, slots, groups)
            for number, of_number in enumerate(groups):
                slots_of_layer |= {name: slots[number] for group in of_number for name in group.layer_names}
        step = RoutedStep(self.plan, shares, [each.stretches for each in requests], self.device) if starts else None
        if cudagraph_mode != CUDAGraphMode.FULL:  # a graph has the addresses of the slots, and calls no forward
            self._next = Forward(slots_of_layer, step)
        return metadata

    def take_forward(self) -> Forward | None:
        """Take the changes prepared for the forward that begins; None if there are none."""
        taken, self._next = self._next, None
        return taken

    def keep_traces(self, step: RoutedStep) -> None:
        """Keep the selection of a step, if `trace` is set."""
        if self.settings.trace:
            self.traces |= {self._names[number]: trace for number, trace in step.traces().items()}

    def _requests_of(self, batch, is_dummy: bool) -> list[Request]:
        if is_dummy:
            return [Request("", 0, [], (0,) * len(self.plan.stages))] * batch.num_reqs
        requests = [self._requests[index] for index in batch.idx_mapping_np.tolist()]
        self._names = [request.name for request in requests]
        return requests

    @staticmethod
    def _shares(batch, requests: list[Request]) -> list[Share]:
        counts = zip(batch.num_computed_tokens_np.tolist(), batch.num_scheduled_tokens.tolist(), requests, strict=True)
        return [Share(computed, scheduled, each.prompt, each.deferred) for computed, scheduled, each in counts]

    def _batch_of(self, stage: int, batch, layout: StageLayout, deferred: list[int]):
        """The batch as the layers of a stage see it."""
        padded = batch.num_reqs_after_padding
        lengths = self._seq_lens[stage, :padded]
        less = async_tensor_h2d(deferred + [0] * (padded - len(deferred)), self.device, torch.int32)
        torch.sub(batch.seq_lens[:padded], less, out=lengths)
        bound = batch.seq_lens_cpu_upper_bound.clone()
        bound[: len(deferred)] = torch.from_numpy(layout.seq_lens)
        seen = replace(batch, seq_lens=lengths, seq_lens_cpu_upper_bound=bound)
        if np.array_equal(layout.query_lens, batch.num_scheduled_tokens):
            return seen
        starts = np.concatenate([[0], layout.query_lens.cumsum()]).astype(np.int32)
        return replace(
            seen,
            num_scheduled_tokens=layout.query_lens.astype(np.int32),
            num_tokens=int(starts[-1]),
            num_tokens_after_padding=int(starts[-1]),
            query_start_loc=async_tensor_h2d(starts, self.device),
            query_start_loc_np=starts,
            positions=async_tensor_h2d(layout.rows, self.device),
        )

    def _fill_slots(self, slots: Tensor, batch, layout: StageLayout, tables) -> None:
        """Write the cache slots of a stage's tokens into (groups, width), from the lengths on the device."""
        tokens = len(layout.requests)
        back = layout.rows - layout.seq_lens[layout.requests]
        requests, back = (async_tensor_h2d(each, self.device) for each in (layout.requests, back))
        rows = batch.seq_lens[requests] + back
        for number, size in enumerate(self._block_sizes):
            slots[number, :tokens] = tables[number][requests, rows // size].long() * size + rows % size
