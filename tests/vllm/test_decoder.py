"""Decisions project the keys of all tokens and the queries of those that rank, where the weight can be sliced."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm has an environment with it")

import torch
from torch import nn
from vllm import _custom_ops
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.lora.layers import QKVParallelLinearWithLoRA
from vllm.model_executor import parameter
from vllm.model_executor.layers import linear
from vllm.model_executor.layers.linear import QKVParallelLinear, UnquantizedLinearMethod

from reroute_kernels.vllm.decoder import LayerProjection, query_and_key_weights
from tests.vllm.engines import answers
from tests.vllm.test_engine import SCHEDULES, check, expected  # noqa: F401
from tests.vllm.unpacked import recorded, unpacked

CHANNELS, HEAD = 16, 4
ROUNDING = 1e-6
"""Relative, of a GEMM that sums 16 products of float32 in another order."""


@pytest.mark.parametrize(("name", "queries"), [("reroute", 1), ("three queries, most of a head", 3)])
def test_slices(engine, asked, expected, name, queries):  # noqa: F811
    with unpacked(), recorded() as decisions, engine(SCHEDULES[name]) as llm:
        check(answers(llm, asked), expected, name)
    assert len(decisions) == 3 * sum(bool(request.images) for request in asked)
    for decision in decisions:
        assert decision["queries"] == queries
        assert decision["flops"] == decision["needed"], "more was projected than ranks"
        assert not decision["whole"]


@pytest.mark.skipif(not _custom_ops._supports_onednn, reason="vLLM packs no weights here")
@pytest.mark.parametrize("family", ["llava"], indirect=True)
def test_packed_weights_are_not_sliced(engine, asked, expected):  # noqa: F811
    with recorded() as decisions, engine(SCHEDULES["reroute"]) as llm:
        check(answers(llm, asked), expected, "reroute")
    assert decisions
    assert all(decision["whole"] == 1 for decision in decisions)


@pytest.fixture
def attention(monkeypatch):
    """Makes attention with a fused projection of 8 query and 2 key heads, loaded by its rank; and the whole weights."""

    def make(ranks=1, rank=0, bias=True):
        for module in (linear, parameter):
            monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: ranks)
            monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda: rank)
        torch.manual_seed(0)
        with set_current_vllm_config(VllmConfig()), unpacked():
            fused = QKVParallelLinear(CHANNELS, HEAD, 8, 2, bias=bias)
            whole = {}
            for name, heads in {"q": 8, "k": 2, "v": 2}.items():
                whole[name] = torch.randn(heads * HEAD, CHANNELS), torch.randn(heads * HEAD)
                for mine, loaded in zip((fused.weight, fused.bias), whole[name], strict=True):
                    if mine is not None:
                        mine.weight_loader(mine, loaded, name)
            fused.quant_method.process_weights_after_loading(fused)
        sizes = {"q_size": fused.num_heads * HEAD, "kv_size": fused.num_kv_heads * HEAD}
        return SimpleNamespace(qkv_proj=fused, head_dim=HEAD, scaling=0.5, **sizes), whole

    return make


@pytest.mark.parametrize(
    ("ranks", "rank", "query_heads", "key_heads"),
    [(1, 0, range(8), range(2)), (2, 1, range(4, 8), [1]), (4, 1, [2, 3], [0]), (4, 3, [6, 7], [1])],
)
def test_rows_of_a_rank(attention, ranks, rank, query_heads, key_heads):
    """Of its own heads; four ranks have each of the two key heads twice."""
    mine, whole = attention(ranks, rank)
    fused = mine.qkv_proj
    weights = query_and_key_weights(mine, torch.zeros(1, CHANNELS))
    for got, name, heads in zip(weights, "qk", (query_heads, key_heads), strict=True):
        for part, of_all, of_rank in zip(got, whole[name], (fused.weight, fused.bias), strict=True):
            assert torch.equal(part.unflatten(0, (-1, HEAD)), of_all.unflatten(0, (-1, HEAD))[list(heads)])
            assert part.untyped_storage().data_ptr() == of_rank.untyped_storage().data_ptr(), "a copy"


def rotate(positions, query, key):
    """In place, as most of vLLM's rotary embeddings."""
    angles = positions.float().reshape(-1, positions.shape[-1]).sum(0)[:, None]
    return query.mul_(angles.cos()), key.mul_(angles.cos())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("axes", [1, 3])
@pytest.mark.parametrize("positions", [None, [[11]], [[-1, 4, 9, 11]]])
def test_equals_the_whole_projection(attention, bias, axes, positions):
    its, _ = attention(bias=bias)
    its.rotary_emb = rotate
    projection = LayerProjection(SimpleNamespace(self_attn=its, input_layernorm=nn.Identity()))
    hidden, places = torch.randn(1, 12, CHANNELS), torch.arange(12)[None]
    before = hidden.clone()
    rotary = (places if axes == 1 else torch.stack([places, places + 1, places * 2], dim=-1),)
    positions = None if positions is None else torch.tensor(positions)
    sliced, keys = projection.attention(hidden, rotary, None, positions, None), projection.keys(hidden, rotary, None)
    its.qkv_proj.register_forward_hook(lambda *args: None)
    assert query_and_key_weights(its, hidden[0]) is None
    whole = projection.attention(hidden, rotary, None, positions, None)
    queries = 1 if positions is None else positions.shape[1]
    assert sliced.query.shape == (1, queries, 8, HEAD)
    assert sliced.key.shape == (1, 12, 2, HEAD)
    torch.testing.assert_close(sliced.query, whole.query, rtol=ROUNDING, atol=ROUNDING)
    torch.testing.assert_close(sliced.key, whole.key, rtol=ROUNDING, atol=ROUNDING)
    assert torch.equal(sliced.query_index, whole.query_index)
    assert torch.equal(keys, sliced.key)
    assert torch.equal(hidden, before)


def normed(scale):
    """A norm of heads, as Qwen3 has them."""
    norm = nn.RMSNorm(HEAD)
    nn.init.constant_(norm.weight, scale)
    return norm


def test_heads_are_normed(attention):
    its, _ = attention()
    projection = LayerProjection(SimpleNamespace(self_attn=its, input_layernorm=nn.Identity()))
    hidden = torch.randn(1, 12, CHANNELS)
    plain = projection.attention(hidden, None, None, None, None)
    its.q_norm, its.k_norm = normed(2.0), normed(3.0)
    made = projection.attention(hidden, None, None, None, None)
    torch.testing.assert_close(made.query, its.q_norm(plain.query), rtol=ROUNDING, atol=ROUNDING)
    torch.testing.assert_close(made.key, its.k_norm(plain.key), rtol=ROUNDING, atol=ROUNDING)


class Quantized(UnquantizedLinearMethod):
    pass


class Indexed(QKVParallelLinear):
    pass


def put(**attributes):
    def change(fused, monkeypatch):
        for name, value in attributes.items():
            monkeypatch.setattr(fused, name, value)

    return change


def parameters(change):
    """Changes the tensors of weight and bias."""

    def changed(fused, monkeypatch):
        fused.weight, fused.bias = (nn.Parameter(change(each.data), False) for each in (fused.weight, fused.bias))

    return changed


@pytest.mark.parametrize(
    "change",
    [
        put(quant_method=Quantized()),
        put(__class__=Indexed),
        put(skip_bias_add=True),
        put(forward=lambda states: None),
        lambda fused, monkeypatch: fused.register_forward_pre_hook(lambda *args: None),
        lambda fused, monkeypatch: monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1"),
        parameters(lambda data: data[:0]),
        parameters(lambda data: data.t().contiguous()),
        parameters(lambda data: torch.cat([data, data])),
        parameters(lambda data: data.to(torch.float8_e4m3fn)),
        parameters(lambda data: data.to(torch.int8)),
        parameters(lambda data: data.to("meta")),
    ],
    ids=[
        "quantized",
        "a subclass",
        "bias kept apart",
        "another forward",
        "a hook",
        "batch invariance",
        "packed",
        "transposed",
        "more rows",
        "float8",
        "int8",
        "elsewhere",
    ],
)
def test_falls_back(attention, monkeypatch, change):
    its, _ = attention()
    states = torch.zeros(1, CHANNELS)
    assert query_and_key_weights(its, states) is not None
    change(its.qkv_proj, monkeypatch)
    assert query_and_key_weights(its, states) is None


def test_falls_back_with_lora(attention):
    its, _ = attention()
    its.qkv_proj = QKVParallelLinearWithLoRA(its.qkv_proj)
    assert query_and_key_weights(its, torch.zeros(1, CHANNELS)) is None


def test_falls_back_with_a_bias_of_another_dtype(attention):
    """As some of vLLM's CPU kernels have it."""
    its, _ = attention()
    its.qkv_proj.weight = nn.Parameter(its.qkv_proj.weight.data.bfloat16(), False)
    states = torch.zeros(1, CHANNELS, dtype=torch.bfloat16)
    assert query_and_key_weights(its, states) is None
    its.qkv_proj.bias = nn.Parameter(its.qkv_proj.bias.data.bfloat16(), False)
    assert query_and_key_weights(its, states) is not None
