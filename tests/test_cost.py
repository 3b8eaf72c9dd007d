"""Costs of policies, against the published tiers counted a second time; models/test_cost.py asks the models."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import reroute_kernels as rk
from reroute_kernels import Policy, Stage
from reroute_kernels.cost import DECODERS, Cost, Decoder, StageCost
from reroute_kernels.rankings import AllText, KeyNorm, LastQuery, Random
from reroute_kernels.reducers import Nuwa

LAYERS = {"llava-1.5-7b": 32, "qwen2.5-vl-7b": 28}

# True cost of the tiers: the average over all layers of the visual tokens that run, of 576.
AVERAGES = {
    (192, "fastv"): (191.8, 197.4),
    (192, "pdrop"): (191.3, 192.2),
    (192, "reroute-pdrop"): (191.5, 193.4),
    (128, "fastv"): (127.4, 134.0),
    (128, "pdrop"): (127.6, 129.4),
    (128, "reroute-pdrop"): (127.4, 130.7),
    (64, "fastv"): (64.0, 71.5),
    (64, "pdrop"): (80.4, 83.5),
    (64, "reroute-pdrop"): (84.1, 88.3),
}


@pytest.mark.parametrize("model", LAYERS)
@pytest.mark.parametrize(("tier", "method"), AVERAGES)
def test_averages_of_the_published_tiers(model, tier, method):
    expected = AVERAGES[tier, method][list(LAYERS).index(model)]
    policy = rk.preset(model, method, tier)
    assert rk.cost.average_visual_tokens(policy, LAYERS[model], 576) == pytest.approx(expected, abs=0.051)
    if method == "fastv":  # matched by construction: the same ratio in the same layers
        matched = rk.preset(model, "reroute-fastv", tier)
        assert rk.cost.average_visual_tokens(matched, LAYERS[model], 576) == pytest.approx(expected, abs=0.051)


def test_tokens_of_every_layer():
    policy = Policy([Stage(2, 0.5), Stage(3, 0.29), Stage(5, 0.75)], action="reroute")
    assert rk.cost.visual_tokens_per_layer(policy, 6, 100) == [100, 100, 50, 28, 28, 75]
    assert rk.cost.average_visual_tokens(policy, 6, 100) == pytest.approx(381 / 6)
    policy = Policy(policy.schedule, action="remove")
    assert rk.cost.visual_tokens_per_layer(policy, 6, 100) == [100, 100, 50, 28, 28, 28]


def test_frozen_tokens_by_hand():
    """They are projected to keys and values, and cached; queries, the output and the MLP are of the others."""
    counted = rk.cost(SMALL, Policy([Stage(1, 0.25)], "freeze"), text_tokens=3, visual_tokens=8, dtype="float32")
    deferred = rk.cost(SMALL, Policy([Stage(1, 0.25)]), text_tokens=3, visual_tokens=8, dtype="float32")
    unrouted = rk.cost(SMALL, None, text_tokens=3, visual_tokens=8, dtype="float32")
    first, second = counted.stages
    assert first == deferred.stages[0]
    assert (second.visual_tokens, second.tokens, second.frozen, second.cached_tokens) == (2, 5, 6, 11)
    assert second.projections == 2 * 6 * (5 * (8 + 4 + 4 + 8) + 6 * (4 + 4))
    assert second.attention == 2 * (2 * 8 * 5 * 11)
    assert (second.mlp, second.ranking) == (deferred.stages[1].mlp, deferred.stages[1].ranking)
    assert (counted.kv_bytes, counted.visual_kv_bytes) == (unrouted.kv_bytes, unrouted.visual_kv_bytes)
    assert counted.decode_flops(15) == unrouted.decode_flops(15)
    assert counted.average_visual_tokens == deferred.average_visual_tokens == 5


def test_an_alignment_has_no_matrix_products():
    policy = Policy([Stage(2, 0.5), Stage(3, 0.29)])
    assert rk.cost("llava-1.5-7b", replace(policy, align="stage")) == rk.cost("llava-1.5-7b", policy)


def test_proxies_are_grouped_by_similarity():
    policy = Policy([Stage(2, 0.5), Stage(3, 0.29)])
    plain, aligned = (rk.cost("llava-1.5-7b", replace(policy, align=align), 64, 576) for align in (None, "proxy"))
    assert policy.proxy_counts(policy.selected_counts(576), 576) == (0, 0)
    grouped = 2 * (288 // 8) * (64 + 576) * 4096
    assert [stage.ranking for stage in aligned.stages] == [
        stage.ranking + extra for stage, extra in zip(plain.stages, (0, grouped, 0), strict=True)
    ]
    assert aligned.prefill_flops == plain.prefill_flops + grouped


def test_recycled_tokens_are_compared_with_one_another():
    policy = Policy([Stage(2, 0.5), Stage(3, 0.29)], "remove")
    plain, recycling = (rk.cost("llava-1.5-7b", replace(policy, recycle=recycle), 64, 576) for recycle in (0, 0.3))
    first, second = 90, 38  # 288 of 576, then 167 of 288 stay: 10 and 4 of them are means, so 298 and 125 are removed
    assert replace(policy, recycle=0.3).recycled_counts((288, 167), 576) == ((first, 10), (second, 4))
    assert [stage.ranking for stage in recycling.stages] == [
        stage.ranking + 2 * tokens**2 * 4096 for stage, tokens in zip(plain.stages, (0, first, second), strict=True)
    ]
    assert recycling.kv_bytes == plain.kv_bytes


def test_reducers_come_first():
    reducer = Nuwa(keep=0.4, per_cell=2)
    policy = Policy([Stage(2, 0.5), Stage(3, 0.29), Stage(4, 0.2)], reducer=reducer)
    assert rk.cost.visual_tokens_per_layer(policy, 5, 100) == [40, 40, 40, 28, 20]
    policy = Policy([Stage(2, 0.1), Stage(3, 0.2)], action="remove", reducer=reducer)
    assert rk.cost.visual_tokens_per_layer(policy, 4, 100) == [40, 40, 10, 10]
    assert rk.cost.visual_tokens_per_layer(Policy([], reducer=reducer), 2, 100) == [40, 40]


def test_decision_before_the_first_layer():
    assert rk.cost.visual_tokens_per_layer(Policy([Stage(0, 0.5)]), 2, 9) == [4, 4]


def test_no_visual_tokens():
    policy = Policy([Stage(1, 0.5)])
    assert rk.cost.visual_tokens_per_layer(policy, 3, 0) == [0, 0, 0]
    assert rk.cost.average_visual_tokens(policy, 3, 0) == 0.0


@pytest.mark.parametrize(
    ("num_layers", "visual_tokens", "message"),
    [
        (0, 10, "num_layers must be 1 or more, got 0"),
        (-4, 10, "num_layers must be 1 or more, got -4"),
        (8, -1, "visual_tokens must be 0 or more, got -1"),
        (7, 10, "schedule must stay below layer 7 of this model, got layer 7"),
        (3, 10, "schedule must stay below layer 3 of this model, got layer 7"),
    ],
)
@pytest.mark.parametrize("count", [rk.cost.visual_tokens_per_layer, rk.cost.average_visual_tokens])
def test_refuses_and_says_why(count, num_layers, visual_tokens, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        count(Policy([Stage(3, 0.5), Stage(7, 0.5)]), num_layers, visual_tokens)


# 2 layers of width 6: 2 query heads and 1 key head of 4 channels, MLPs 5 and 7 wide.
SMALL = Decoder(6, 2, 2, 1, 4, 11, mlp_weights=(3 * 6 * 5, 3 * 6 * 7))


def test_a_small_decoder_by_hand():
    policy = Policy([Stage(1, 0.25)])
    counted = rk.cost(SMALL, policy, text_tokens=3, visual_tokens=8, batch=10, dtype="float32")
    projections = 2 * 6 * (8 + 4 + 4 + 8)  # of one token

    def stage(first_layer, visual_tokens, width, ranking):
        tokens = visual_tokens + 3
        return StageCost(
            first_layer=first_layer,
            layers=1,
            visual_tokens=visual_tokens,
            tokens=tokens,
            frozen=0,
            projections=10 * tokens * projections,
            attention=10 * 2 * (2 * 8 * tokens * tokens),
            mlp=10 * tokens * 2 * 3 * 6 * width,
            ranking=ranking,
            kv_bytes=10 * tokens * 2 * 4 * 4,
            visual_kv_bytes=10 * visual_tokens * 2 * 4 * 4,
        )

    first = stage(0, 8, 5, ranking=0)
    second = stage(1, 2, 7, ranking=10 * (2 * 6 * (11 * 4 + 8) + 2 * 8 * 11))
    assert counted == Cost(SMALL, text_tokens=3, visual_tokens=8, batch=10, stages=(first, second))
    assert counted.prefill_flops == first.flops + second.flops
    assert first.flops == first.projections + first.attention + first.mlp
    assert counted.ranking == second.ranking
    assert counted.lm_head_flops == 10 * 2 * 6 * 11
    assert counted.average_visual_tokens == 5
    # After 4 more tokens: the layers hold 15 and 9, and the new one is a key, too.
    assert counted.decode_flops(15) == 10 * (2 * projections + 2 * 18 * (5 + 7) + 4 * 8 * (16 + 10))


def test_averages_and_totals():
    for name in rk.presets():
        policy, layers = rk.preset(*name), LAYERS[name.model]
        counted = rk.cost(name.model, policy, 64, 576)
        assert counted.average_visual_tokens == rk.cost.average_visual_tokens(policy, layers, 576)
        assert counted.visual_kv_bytes == pytest.approx(
            counted.average_visual_tokens * rk.cost(name.model, None, 0, 1).kv_bytes
        )
        assert rk.cost(name.model, policy, 64, 576, batch=3).prefill_flops == 3 * counted.prefill_flops
        assert sum(stage.layers for stage in counted.stages) == layers


@pytest.mark.parametrize(
    ("model", "method", "tier", "mebibytes"),
    [
        ("llava-1.5-7b", None, None, 288),
        ("llava-1.5-7b", "reroute-fastv", 192, 96),
        ("llava-1.5-7b", "reroute-fastv", 64, 32),
        ("qwen2.5-vl-7b", None, None, 31.5),
    ],
)
def test_bytes_of_visual_tokens(model, method, tier, mebibytes):
    policy = None if method is None else rk.preset(model, method, tier)
    counted = rk.cost(model, policy, 64, 576, dtype=torch.bfloat16)
    assert counted.visual_kv_bytes / 2**20 == pytest.approx(mebibytes, abs=0 if policy is None else 0.15)


def test_what_decisions_rank():
    stages = [Stage(1, 0.5), Stage(2, 0.25), Stage(3, 0.25)]
    decoder = replace(SMALL, layers=4, mlp_weights=(90,) * 4)
    ranking = LastQuery(queries=2)

    def ranked(policy, visual=100):
        return [stage.ranking for stage in rk.cost(decoder, policy, 7, visual).stages]

    def flops(*tokens):
        return [ranking.flops(decoder, 7 + visual, 7) if visual else 0 for visual in tokens]

    assert ranked(Policy(stages, "reroute", ranking)) == flops(0, 100, 100, 100)
    assert ranked(Policy(stages, "remove", ranking)) == flops(0, 100, 50, 25)
    reducer = Nuwa(keep=0.3, per_cell=2)
    assert ranked(Policy(stages, "reroute", ranking, reducer=reducer)) == flops(0, 30, 30, 30)
    assert ranked(Policy(stages, "remove", ranking, reducer=reducer)) == flops(0, 30, 30, 25)
    assert ranked(Policy([], reducer=reducer)) == [0]
    assert ranked(Policy(stages, ranking=ranking), visual=0) == [0] * 4  # such a prompt is not routed
    assert ranked(Policy(stages, ranking=Random())) == [0] * 4
    assert ranked(Policy(stages, ranking=KeyNorm())) == [0] + 3 * [2 * 6 * 107 * 4]
    assert ranked(Policy(stages, ranking=AllText())) == [0] + 3 * [2 * 6 * (107 * 4 + 7 * 8) + 2 * 7 * 8 * 107]


def test_each_decision_is_costed_by_its_own_ranking():
    decoder = replace(SMALL, layers=4, mlp_weights=(90,) * 4)
    stages, rankings = [Stage(1, 0.5), Stage(2, 0.25), Stage(3, 0.25)], [KeyNorm(), None, AllText()]
    for action in ("reroute", "remove"):
        own = [Stage(stage.layer, stage.keep, ranking) for stage, ranking in zip(stages, rankings, strict=True)]
        counted = rk.cost(decoder, Policy(own, action, LastQuery(queries=2)), 7, 8)
        for number, ranking in enumerate((KeyNorm(), LastQuery(queries=2), AllText()), start=1):
            alike = rk.cost(decoder, Policy(stages, action, ranking), 7, 8)
            assert counted.stages[number] == alike.stages[number]
        assert counted.ranking == sum(stage.ranking for stage in counted.stages)


def test_what_goes_into_json():
    counted = rk.cost("llava-1.5-7b", rk.preset("llava-1.5-7b", "pdrop", 64), 64, 576)
    plain = counted.as_dict()
    assert json.loads(json.dumps(plain)) == plain
    assert plain["prefill_flops"] == sum(stage["flops"] for stage in plain["stages"]) == counted.prefill_flops
    assert plain["decoder"]["mlp_weights"] == [3 * 4096 * 11008] * 32
    assert plain["stages"][1]["visual_tokens"] == 160


CONFIG = {
    "hidden_size": 8,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 5,
    "vocab_size": 9,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 3}
DENSE, SPARSE = 3 * 8 * 5, 8 * 6 + 2 * 3 * 8 * 3


@pytest.mark.parametrize(
    ("config", "mlp_weights"),
    [
        ({}, [DENSE] * 4),
        ({**EXPERTS, "num_experts": 6}, [SPARSE] * 4),
        ({**EXPERTS, "num_local_experts": 6, "decoder_sparse_step": 2}, [DENSE, SPARSE, DENSE, SPARSE]),
        ({**EXPERTS, "num_experts": 6, "mlp_only_layers": [2]}, [SPARSE, SPARSE, DENSE, SPARSE]),
        (
            {**EXPERTS, "n_routed_experts": 6, "n_shared_experts": 1, "first_k_dense_replace": 1},
            [DENSE] + [SPARSE + 3 * 8 * 3] * 3,
        ),
        ({**EXPERTS, "num_experts": 6, "shared_expert_intermediate_size": 7}, [SPARSE + 3 * 8 * 7 + 8] * 4),
    ],
    ids=["dense", "experts", "every second layer", "one dense layer", "GLM", "Qwen2"],
)
def test_shapes_of_configurations(config, mlp_weights):
    decoder = Decoder.of(SimpleNamespace(**CONFIG, **config))
    assert decoder == Decoder(8, 4, 4, 4, 2, 9, tuple(mlp_weights))


def test_where_a_decoder_is_found():
    text = SimpleNamespace(**CONFIG, head_dim=16, num_key_value_heads=2, sliding_window=None)
    config = SimpleNamespace(get_text_config=lambda: text)
    decoder = Decoder(8, 4, 4, 2, 16, 9, (DENSE,) * 4)
    assert Decoder.of(text) == Decoder.of(config) == Decoder.of(SimpleNamespace(config=config)) == decoder
    assert Decoder.of(decoder) is decoder
    assert Decoder.of("llava-1.5-7b") is DECODERS["llava-1.5-7b"]
    text.sliding_window, text.use_sliding_window = 4096, False
    assert Decoder.of(text) == decoder


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"config_or_model": "llava"},
            ValueError,
            "config_or_model must be one of 'llava-1.5-7b', 'qwen2.5-vl-7b', a model or a configuration "
            "(AutoConfig.from_pretrained), got 'llava'",
        ),
        (
            {"config_or_model": 7},
            TypeError,
            "config_or_model must be a transformers model or configuration, or the name of a published model, got int, "
            "which has no 'num_hidden_layers'",
        ),
        (
            {"config_or_model": SimpleNamespace(**CONFIG, sliding_window=4096)},
            NotImplementedError,
            "config_or_model must have a decoder whose layers all have 'full_attention', got 'SimpleNamespace' with "
            "'sliding_attention' at layer 0",
        ),
        (
            {
                "config_or_model": SimpleNamespace(
                    **CONFIG, model_type="mixed", layer_types=["full_attention", "linear_attention"] * 2
                )
            },
            NotImplementedError,
            "config_or_model must have a decoder whose layers all have 'full_attention', got 'mixed' with "
            "'linear_attention' at layer 1",
        ),
        (
            {"config_or_model": SimpleNamespace(**CONFIG, model_type="latent", kv_lora_rank=512)},
            NotImplementedError,
            "config_or_model must not have latent attention, got 'latent'",
        ),
        (
            {"policy": Policy([Stage(9, 0.5)])},
            ValueError,
            "schedule must stay below layer 2 of this model, got layer 9",
        ),
        ({"text_tokens": -1}, ValueError, "text_tokens must be 0 or more, got -1"),
        ({"text_tokens": 1.5}, TypeError, "text_tokens must be an integer, got 1.5"),
        ({"visual_tokens": -1}, ValueError, "visual_tokens must be 0 or more, got -1"),
        ({"batch": 0}, ValueError, "batch must be 1 or more, got 0"),
        (
            {"dtype": "half precision"},
            ValueError,
            "dtype must be a torch.dtype or the name of one, got 'half precision'",
        ),
    ],
)
def test_cost_refuses_and_says_why(arguments, error, message):
    given = {"config_or_model": SMALL, "policy": Policy([Stage(1, 0.5)]), "text_tokens": 1, "visual_tokens": 4}
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        rk.cost(**given | arguments)


def test_methods_that_costing_needs():
    class Bare:
        def rank(self, candidates): ...

        def reduce(self, image): ...

        def __repr__(self):
            return "Bare()"

    with pytest.raises(TypeError, match=r"^ranking must have a method 'flops' to be costed, got Bare\(\)$"):
        rk.cost(SMALL, Policy([Stage(1, 0.5)], ranking=Bare()), 1, 4)
    with pytest.raises(TypeError, match=r"^reducer must have a method 'survivors' to be costed, got Bare\(\)$"):
        rk.cost(SMALL, Policy([Stage(1, 0.5)], reducer=Bare()), 1, 4)


def test_decoding_begins_after_the_prompt():
    counted = rk.cost(SMALL, None, 3, 4)
    assert counted.decode_flops(8) > counted.decode_flops(7)
    with pytest.raises(ValueError, match=r"^length must be 7 or more, got 6$"):
        counted.decode_flops(6)


def test_one_entry_for_each_layer():
    with pytest.raises(ValueError, match=r"^mlp_weights must have 3 entries, as layers says, got 2$"):
        replace(SMALL, layers=3)


COUNTED = """
import torch
{imports}
query, key, past = torch.zeros(2, 3, 4, 16), torch.zeros(2, 10, 2, 16), torch.zeros(2, 5, 2, 16)
flags = torch.ones(2, 10, dtype=torch.bool)
with FlopCounterMode(display=False) as counter:
    rk.ops.rank_tokens(query, key)
    rk.ops.route_tokens(query, key, past_key=past, pool=flags, pinned=~flags, keep=1, length=1)
print(counter.get_total_flops())
"""
COUNTER, LIBRARY = "from torch.utils.flop_counter import FlopCounterMode", "import reroute_kernels as rk"


@pytest.mark.parametrize(
    "imports",
    [
        f"{COUNTER}\n{LIBRARY}",
        f"{LIBRARY}\nimport reroute_kernels.flops\n{COUNTER}",
        f"{LIBRARY}; rk.models\n{COUNTER}",
    ],
    ids=["counter first", "flops", "models"],
)
def test_counters_see_what_ranking_costs(imports):
    run = [sys.executable, "-c", COUNTED.format(imports=imports)]
    output = subprocess.run(run, check=True, capture_output=True, text=True).stdout
    assert int(output) == 2 * 2 * 3 * 4 * 16 * (10 + 15)


@pytest.mark.parametrize("text", ["fastv/192", "llava-1.5-7b/reroute-pdrop/64", "3:0.5,16:0.1", "remove:3:0.25"])
def test_policies_may_be_texts(text):
    assert rk.cost("llava-1.5-7b", text) == rk.cost("llava-1.5-7b", Policy.parse(text, "llava-1.5-7b"))


def test_what_is_no_policy_is_refused():
    with pytest.raises(TypeError, match="policy must be a Policy, its text or None, got 3"):
        rk.cost("llava-1.5-7b", 3)
