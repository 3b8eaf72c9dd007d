"""Solved schedules, against all schedules of a few tokens and stages."""

import math
import re
from fractions import Fraction
from itertools import pairwise, product

import pytest

import reroute_kernels as rk
from reroute_kernels import Policy, Stage
from reroute_kernels.budget import solve_like
from reroute_kernels.cost import DECODERS, Decoder
from reroute_kernels.presets import REDUCED, tiers
from reroute_kernels.rankings import AllText, KeyNorm, LastQuery
from reroute_kernels.reducers import Nuwa

TOKENS, TEXT, BATCH = 6, 5, 2
DECODER = Decoder(8, 7, 4, 2, 2, 11, mlp_weights=(3 * 8 * 12,) * 7)
TOTALS = {"avg_tokens": "average_visual_tokens", "flops": "prefill_flops", "kv_bytes": "kv_bytes"}
RANKING = AllText()


def total(kind, layers, counts, action, reducer=None):
    """Quantity that a budget of this kind limits, for stages that select the given numbers of tokens."""
    stages = [Stage(layer, min(1, (count + 0.5) / TOKENS)) for layer, count in zip(layers, counts, strict=True)]
    policy = Policy(stages, action, RANKING, reducer=reducer)
    assert policy.selected_counts(TOKENS, reducer and reducer.survivors(TOKENS)) == counts
    return getattr(rk.cost(DECODER, policy, TEXT, TOKENS, BATCH, "float32"), TOTALS[kind])


def limits(totals):
    """Every total, and the values just below and above it."""
    ordered = sorted(set(totals))
    between = [(low + high) / 2 for low, high in pairwise(ordered)]
    return [limit for limit in ordered + between + [2 * ordered[-1]] if limit >= ordered[0]]


def solved(kind, limit, layers, shape, action, reducer=None):
    """Tokens that each stage selects, after checks of the policy's own figures."""
    policy = rk.solve(
        DECODER,
        layers,
        shape,
        **{kind: limit},
        visual_tokens=TOKENS,
        text_tokens=TEXT,
        batch=BATCH,
        dtype="float32",
        action=action,
        ranking=RANKING,
        reducer=reducer,
    )
    counts = policy.selected_counts(TOKENS, reducer and reducer.survivors(TOKENS))
    assert [stage.layer for stage in policy.schedule] == list(layers)
    assert (policy.action, policy.ranking, policy.reducer) == (action, RANKING, reducer)
    reached = total(kind, layers, counts, action, reducer)
    assert policy.budget == (kind, limit, reached)
    assert policy.budget.under == limit - reached >= 0
    return counts


def descends(counts):
    return all(later <= earlier for earlier, later in pairwise(counts))


@pytest.mark.parametrize("reducer", [None, Nuwa(keep=0.75, per_cell=3)], ids=["all", "reduced"])
@pytest.mark.parametrize("action", ["reroute", "remove"])
@pytest.mark.parametrize("kind", TOTALS)
@pytest.mark.parametrize("layers", [(3,), (1, 4), (2, 3, 6)], ids=str)
def test_uniform_comes_closest_of_all(layers, kind, action, reducer):
    """Of all choices in which stages differ by at most one token, none comes closer."""
    most = 5 if reducer else TOKENS
    totals = {
        counts: total(kind, layers, counts, action, reducer)
        for counts in product(range(1, most + 1), repeat=len(layers))
        if max(counts) - min(counts) <= 1 and (action == "reroute" or descends(counts))
    }
    for limit in limits(totals.values()):
        counts = solved(kind, limit, layers, "uniform", action, reducer)
        assert totals[counts] == max(reached for reached in totals.values() if reached <= limit)
    assert counts == (most,) * len(layers)  # of a budget above everything


@pytest.mark.parametrize("action", ["reroute", "remove"])
@pytest.mark.parametrize("kind", TOTALS)
@pytest.mark.parametrize(
    ("layers", "shape"),
    [((1, 4), [3, 2]), ((2, 3, 6), "pyramid"), ((0, 3, 5), [5, 5, 2]), ((1, 2, 6), [1, 0.5, 0.125])],
)
def test_shapes_at_any_scale(layers, shape, kind, action):
    """Of all scales on a fine grid, and of all choices of one more token in some stages, none comes closer."""
    parts = [1, 0.5, 0.25] if shape == "pyramid" else shape
    scales = [Fraction(step, 24) for step in range(24 * TOKENS * 10 + 1)]
    bases = {tuple(min(TOKENS, max(1, int(scale * Fraction(part)))) for part in parts) for scale in scales}
    totals = {}
    for base in bases:
        for mores in product((0, 1), repeat=len(layers)):
            counts = tuple(count + more for count, more in zip(base, mores, strict=True))
            if max(counts) <= TOKENS and (action == "reroute" or descends(counts)):
                totals[counts] = total(kind, layers, counts, action)
    for limit in limits(totals.values()):
        counts = solved(kind, limit, layers, shape, action)
        assert totals[counts] == max(each for each in totals.values() if each <= limit)


def test_many_stages():
    layers = range(1, 32)
    policy = rk.solve("llava-1.5-7b", layers, avg_tokens=64)
    assert policy.budget.under * 32 < 1
    assert {stage.keep * 576 - 0.5 for stage in policy.schedule} == {47, 48}
    policy = rk.solve("llava-1.5-7b", layers, avg_tokens=64, action="remove")
    assert descends(policy.selected_counts(576))


def test_what_else_goes_into_the_policy():
    policy = rk.solve(
        "qwen2.5-vl-7b", [3, 9], avg_tokens=100, ranking=LastQuery(queries=2), positions="contiguous", action="remove"
    )
    assert policy == Policy(policy.schedule, "remove", LastQuery(queries=2), "contiguous")
    assert policy.budget.kind == "avg_tokens"
    assert Policy([Stage(1, 0.5)]).budget is None


def test_rankings_of_stages():
    rankings = [KeyNorm(), None, LastQuery("previous")]
    options = {"shape": "pyramid", "ranking": AllText(), "visual_tokens": TOKENS, "text_tokens": TEXT}
    policy = rk.solve(DECODER, [1, 3, 5], flops=2 * total("flops", (1, 3, 5), (1, 1, 1), "reroute"), **options)
    own = rk.solve(DECODER, [1, 3, 5], flops=policy.budget.limit, rankings=rankings, **options)
    assert own.rankings == (KeyNorm(), AllText(), LastQuery("previous"))
    assert [stage.ranking for stage in own.schedule] == rankings
    counted = rk.cost(DECODER, own, TEXT, TOKENS)
    assert counted.prefill_flops == own.budget.reached <= own.budget.limit
    like = solve_like(DECODER, own, avg_tokens=TOKENS, visual_tokens=TOKENS)
    assert [stage.ranking for stage in like.schedule] == rankings


@pytest.mark.parametrize(("model", "layers"), [("llava-1.5-7b", (2, 7, 15, 23)), ("qwen2.5-vl-7b", (2, 6, 13, 20))])
def test_budgets_agree(model, layers):
    """Equal averages of tokens cache equal bytes, and half the FLOPs are half the FLOPs."""
    by_tokens = rk.solve(model, layers, "pyramid", avg_tokens=128)
    width = rk.cost(model, None, 0, 1).kv_bytes
    by_bytes = rk.solve(model, layers, "pyramid", kv_bytes=(128 + 64) * width, text_tokens=64)
    assert by_bytes == by_tokens
    half = rk.cost(model, None, 64, 576).prefill_flops / 2
    policy = rk.solve(model, layers, "pyramid", flops=half, text_tokens=64)
    assert policy.budget.reached == rk.cost(model, policy, 64, 576).prefill_flops
    assert 0.999 * half < policy.budget.reached <= half


@pytest.mark.parametrize(
    "name",
    [name for name in rk.presets(originals=True) if name.method not in REDUCED],
    ids=lambda name: "-".join(map(str, name)),
)
def test_matched_presets(name):
    published, policy = rk.preset(*name), rk.preset(*name, matched=True)
    layers = DECODERS[name.model].layers
    assert rk.cost.average_visual_tokens(policy, layers, 576) == policy.budget.reached
    # Layers by which choices of stages with one more token differ; those of SparseVLM have 4, 9 and 16 layers, or 3, 8
    # and 14, so that two choices next to each other are up to 5 layers apart.
    bound = 29 if len(policy.schedule) == 1 else 3 + 2 * ("sparsevlm" in name.method)
    most = bound * (2 if name.method == "reroute-sparsevlm" else 1)  # its limit is what its partner reaches
    assert 0 <= (name.avg_tokens - policy.budget.reached) * layers < (29 if "fastv" in name.method else most)
    assert 0 <= policy.budget.under * layers < bound
    for attribute in ("action", "ranking", "positions", "reducer", "stage_layers"):
        assert getattr(policy, attribute) == getattr(published, attribute)


@pytest.mark.parametrize("method", ["fastv", "pdrop", "nuwa"])
@pytest.mark.parametrize("model", DECODERS)
def test_matched_pairs(model, method):
    """They differ by at most one token in one layer; as published, the pdrop pair at 64 by 3.7 and 4.8 in all."""
    for tier in tiers(model, method):
        pair = [rk.preset(model, each, tier, matched=True).budget for each in (method, f"reroute-{method}")]
        assert pair[1].limit == pair[0].reached
        assert 0 <= pair[1].under * DECODERS[model].layers < 1.001


def test_originals_at_their_own_budget_stay_as_they_are():
    names = [name for name in rk.presets(originals=True) if name.method in ("pdrop-original", "nuwa", "reroute-nuwa")]
    for name in names:
        if name.model == "llava-1.5-7b" or name.method == "pdrop-original":
            matched, published = rk.preset(*name, matched=True), rk.preset(*name)
            assert matched.selected_counts(576) == published.selected_counts(576)
            assert matched.budget.under == 0


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "exactly one of avg_tokens, flops, kv_bytes must be given, got none"),
        (
            {"avg_tokens": 64, "kv_bytes": 1e9},
            ValueError,
            "exactly one of avg_tokens, flops, kv_bytes must be given, got avg_tokens, kv_bytes",
        ),
        ({"flops": "1e9"}, TypeError, "flops must be a number, got '1e9'"),
        (
            {"avg_tokens": 54},
            ValueError,
            "avg_tokens must be 54.90625 or more, which one token at every decision costs, got 54",
        ),
        (
            {"avg_tokens": math.nan},
            ValueError,
            "avg_tokens must be finite, got nan",
        ),
        (
            {"avg_tokens": 64, "decision_layers": [3, 32]},
            ValueError,
            "decision_layers must hold at least one layer, ascending, from 0 to 31, got [3, 32]",
        ),
        (
            {"avg_tokens": 64, "decision_layers": [7, 3]},
            ValueError,
            "decision_layers must hold at least one layer, ascending, from 0 to 31, got [7, 3]",
        ),
        (
            {"avg_tokens": 64, "decision_layers": []},
            ValueError,
            "decision_layers must hold at least one layer, ascending, from 0 to 31, got []",
        ),
        (
            {"avg_tokens": 64, "decision_layers": [3.5]},
            TypeError,
            "decision_layers must be a sequence of integers, got [3.5]",
        ),
        (
            {"avg_tokens": 64, "shape": "round"},
            ValueError,
            "shape must be one of 'uniform', 'pyramid' or numbers, got 'round'",
        ),
        (
            {"avg_tokens": 64, "shape": [1, 2]},
            ValueError,
            "shape must hold a positive number for each of 1 decision layers, got [1, 2]",
        ),
        (
            {"avg_tokens": 64, "shape": [0]},
            ValueError,
            "shape must hold a positive number for each of 1 decision layers, got [0]",
        ),
        (
            {"avg_tokens": 64, "decision_layers": [3, 7], "shape": [1, 2], "action": "remove"},
            ValueError,
            "shape must not increase under 'remove', got [1, 2]",
        ),
        (
            {"avg_tokens": 64, "action": "drop"},
            ValueError,
            "action must be one of 'reroute', 'remove', 'freeze', got 'drop'",
        ),
        ({"avg_tokens": 64, "visual_tokens": 0}, ValueError, "visual_tokens must be 1 or more, got 0"),
        (
            {"avg_tokens": 64, "rankings": [None, None]},
            ValueError,
            "rankings must hold a ranking or None for each of 1 decision layers, got [None, None]",
        ),
        ({"avg_tokens": 64, "rankings": 3}, TypeError, "rankings must be a sequence of rankings, got 3"),
        (
            {"avg_tokens": 64, "rankings": [3]},
            TypeError,
            "ranking must be an object with a method 'rank', got 3",
        ),
    ],
)
def test_refuses_and_says_why(arguments, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        rk.solve("llava-1.5-7b", **{"decision_layers": [3]} | arguments)


def test_frozen_tokens_cost_projections():
    """FLOPs rise with the tokens that run; the cache is that of all tokens, whatever runs."""
    policy = rk.solve("llava-1.5-7b", [3, 7], flops=4e12, action="freeze")
    assert policy.action == "freeze"
    assert 0.99 * 4e12 < policy.budget.reached == rk.cost("llava-1.5-7b", policy).prefill_flops <= 4e12
    everything = rk.cost("llava-1.5-7b", None).kv_bytes
    with pytest.raises(ValueError, match=f"kv_bytes must be {everything} or more"):
        rk.solve("llava-1.5-7b", [3, 7], kv_bytes=everything - 1, action="freeze")
    assert rk.solve("llava-1.5-7b", [3, 7], kv_bytes=everything, action="freeze").schedule[0].keep == 1.0
