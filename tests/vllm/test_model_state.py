"""The state beside a model under the model runner V2: batches as graphs pad them, which an engine on a CPU never has.

test_runner_v2.py runs it with that runner.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm has an environment with it")

import torch
from vllm.config import CUDAGraphMode
from vllm.v1.attention.backends.utils import PAD_SLOT_ID
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_states import default
from vllm.v1.worker.utils import AttentionGroup

from reroute_kernels.vllm import Plan, Settings
from reroute_kernels.vllm.groups import split_by_stage
from reroute_kernels.vllm.model_state import Request, RoutedModelState


def batch_of(names, indices, computed, scheduled, prompt, padded_requests=None, padded_tokens=None):
    """An `InputBatch`, with the fields that `prepare_attn` reads."""
    requests, tokens = len(names), int(sum(scheduled))
    computed, scheduled = np.array(computed, dtype=np.int32), np.array(scheduled, dtype=np.int32)
    padded_requests, padded_tokens = padded_requests or requests, padded_tokens or tokens
    starts = np.full(padded_requests + 1, tokens, dtype=np.int32)
    starts[: requests + 1] = [0, *scheduled.cumsum()]
    lengths = torch.zeros(padded_requests, dtype=torch.int32)
    lengths[:requests] = torch.from_numpy(computed + scheduled)
    unused = dict.fromkeys(InputBatch.__dataclass_fields__)
    return InputBatch(
        **unused
        | {
            "req_ids": names,
            "num_reqs": requests,
            "num_reqs_after_padding": padded_requests,
            "idx_mapping_np": np.array(indices),
            "num_scheduled_tokens": scheduled,
            "num_tokens": tokens,
            "num_tokens_after_padding": padded_tokens,
            "query_start_loc": torch.from_numpy(starts),
            "query_start_loc_np": starts,
            "seq_lens": lengths,
            "seq_lens_cpu_upper_bound": lengths.clone(),
            "num_computed_tokens_np": computed,
            "prefill_len_np": np.array(prompt, dtype=np.int32),
            "is_prefilling_np": computed < np.array(prompt),
        }
    )


@pytest.fixture
def state(monkeypatch):
    """A state without a model: three stages of a layer each, behind one, in blocks of four."""
    policy = Settings.of({"schedule": "1:0.5,2:0.25,3:0.25"})
    made = object.__new__(RoutedModelState)
    made.settings, made.plan = policy, Plan(policy.policy, 4)
    made.stages = {f"layer {number}": number - 1 for number in (1, 2, 3)}
    made.device, made.max_num_reqs, made.max_num_tokens = torch.device("cpu"), 4, 16
    made.traces, made._requests, made._next = {}, {}, None
    made._groups = [[[SimpleNamespace(layer_names=[name])]] for name in made.stages]
    made._seq_lens = torch.zeros(3, 4, dtype=torch.int32)
    made._block_sizes = [4]
    made._slots = torch.full((3, 1, 16), PAD_SLOT_ID)
    seen = []

    def prepare_attn(self, batch, mode, tables, slots, groups, *args, **kwargs):
        seen.append(batch)
        return {}

    monkeypatch.setattr(default.DefaultModelState, "prepare_attn", prepare_attn)
    return made, seen


def test_padded_decode_steps(state):
    """As graphs pad them: requests behind the last one have length 0, and tokens behind it no slot."""
    made, seen = state
    made._requests[2] = Request("routed", 10, [(0, 7)], (4, 6, 6))
    made._requests[0] = Request("text", 5, [], (0, 0, 0))
    tables = (torch.arange(16, dtype=torch.int32).view(4, 4),)
    batch = batch_of(["routed", "text"], [2, 0], [10, 5], [1, 1], [10, 5], padded_requests=4, padded_tokens=4)
    made.prepare_attn(batch, CUDAGraphMode.NONE, tables, torch.zeros(1, 4), [[]], None)
    assert [each.seq_lens.tolist() for each in seen] == [[11, 6, 0, 0], [7, 6, 0, 0], [5, 6, 0, 0], [5, 6, 0, 0]]
    assert all(each.query_start_loc is batch.query_start_loc for each in seen)
    slots = {name: slots.tolist() for name, slots in made.take_forward().slots.items()}
    # Position 10 of the first is row 6 of its second block, then row 4; position 5 of the other stays in its second.
    assert slots == {
        "layer 1": [1 * 4 + 2, 5 * 4 + 1, PAD_SLOT_ID, PAD_SLOT_ID],
        "layer 2": [1 * 4 + 0, 5 * 4 + 1, PAD_SLOT_ID, PAD_SLOT_ID],
        "layer 3": [1 * 4 + 0, 5 * 4 + 1, PAD_SLOT_ID, PAD_SLOT_ID],
    }
    assert made.take_forward() is None
    made.prepare_attn(batch, CUDAGraphMode.FULL, tables, torch.zeros(1, 4), [[]], None)
    assert made.take_forward() is None, "a graph calls no forward"
    assert made._slots[0, 0, :4].tolist() == slots["layer 1"]


def test_dummy_batches_defer_nothing(state):
    made, seen = state
    made._requests[0] = Request("routed", 10, [(0, 7)], (4, 6, 6))
    batch = batch_of(["dummy"], [0], [0], [1], [0])
    made.prepare_attn(batch, CUDAGraphMode.NONE, (torch.zeros(1, 4),), torch.zeros(1, 1), [[]], None, for_capture=True)
    assert [each.seq_lens.tolist() for each in seen] == [[1]] * 4
    forward = made.take_forward()
    assert forward.step is None
    assert [slots.tolist() for slots in forward.slots.values()] == [[PAD_SLOT_ID]] * 3


def test_a_routed_prompt_in_a_graph_is_refused(state):
    made, _ = state
    made._requests[0] = Request("routed", 10, [(0, 7)], (4, 6, 6))
    batch = batch_of(["routed"], [0], [0], [10], [10])
    with pytest.raises(RuntimeError, match="must have no graph"):
        made.prepare_attn(batch, CUDAGraphMode.FULL, (torch.zeros(1, 4),), torch.zeros(1, 10), [[]], None)


def test_each_stage_has_builders_of_its_own(monkeypatch):
    """A builder that keeps its last result must not build for two stages."""

    class Builder:
        def __init__(self, size, workspace=None):
            self.kv_cache_spec, self.workspace = SimpleNamespace(block_size=size), workspace

        def _get_workspace_buffer(self):
            return self.workspace

        def set_workspace_buffer(self, workspace):
            self.workspace = workspace

    def create(group, config, device, kernel_block_size):
        group.metadata_builders = [Builder(kernel_block_size)]

    monkeypatch.setattr(AttentionGroup, "create_metadata_builders", create)
    names, shared = ["first", "a", "b", "c", "last"], Builder(16, "workspace")
    group = AttentionGroup(None, names, None, 0, kernel_block_stride=3, metadata_builders=[shared])
    stages = {"a": 0, "b": 0, "c": 1, "last": 1}
    split = split_by_stage([[group], []], stages, None, None)
    assert [[[each.layer_names for each in of] for of in groups] for groups in split] == [
        [[["a", "b"]], []],
        [[["c", "last"]], []],
    ]
    own = [groups[0][0] for groups in split]
    builders = [each.get_metadata_builder(0) for each in own]
    assert len({*map(id, builders), id(shared)}) == 3
    assert [(each.kv_cache_spec.block_size, each.workspace) for each in builders] == [(16, "workspace")] * 2
    assert [each.kernel_block_stride for each in own] == [3, 3]
