"""The scheduler that own KV groups need: it tells their managers how many tokens each request leaves out."""

from __future__ import annotations

from vllm.v1.core.sched.scheduler import Scheduler

from .groups import StageManager
from .validate import check_config
from .visual import deferred_of


class RoutedScheduler(Scheduler):
    """vLLM's scheduler, whose blocks for a stage are counted for the tokens that run there."""

    def __init__(self, vllm_config, *args, **kwargs):
        _, self._plan = check_config(vllm_config)
        super().__init__(vllm_config, *args, **kwargs)
        for manager in self.kv_cache_manager.coordinator.single_type_managers:
            if isinstance(manager, StageManager):
                manager.deferred = self._deferred

    def _deferred(self, request_id: str) -> tuple[int, ...]:
        request = self.requests[request_id]
        return deferred_of(self._plan, request.mm_features, request.num_prompt_tokens, request.sampling_params)
