"""Scores: the reference against full attention, the kernels against the reference."""

from itertools import product

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import reroute_kernels as rk
from reroute_kernels.triton.plan import Plan, forget_plans
from tests.conftest import HAS_GPU

# Under the interpreter NumPy warns of an infinity or a NaN, which a GPU computes in silence.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

SHAPES = [
    pytest.param(*shape, id=name)
    for name, *shape in [
        # name, batch, length, queries, heads, kv heads, head_dim, rotary
        ("one-token", 1, 1, 1, 4, 4, 64, 64),
        ("as-many-queries-as-tokens", 2, 3, 3, 2, 1, 16, 16),
        ("length-63", 2, 63, 1, 4, 4, 64, 64),
        ("length-64", 1, 64, 1, 2, 2, 16, 16),
        ("length-65", 1, 65, 2, 2, 2, 16, 0),
        ("length-100-partly-rotary", 3, 100, 3, 4, 2, 80, 40),
        ("length-128", 1, 128, 1, 2, 1, 32, 32),
        ("length-129", 1, 129, 1, 2, 1, 32, 32),
        ("length-2000", 1, 2000, 1, 4, 1, 128, 128),
        ("length-9000", 1, 9000, 1, 1, 1, 16, 8),
        ("head-dim-16-no-rotary", 2, 63, 2, 8, 1, 16, 0),
        ("head-dim-24", 2, 63, 1, 4, 2, 24, 24),
        ("head-dim-24-rotary-2", 2, 20, 1, 4, 2, 24, 2),
        ("head-dim-80", 1, 100, 1, 4, 1, 80, 80),
        ("head-dim-96-rotary-72", 1, 63, 1, 2, 1, 96, 72),
        ("head-dim-256-rotary-64", 1, 63, 2, 4, 2, 256, 64),
        ("head-dim-256", 1, 40, 1, 2, 2, 256, 256),
        ("group-7", 1, 63, 1, 28, 4, 16, 16),
        ("group-8-three-queries", 1, 63, 3, 8, 1, 64, 64),
        ("more-heads-than-a-block", 2, 20, 2, 40, 40, 16, 16),
        ("128-heads-on-one-key-head", 1, 40, 1, 128, 1, 64, 64),
        ("128-heads", 1, 9, 1, 128, 128, 8, 8),
        ("64-samples", 64, 9, 1, 2, 1, 8, 8),
        ("length-131072", 1, 131072, 1, 2, 1, 4, 2),
        ("head-dim-192", 1, 40, 1, 2, 1, 192, 192),
        ("heads-no-power-of-two", 2, 20, 1, 6, 3, 16, 16),
    ]
]
REDUCTIONS = [
    pytest.param({"query_reduction": query, "head_reduction": head}, id=f"{query}-over-queries-{head}-over-heads")
    for query, head in product(("mean", "max"), repeat=2)
]

ROTARY_STYLES = ["rotate_half", "interleaved"]


def random_inputs(device, batch, length, queries, heads, kv_heads, head_dim, rotary, dtype=torch.float32):
    """Inputs whose attention is uneven, so that an error in one logit moves the scores."""

    def normal(*shape):
        return torch.randn(*shape, device=device).to(dtype)

    inputs = {"query": 3 * normal(batch, queries, heads, head_dim), "key": normal(batch, length, kv_heads, head_dim)}
    if rotary:
        # Four unrelated quarters: a swap of halves, or of cos and sin, cannot go unseen.
        inputs |= {"cos": normal(batch, length, rotary), "sin": normal(batch, length, rotary)}
    return inputs


def padding(device, length):
    """Three samples: padded on the left, on the right, and with holes."""
    positions = torch.arange(length, device=device)
    return torch.stack([positions >= length // 3, positions < length // 2, positions % 3 != 1])


def assert_scores_equal(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0, equal_nan=True)
    # Over thousands of tokens most scores are themselves below 1e-5.
    torch.testing.assert_close(actual, expected, atol=1e-9, rtol=2e-4, equal_nan=True)


def full_attention(query, key, cos, sin, key_mask, scale, interleaved):
    """Attention of a query at every position, in float64: [B, Hq, L, L]; nothing of it comes from the library."""

    def rotate(x):
        if cos is None:
            return x
        rotary = cos.shape[-1]
        x, rest = x.split((rotary, x.shape[-1] - rotary), dim=-1)
        if interleaved:
            partner = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
        else:
            first, second = x.chunk(2, dim=-1)
            partner = torch.cat((-second, first), -1)
        return torch.cat((x * cos.unsqueeze(2) + partner * sin.unsqueeze(2), rest), -1)

    batch, length, heads, _ = query.shape
    query = rotate(query).transpose(1, 2)
    key = rotate(key).repeat_interleave(heads // key.shape[2], dim=2).transpose(1, 2)
    visible = torch.ones(length, length, dtype=torch.bool, device=key.device).tril().expand(batch, 1, -1, -1)
    if key_mask is not None:
        visible = visible & key_mask[:, None, None, :]
    identity = torch.eye(length, dtype=key.dtype, device=key.device).expand(batch, heads, -1, -1)
    return scaled_dot_product_attention(query, key, identity, attn_mask=visible, scale=scale).nan_to_num(0.0)


def last_positions(key_mask, queries):
    rows = []
    for flags in key_mask.tolist():
        valid = [position for position, flag in enumerate(flags) if flag][-queries:]
        rows.append([-1] * (queries - len(valid)) + valid)
    return torch.tensor(rows, device=key_mask.device)


@pytest.mark.parametrize("reductions", REDUCTIONS)
@pytest.mark.parametrize("rotary_style", ROTARY_STYLES)
@pytest.mark.parametrize("masked", [False, True], ids=["no-mask", "padding"])
@pytest.mark.parametrize("placed", [False, True], ids=["last-queries", "queries-in-the-middle"])
@pytest.mark.parametrize(
    ("length", "queries", "heads", "kv_heads", "head_dim", "rotary", "scale"),
    [
        pytest.param(17, 1, 2, 2, 8, 8, None, id="one-query"),
        pytest.param(30, 3, 6, 2, 12, 4, 0.11, id="group-3-partly-rotary"),
        pytest.param(9, 2, 4, 1, 16, 0, None, id="group-4-no-rotary"),
        pytest.param(700, 2, 2, 1, 8, 8, None, id="length-700"),
    ],
)
def test_reference_reads_rows_of_full_attention(
    device, length, queries, heads, kv_heads, head_dim, rotary, scale, placed, masked, rotary_style, reductions
):
    batch = 3
    inputs = random_inputs(device, batch, length, length, heads, kv_heads, head_dim, rotary)
    key_mask = padding(device, length) if masked else None
    attention = full_attention(
        *(inputs[name].double() if name in inputs else None for name in ("query", "key", "cos", "sin")),
        key_mask,
        head_dim**-0.5 if scale is None else scale,
        rotary_style == "interleaved",
    )
    if placed:
        query_index = torch.stack([torch.randperm(length, device=device)[:queries] for _ in range(batch)])
        rows = query_index
    else:
        query_index = None
        everywhere = torch.ones(batch, length, dtype=torch.bool, device=device)
        rows = last_positions(everywhere if key_mask is None else key_mask, queries)
    assert (rows >= 0).all()
    sample = torch.arange(batch, device=device)[:, None]
    expected = attention.transpose(1, 2)[sample, rows]  # [B, Q, Hq, L]
    expected = expected.mean(1) if reductions["query_reduction"] == "mean" else expected.amax(1)
    expected = expected.mean(1) if reductions["head_reduction"] == "mean" else expected.amax(1)

    inputs["query"] = inputs["query"][sample, rows]
    options = {"scale": scale, "rotary_style": rotary_style, **reductions}
    scores = rk.ref.rank_tokens(**inputs, key_mask=key_mask, query_index=query_index, **options)
    torch.testing.assert_close(scores, expected.float(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("batch", "length", "queries", "heads", "kv_heads", "head_dim", "rotary", "rotary_style"),
    [
        pytest.param(
            *shape.values,
            style,
            id=f"{shape.id}-{style}",
            marks=pytest.mark.rest if shape.id == "length-131072" else (),
        )
        for shape in SHAPES
        for style in ROTARY_STYLES
        if (shape.id, style) != ("length-131072", "interleaved")  # seconds for what length-9000 checks, too
    ],
)
def test_triton_matches_reference(
    device, batch, length, queries, heads, kv_heads, head_dim, rotary, rotary_style, launches
):
    inputs = random_inputs(device, batch, length, queries, heads, kv_heads, head_dim, rotary)
    scores = rk.triton.rank_tokens(**inputs, rotary_style=rotary_style)
    assert [name for name, _ in launches] == ["attention_logits", "reduce_attention"]
    assert_scores_equal(scores, rk.ref.rank_tokens(**inputs, rotary_style=rotary_style))


GROUPED_SHAPES = [
    # batch, length, queries, heads, kv heads, head_dim, rotary
    pytest.param(2, 100, 1, 7, 1, 128, 128, id="seven-rows"),
    pytest.param(1, 70, 3, 4, 1, 24, 12, id="twelve-rows-partly-rotary"),
    pytest.param(1, 45, 30, 4, 2, 64, 64, id="sixty-rows"),
    pytest.param(1, 40, 33, 4, 1, 32, 0, id="more-rows-than-a-block"),
]


@pytest.fixture(params=[True, False], ids=["tensor-cores", "no-tensor-cores"])
def has_tensor_cores(request, monkeypatch):
    forget_plans()
    monkeypatch.setattr(Plan, "is_cuda", request.param)
    yield request.param
    forget_plans()


@pytest.mark.parametrize("rotary_style", ROTARY_STYLES)
@pytest.mark.parametrize(("batch", "length", "queries", "heads", "kv_heads", "head_dim", "rotary"), GROUPED_SHAPES)
@pytest.mark.skipif(HAS_GPU, reason="the device decides")
def test_grouped_queries_with_and_without_tensor_cores(
    device, has_tensor_cores, batch, length, queries, heads, kv_heads, head_dim, rotary, rotary_style, products
):
    inputs = random_inputs(device, batch, length, queries, heads, kv_heads, head_dim, rotary)
    arguments = {
        "key_mask": torch.rand(batch, length) < 0.8,
        "query_index": torch.randint(-1, length, (batch, queries)),
        "past_key": torch.randn(batch, 50, kv_heads, head_dim),
        "rotary_style": rotary_style,
    }
    assert_scores_equal(rk.triton.rank_tokens(**inputs, **arguments), rk.ref.rank_tokens(**inputs, **arguments))
    assert (products.count > 0) == has_tensor_cores


class Products:
    """Products of matrices in Triton's interpreter, which reads their operands as tensor cores do: in TF32."""

    def __init__(self):
        self.count = 0

    def cut(self, handle):
        assert handle.data.dtype == np.float32
        return type(handle)((handle.data.view(np.uint32) & 0xFFFFE000).view(np.float32), handle.dtype)


@pytest.fixture
def products(monkeypatch):
    from triton.runtime.interpreter import InterpreterBuilder

    seen = Products()
    multiply = InterpreterBuilder.create_dot

    def create_dot(builder, a, b, *rest):
        seen.count += 1
        return multiply(builder, seen.cut(a), seen.cut(b), *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
    return seen


@pytest.mark.parametrize("amplitude", [1, 10, 30])
@pytest.mark.parametrize("length", [37, 640])
@pytest.mark.skipif(HAS_GPU, reason="looks into Triton's interpreter")
def test_tensor_cores_lose_nothing(device, amplitude, length, products):
    inputs = random_inputs(device, 2, length, 1, 8, 1, 128, 128)
    rotate, tables = (
        rk.ref.rank.ROTATIONS["rotate_half"],
        [inputs[name].double()[:, :, None] for name in ("cos", "sin")],
    )
    key = rotate(inputs["key"].double(), *tables)
    query = rotate(inputs["query"].double(), *(table[:, -1:] for table in tables))
    logits = torch.einsum("bqhd,blgd->bhl", query, key)
    scale = amplitude / logits.abs().max().item()
    scores = rk.triton.rank_tokens(**inputs, scale=scale)
    torch.testing.assert_close(scores.double(), (logits * scale).softmax(-1).mean(1), atol=1e-6, rtol=0)
    assert products.count > 0


def test_rotary_styles_differ(device, operations):
    inputs = random_inputs(device, 1, 40, 1, 2, 2, 16, 16)
    scores = [operations.rank_tokens(**inputs, rotary_style=style) for style in ROTARY_STYLES]
    assert not torch.allclose(*scores, atol=1e-3)


@pytest.mark.parametrize("reductions", [REDUCTIONS[0], REDUCTIONS[-1]])
@pytest.mark.parametrize("rotary_style", ROTARY_STYLES)
@pytest.mark.parametrize(("past", "masked"), [(1, False), (63, True), (170, False)])
def test_past_keys_count_as_if_they_stood_before_the_new_ones(
    device, operations, past, masked, rotary_style, reductions
):
    inputs = random_inputs(device, 3, 70, 2, 4, 2, 24, 12)
    options = {"rotary_style": rotary_style, **reductions}
    key_mask = padding(device, 70) if masked else None
    past_mask = padding(device, past) if masked else None
    query_index = torch.tensor([[69, 50], [0, -1], [5, 5]], device=device)
    whole = random_inputs(device, 3, past + 70, 2, 4, 2, 24, 12)
    for name in ("key", "cos", "sin"):
        whole[name][:, past:] = inputs[name]
    whole["query"] = inputs["query"]
    past_key = rk.ref.rank.ROTATIONS[rotary_style](
        whole["key"][:, :past], whole["cos"][:, :past, None], whole["sin"][:, :past, None]
    )
    expected = rk.ref.rank_tokens(
        **whole,
        key_mask=torch.cat([past_mask, key_mask], dim=1) if masked else None,
        query_index=torch.where(query_index < 0, -1, query_index + past),
        **options,
    )[:, past:]
    arguments = {"key_mask": key_mask, "query_index": query_index, "past_key": past_key, "past_mask": past_mask}
    scores = operations.rank_tokens(**inputs, **arguments, **options)
    assert_scores_equal(scores, expected)
    without = operations.rank_tokens(**inputs, **arguments | {"past_key": None, "past_mask": None}, **options)
    assert not torch.allclose(scores, without, atol=1e-3)


def test_past_keys_are_read_where_they_are(device, launches, layout):
    inputs = random_inputs(device, 2, 70, 2, 4, 2, 24, 12)
    past_key = layout(torch.randn(2, 90, 2, 24, device=device))
    past_mask = layout(torch.rand(2, 90, device=device) < 0.7)
    scores = rk.triton.rank_tokens(**inputs, past_key=past_key, past_mask=past_mask)
    assert [name for name, _ in launches] == ["attention_logits", "reduce_attention"]
    expected = rk.ref.rank_tokens(**inputs, past_key=past_key.contiguous(), past_mask=past_mask.contiguous())
    assert_scores_equal(scores, expected)


def test_no_past_at_all(device, operations):
    inputs = random_inputs(device, 2, 70, 2, 4, 2, 16, 16)
    nothing = torch.empty(2, 0, 2, 16, device=device)
    mask = torch.empty(2, 0, dtype=torch.bool, device=device)
    scores = operations.rank_tokens(**inputs, past_key=nothing, past_mask=mask)
    assert torch.equal(scores, operations.rank_tokens(**inputs))


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan], ids=str)
def test_special_values_in_the_past(device, value):
    inputs = random_inputs(device, 2, 70, 2, 4, 2, 16, 16)
    past_key = torch.randn(2, 90, 2, 16, device=device)
    past_key[0, 3:50, 1, 5] = value
    scores = rk.triton.rank_tokens(**inputs, past_key=past_key)
    assert_scores_equal(scores, rk.ref.rank_tokens(**inputs, past_key=past_key))
    hidden = torch.ones(2, 90, dtype=torch.bool, device=device)
    hidden[0, 3:50] = False
    scores = rk.triton.rank_tokens(**inputs, past_key=past_key, past_mask=hidden)
    assert torch.isfinite(scores).all()


def test_memory_of_a_ranking(device, monkeypatch):
    """Floats for every query, head and token; nothing grows with the square of the sequence, nor with the past."""
    allocated = []
    empty = torch.empty

    def counted(*size, **options):
        tensor = empty(*size, **options)
        allocated.append(tensor.numel() * tensor.element_size())
        return tensor

    monkeypatch.setattr(torch, "empty", counted)
    inputs = random_inputs(device, 2, 300, 1, 4, 2, 16, 16)
    past_key = torch.randn(2, 900, 2, 16, device=device)
    allocated.clear()
    rk.triton.rank_tokens(**inputs, past_key=past_key)
    logits, splits, scores = 2 * 4 * 300 * 4, 2 * 4 * 65 * 4, 2 * 300 * 4
    assert sum(allocated) <= logits + 2 * splits + scores


@pytest.mark.parametrize("table_dtype", [None, torch.float32], ids=["tables-alike", "tables-float32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_dtypes(device, dtype, table_dtype):
    inputs = random_inputs(device, 2, 100, 2, 4, 2, 64, 48, dtype)
    if table_dtype is not None:
        inputs |= {name: inputs[name].to(table_dtype) for name in ("cos", "sin")}
    scores = rk.triton.rank_tokens(**inputs)
    assert_scores_equal(scores, rk.ref.rank_tokens(**inputs))
    # Both widen before they compute, so that nothing is rounded to the input's dtype on the way.
    widened = {name: tensor.float() for name, tensor in inputs.items()}
    assert_scores_equal(scores, rk.ref.rank_tokens(**widened))


@pytest.mark.parametrize("reductions", REDUCTIONS)
@pytest.mark.parametrize("masked", [False, True], ids=["no-mask", "padding"])
def test_reductions(device, masked, reductions):
    inputs = random_inputs(device, 3, 70, 3, 6, 2, 16, 16)
    inputs["key_mask"] = padding(device, 70) if masked else None
    assert_scores_equal(rk.triton.rank_tokens(**inputs, **reductions), rk.ref.rank_tokens(**inputs, **reductions))


@pytest.mark.parametrize("scale", [0.0, 0.05, -0.2, 1.0])
def test_scale(device, scale):
    inputs = random_inputs(device, 2, 70, 1, 2, 2, 16, 16)
    assert_scores_equal(rk.triton.rank_tokens(**inputs, scale=scale), rk.ref.rank_tokens(**inputs, scale=scale))


@pytest.mark.parametrize("name", ["query", "key", "cos", "sin"])
def test_layouts(device, layout, name):
    # Neither the rotated half nor the rest is a power of two: blocks are wider than the part that they may read.
    inputs = random_inputs(device, 2, 70, 2, 4, 2, 24, 12)
    inputs[name] = layout(inputs[name])
    dense = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in inputs.items()}
    expected = rk.ref.rank_tokens(**dense)
    assert_scores_equal(rk.triton.rank_tokens(**inputs), expected)
    assert_scores_equal(rk.ref.rank_tokens(**inputs), expected)


def test_layouts_of_mask_and_index(device, layout):
    inputs = random_inputs(device, 3, 70, 2, 4, 2, 16, 16)
    key_mask = layout(padding(device, 70))
    query_index = layout(torch.tensor([[69, 30], [34, 5], [2, 69]], device=device))
    expected = rk.ref.rank_tokens(**inputs, key_mask=key_mask.contiguous(), query_index=query_index.contiguous())
    scores = rk.triton.rank_tokens(**inputs, key_mask=key_mask, query_index=query_index)
    assert_scores_equal(scores, expected)


@pytest.mark.parametrize("name", ["query", "key", "cos", "sin", "past_key", "key_mask", "past_mask"])
def test_rows_far_apart(device, far_apart, name):
    inputs = {
        "query": torch.randn(1, 4, 1, 16, device=device).half(),
        "key": torch.randn(1, 4, 1, 16, device=device).half(),
        "cos": torch.randn(1, 4, 16, device=device).half(),
        "sin": torch.randn(1, 4, 16, device=device).half(),
        "past_key": torch.randn(1, 4, 1, 16, device=device).half(),
        "key_mask": torch.tensor([[True, False, True, True]], device=device),
        "past_mask": torch.tensor([[False, True, True, True]], device=device),
        "query_index": torch.arange(4, device=device)[None],
    }
    near = inputs[name]
    far = far_apart(near[0, 0].numel(), near.dtype).view(near.shape)
    far.copy_(near)
    assert far.stride(1) == 2**30
    scores = rk.triton.rank_tokens(**inputs | {name: far})
    assert_scores_equal(scores, rk.ref.rank_tokens(**inputs))


def test_one_table_for_all_samples(device):
    inputs = random_inputs(device, 3, 70, 2, 4, 2, 16, 16)
    shared = inputs | {name: inputs[name][:1] for name in ("cos", "sin")}
    repeated = inputs | {name: inputs[name][:1].repeat(3, 1, 1) for name in ("cos", "sin")}
    expected = rk.ref.rank_tokens(**repeated)
    assert_scores_equal(rk.triton.rank_tokens(**shared), expected)
    assert_scores_equal(rk.ref.rank_tokens(**shared), expected)


def test_padding_and_what_it_hides_do_not_count(device, operations):
    inputs = random_inputs(device, 3, 70, 2, 4, 2, 16, 16)
    key_mask = padding(device, 70)
    scores = operations.rank_tokens(**inputs, key_mask=key_mask)
    assert (scores[~key_mask] == 0).all()
    torch.testing.assert_close(scores.sum(1), torch.ones(3, device=device))
    # Padding may hold anything.
    inputs["key"][~key_mask] = torch.nan
    inputs["cos"][~key_mask] = torch.inf
    assert torch.equal(operations.rank_tokens(**inputs, key_mask=key_mask), scores)


@pytest.mark.parametrize("first", [0, 20, 40], ids=["left", "middle", "right"])
def test_a_padded_sample_scores_as_the_sample_alone(device, operations, first):
    alone = random_inputs(device, 1, 30, 2, 4, 2, 16, 16)
    padded = {"query": alone["query"]} | {
        name: torch.full((1, 70, *alone[name].shape[2:]), 9.0, device=device) for name in ("key", "cos", "sin")
    }
    key_mask = torch.zeros(1, 70, dtype=torch.bool, device=device)
    key_mask[:, first : first + 30] = True
    for name in ("key", "cos", "sin"):
        padded[name][:, first : first + 30] = alone[name]
    scores = operations.rank_tokens(**padded, key_mask=key_mask)
    assert_scores_equal(scores[:, first : first + 30], operations.rank_tokens(**alone))


def test_queries_see_no_later_key(device, operations):
    inputs = random_inputs(device, 2, 200, 2, 4, 2, 16, 16)
    query_index = torch.tensor([[150, 70], [0, 129]], device=device)
    scores = operations.rank_tokens(**inputs, query_index=query_index)
    assert (scores[0, :151] > 0).all()
    assert (scores[0, 151:] == 0).all()
    assert (scores[1, :130] > 0).all()
    assert (scores[1, 130:] == 0).all()
    for sample, last in enumerate((150, 129)):
        inputs["key"][sample, last + 1 :] = torch.nan
    assert torch.equal(operations.rank_tokens(**inputs, query_index=query_index), scores)


@pytest.mark.parametrize("reductions", REDUCTIONS)
def test_queries_in_the_middle(device, reductions):
    inputs = random_inputs(device, 3, 140, 3, 4, 2, 16, 12)
    arguments = {
        "key_mask": padding(device, 140),
        # Out of order, on padding, twice the same, before every visible key.
        "query_index": torch.tensor([[139, 50, 130], [0, 120, 69], [5, 5, 1]], device=device),
    }
    scores = rk.triton.rank_tokens(**inputs, **arguments, **reductions)
    assert_scores_equal(scores, rk.ref.rank_tokens(**inputs, **arguments, **reductions))


@pytest.mark.parametrize("reductions", REDUCTIONS)
def test_sample_with_fewer_tokens_than_queries(device, reductions):
    inputs = random_inputs(device, 4, 70, 3, 4, 2, 16, 16)
    key_mask = torch.zeros(4, 70, dtype=torch.bool, device=device)
    key_mask[0, 40:42] = True
    key_mask[1, :1] = True
    key_mask[3] = True
    scores = rk.triton.rank_tokens(**inputs, key_mask=key_mask, **reductions)
    assert_scores_equal(scores, rk.ref.rank_tokens(**inputs, key_mask=key_mask, **reductions))
    assert (scores[2] == 0).all()
    if reductions == {"query_reduction": "mean", "head_reduction": "mean"}:
        # Of three queries two, one, none and all have a place; the others pay no attention.
        assert_scores_equal(scores.sum(1), torch.tensor([2 / 3, 1 / 3, 0, 1], device=device))


def test_query_without_a_place(device, operations):
    inputs = random_inputs(device, 1, 20, 2, 2, 2, 16, 16)
    both = operations.rank_tokens(**inputs, query_index=torch.tensor([[-1, 12]], device=device))
    inputs["query"] = inputs["query"][:, 1:]
    one = operations.rank_tokens(**inputs, query_index=torch.tensor([[12]], device=device))
    assert_scores_equal(both, one / 2)


def test_equal_keys_tie(device):
    """Else rounding, not position, would decide between them."""
    query, key = torch.randn(1, 1, 2, 16, device=device), torch.randn(1, 1, 2, 16, device=device)
    scores = rk.triton.rank_tokens(query, key.expand(1, 300, 2, 16))
    assert_scores_equal(scores, torch.full((1, 300), 1 / 300, device=device))
    assert scores.unique().numel() == 1


@pytest.mark.parametrize(
    "factor", [1e-40, 1e4, -1e4, torch.inf, -torch.inf, torch.nan], ids=["tiny", "1e4", "-1e4", "inf", "-inf", "nan"]
)
@pytest.mark.parametrize("reductions", REDUCTIONS)
def test_special_values_in_a_key(device, factor, reductions):
    inputs = random_inputs(device, 2, 200, 2, 4, 2, 16, 0)
    inputs["key"][0, 130, 1] *= factor
    scores = rk.triton.rank_tokens(**inputs, **reductions)
    expected = rk.ref.rank_tokens(**inputs, **reductions)
    assert_scores_equal(scores, expected)
    assert torch.isfinite(scores[1]).all()
    assert scores[0].isnan().any().item() == (not torch.isfinite(torch.tensor(factor)).item())


@pytest.mark.parametrize("reductions", REDUCTIONS)
@pytest.mark.parametrize("place", [(0, 0), (1, 0), (0, 2), (1, 3)], ids=str)
def test_a_nan_is_not_lost_whichever_query_or_head_has_it(device, operations, place, reductions):
    query, key = torch.randn(1, 2, 4, 16, device=device), torch.randn(1, 70, 4, 16, device=device)
    query[0, place[0], place[1]] = torch.nan
    scores = operations.rank_tokens(query, key, **reductions)
    last = 69 - 1 + place[0]  # of the tokens that this query sees
    assert scores[0, : last + 1].isnan().all()
    assert not scores[0, last + 1 :].isnan().any()


def test_a_place_behind_the_last_token_is_that_of_the_last(device, operations):
    inputs = random_inputs(device, 1, 20, 2, 2, 2, 16, 16)
    scores = operations.rank_tokens(**inputs, query_index=torch.tensor([[5, 400]], device=device))
    expected = operations.rank_tokens(**inputs, query_index=torch.tensor([[5, 19]], device=device))
    assert torch.equal(scores, expected)


@pytest.mark.parametrize(
    ("first", "last"), [(0, 1), (0, 200), (0, 128), (130, 200)], ids=["one", "all", "first-split", "last-keys"]
)
@pytest.mark.parametrize("place", [0, 199], ids=["first-query", "last-query"])
def test_a_logit_of_minus_infinity_gets_no_attention(device, operations, first, last, place):
    query, key = torch.ones(1, 1, 1, 16, device=device), torch.zeros(1, 200, 1, 16, device=device)
    key[:, first:last, :, 0] = -torch.inf
    scores = operations.rank_tokens(query, key, query_index=torch.tensor([[place]], device=device))
    positions = torch.arange(200, device=device)
    attended = (positions <= place) & ((positions < first) | (positions >= last))
    assert_scores_equal(scores, attended.float()[None] / max(1, int(attended.sum())))


def test_logits_that_overflow_exp(device, operations):
    query = torch.full((1, 1, 1, 16), 1e3, device=device)
    key = torch.zeros(1, 200, 1, 16, device=device)
    key[0, 7] = 1e3
    key[0, 150] = -1e3
    scores = operations.rank_tokens(query, key)
    expected = torch.zeros(1, 200, device=device)
    expected[0, 7] = 1
    assert torch.equal(scores, expected)


def test_no_samples_and_no_tokens(device, operations, launches):
    query, key = torch.ones(0, 1, 4, 16, device=device), torch.ones(0, 30, 2, 16, device=device)
    scores = operations.rank_tokens(query, key)
    assert (scores.shape, scores.dtype) == ((0, 30), torch.float32)
    query, key = torch.ones(2, 1, 4, 16, device=device), torch.ones(2, 0, 2, 16, device=device)
    query_index = torch.full((2, 1), -1, device=device)
    for tables in ((), (torch.ones(1, 0, 16, device=device),) * 2):
        scores = operations.rank_tokens(query, key, *tables, query_index=query_index)
        assert (scores.shape, scores.dtype) == ((2, 0), torch.float32)
    assert launches == []


def test_two_launches(device, launches):
    rk.triton.rank_tokens(**random_inputs(device, 2, 300, 2, 4, 2, 16, 16))
    assert [name for name, _ in launches] == ["attention_logits", "reduce_attention"]
    assert all(min(grid) > 0 for _, grid in launches)


def test_same_bits_twice(device):
    inputs = random_inputs(device, 2, 300, 2, 4, 2, 16, 16)
    assert torch.equal(rk.triton.rank_tokens(**inputs), rk.triton.rank_tokens(**inputs))


def test_samples_do_not_depend_on_each_other(device):
    inputs = random_inputs(device, 3, 140, 2, 4, 2, 16, 16)
    inputs["key_mask"] = padding(device, 140)
    scores = rk.triton.rank_tokens(**inputs)
    order = torch.tensor([2, 0, 1], device=device)
    assert torch.equal(rk.triton.rank_tokens(**{name: x[order] for name, x in inputs.items()}), scores[order])
    for sample in range(3):
        alone = rk.triton.rank_tokens(**{name: x[sample : sample + 1] for name, x in inputs.items()})
        assert torch.equal(alone[0], scores[sample])


def test_inputs_stay_as_they_were(device, operations):
    inputs = random_inputs(device, 2, 70, 2, 4, 2, 16, 16) | {"key_mask": padding(device, 70)[:2]}
    before = {name: tensor.clone() for name, tensor in inputs.items()}
    operations.rank_tokens(**inputs)
    assert all(torch.equal(inputs[name], before[name]) for name in inputs)
