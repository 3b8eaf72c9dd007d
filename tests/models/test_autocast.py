"""Prompts under autocast: the model's own products are in half precision, ranking and selection in float32."""

import pytest
import torch

import reroute_kernels as rk
from reroute_kernels.rankings import AllText, KeyNorm, LastQuery
from tests.models.prompts import ACTIONS, batch, selections
from tests.models.slow_way import decoder_of, mixed_axes, rotated
from tests.models.test_defaults import GREEDY, RANKINGS
from tests.models.test_reducers import LLAVA, QWEN

DTYPES = (torch.bfloat16, torch.float16)


@pytest.mark.everyday(3)
@pytest.mark.parametrize("reduces", [False, True], ids=["no reducer", "reducer"])
@pytest.mark.parametrize("action", ACTIONS)
@torch.no_grad()
def test_every_ranking(model, family, prompt, action, reduces):
    inputs = batch([prompt(2, 3, 8, seed=2), prompt(1, 5, 6, seed=1)])
    reducer = {"llava": LLAVA, "qwen2_5_vl": QWEN}[family] if reduces else None
    for ranking in RANKINGS:
        policy = rk.Policy([rk.Stage(2, 0.4), rk.Stage(5, 0.2)], action, ranking, reducer=reducer)
        counts = set()
        for dtype in (None, *DTYPES):
            with rk.apply(model, policy) as routing, torch.autocast("cpu", dtype, enabled=dtype is not None):
                answer = model.generate(**inputs, **GREEDY, return_dict_in_generate=True, output_logits=True)
                trace = routing.trace
            assert torch.stack(answer.logits).isfinite().all()
            assert {scores.dtype for stage in trace.stages for scores in stage.scores} == {torch.float32}
            counts.add(tuple(len(positions) for row in (0, 1) for positions in selections(trace, row)))
        assert len(counts) == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("action", ACTIONS)
@torch.no_grad()
def test_keeping_all_equals_the_unrouted_model(model, others, action, dtype):
    with torch.autocast("cpu", dtype):
        expected = model(**others).logits
        for ranking in RANKINGS:
            with rk.apply(model, rk.Policy([rk.Stage(2, 1.0), rk.Stage(5, 1.0)], action, ranking)):
                assert torch.equal(model(**others).logits, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ranking", [LastQuery(), AllText(head_reduction="max"), KeyNorm()], ids=repr)
@torch.no_grad()
def test_scores_are_those_of_the_projections_in_float32(model, others, ranking, dtype):
    decoder, made = decoder_of(model), {"q": [], "k": []}
    layer = decoder.layers[4]

    def note(name):
        return lambda module, args, output: made[name].append(output)

    def note_tables(module, args, kwargs):
        made["tables"] = kwargs["position_embeddings"]

    handles = [getattr(layer.self_attn, f"{name}_proj").register_forward_hook(note(name)) for name in "qk"]
    handles.append(layer.register_forward_pre_hook(note_tables, with_kwargs=True))
    try:
        with rk.apply(model, rk.Policy([rk.Stage(4, 1.0)], ranking=ranking)) as routing, torch.autocast("cpu", dtype):
            model(**others)
    finally:
        for handle in handles:
            handle.remove()
    # The first are those of the ranking; under the layer's own the tables are the same, as all tokens run.
    query, key = (made[name][0][0].unflatten(-1, (-1, layer.self_attn.head_dim)).transpose(0, 1) for name in "qk")
    assert key.dtype == dtype
    visual = (others["input_ids"][0] == model.config.image_token_id).nonzero().flatten()
    if isinstance(ranking, KeyNorm):
        expected = -key.float().norm(dim=-1).mean(dim=0)
    else:
        length = key.shape[1]
        is_text = others["input_ids"][0] != model.config.image_token_id
        asking = is_text.nonzero().flatten() if isinstance(ranking, AllText) else torch.tensor([length - 1])
        tables = mixed_axes(decoder, made["tables"])
        rows = tuple(table[..., asking, :] for table in tables)
        query, key = rotated(query.float(), *rows, False), rotated(key.float(), *tables, False)
        key = key.repeat_interleave(len(query) // len(key), dim=0)
        logits = query @ key.transpose(1, 2) / layer.self_attn.head_dim**0.5
        hidden = torch.arange(length) > asking[:, None]
        attention = logits.masked_fill(hidden, -torch.inf).softmax(dim=-1).mean(dim=1)
        expected = attention.amax(dim=0) if ranking.head_reduction == "max" else attention.mean(dim=0)
    (scores,) = routing.trace.stages[0].scores
    torch.testing.assert_close(scores, expected[visual], atol=1e-5, rtol=0)
