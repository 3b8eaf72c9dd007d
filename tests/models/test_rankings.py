"""Every ranking and both choices of positions, on the golden models, against the slow way."""

import re
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import reroute_kernels as rk
from reroute_kernels.rankings import AllText, KeyNorm, LastQuery, Mixed, Random, Remembered, TextRaters, Uniform
from tests.models.families import load
from tests.models.prompts import ACTIONS, IMAGE, batch, cached_lengths, offset, selections
from tests.models.slow_way import SlowWay

GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
# Decisions in neighbouring layers too: the previous layer then ranks the tokens that it has just selected.
SCHEDULE = (rk.Stage(2, 0.4), rk.Stage(3, 0.25), rk.Stage(7, 0.1))
RANKINGS = [
    LastQuery(),
    LastQuery("previous"),
    LastQuery(queries=3, head_reduction="max"),
    LastQuery("previous", queries=2, query_reduction="max"),
    AllText(),
    AllText("previous", head_reduction="max"),
    LastQuery(rotary=False),
    AllText("previous", rotary=False),
    TextRaters(),
    TextRaters("this", head_reduction="max", rotary=False),
    KeyNorm(),
    KeyNorm("previous"),
    Random(3),
    Uniform(),
    Mixed(LastQuery("previous", rotary=False), uniform=0.4),
    Mixed(KeyNorm()),
    Remembered(LastQuery("previous")),
    Mixed(Remembered(AllText(head_reduction="max"), decay=1)),
]


@pytest.fixture(params=RANKINGS, ids=repr)
def ranking(request):
    return request.param


def assert_scores(trace, inputs, expected):
    """Scores of the slow way at its candidates, and NaN at other visual tokens."""
    visual = (inputs["input_ids"][0] == IMAGE).nonzero().flatten().tolist()
    for stage, scores in zip(trace.stages, expected, strict=True):
        assert scores.keys() <= set(visual)
        wanted = torch.tensor([scores.get(place, torch.nan) for place in visual])
        torch.testing.assert_close(stage.scores[0], wanted, atol=1e-6, rtol=1e-4, equal_nan=True)


def check(model, inputs, policy, atol=1e-5):
    with SlowWay(model, policy) as slow, torch.no_grad():
        expected = model(**inputs, use_cache=True)
        answer = model.generate(**inputs, **GREEDY)
    with rk.apply(model, policy) as routing, torch.no_grad():
        output = model(**inputs, use_cache=True)
        assert selections(routing.trace) == slow.selected
        assert_scores(routing.trace, inputs, slow.scores)
        assert model.generate(**inputs, **GREEDY).tolist() == answer.tolist()
    torch.testing.assert_close(output.logits, expected.logits, atol=atol, rtol=0)
    assert cached_lengths(output.past_key_values) == cached_lengths(expected.past_key_values)
    return routing.trace


@pytest.mark.parametrize(("action", "positions"), [("reroute", "original"), ("remove", "contiguous")])
def test_two_images(model, others, ranking, action, positions):
    check(model, others, rk.Policy(SCHEDULE, action, ranking, positions))


@pytest.mark.parametrize(("action", "positions"), [("reroute", "contiguous"), ("remove", "original")])
@pytest.mark.parametrize("ranking", [LastQuery(), LastQuery("previous")], ids=repr)
def test_two_images_under_the_other_choices(model, others, ranking, action, positions):
    check(model, others, rk.Policy(SCHEDULE, action, ranking, positions))


def test_rankings_differ(model, inputs):
    selected = set()
    for ranking in RANKINGS:
        with rk.apply(model, rk.Policy(SCHEDULE, ranking=ranking)) as routing, torch.no_grad():
            model(**inputs)
        selected.add(tuple(map(tuple, selections(routing.trace))))
    assert len(selected) == len(RANKINGS)


@pytest.mark.parametrize(
    ("action", "positions", "side"), [("reroute", "original", "left"), ("remove", "contiguous", "right")]
)
def test_batch_equals_its_samples(model, prompt, ranking, action, positions, side):
    # The second text has fewer tokens than some rankings ask for.
    prompts = [prompt(1, 4, 9, seed=1), prompt(1, 0, 1, seed=2), prompt(2, 7, 20, seed=2)]
    together, policy = batch(prompts, side), rk.Policy(SCHEDULE, action, ranking, positions)
    length = together["input_ids"].shape[1]
    with rk.apply(model, policy) as routing, torch.no_grad():
        logits = model(**together).logits
        trace = routing.trace
        answers = model.generate(**together, **GREEDY)[:, length:]
        for row, alone in enumerate(map(batch, ([each] for each in prompts))):
            begin, end = offset(prompts[row], length, side), len(prompts[row])
            # LLaVA counts positions from the first of the row, and other positions round otherwise.
            places = {} if "image_grid_thw" in together else {"position_ids": torch.arange(begin, begin + end)[None]}
            expected = model(**alone, **places).logits[0, -1]
            torch.testing.assert_close(logits[row, begin + end - 1], expected, atol=1e-4, rtol=0)
            assert selections(trace, row, begin) == selections(routing.trace)
            for one, other in zip(trace.stages, routing.trace.stages, strict=True):
                # A mean over queries counts those of the sample that has most.
                shares = [scores / scores.nan_to_num().abs().max() for scores in (one.scores[row], other.scores[0])]
                torch.testing.assert_close(*shares, atol=1e-4, rtol=1e-3, equal_nan=True)
            assert answers[row].tolist() == model.generate(**alone, **GREEDY)[0, end:].tolist()


@pytest.mark.parametrize(
    ("action", "positions", "side"), [("reroute", "contiguous", "left"), ("remove", "original", "right")]
)
def test_batch_under_the_other_choices(model, prompt, action, positions, side):
    test_batch_equals_its_samples(model, prompt, LastQuery("previous"), action, positions, side)


def test_decode_positions_follow_each_stage(model, inputs):
    """PyramidDrop decodes at the number of tokens that a layer has cached, not at the length of the prompt."""
    seen = {}

    def note(number, module, args, kwargs):
        seen[number] = kwargs["position_embeddings"][0]

    policy = rk.Policy(SCHEDULE, "remove", positions="contiguous")
    decoder = model.model.language_model
    with rk.apply(model, policy) as routing, torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        handles = [
            layer.register_forward_pre_hook(lambda *given, number=number: note(number, *given), with_kwargs=True)
            for number, layer in enumerate(decoder.layers)
        ]
        held = cached_lengths(cache)
        model(
            input_ids=torch.tensor([[5]]),
            position_ids=torch.tensor([[inputs["input_ids"].shape[1]]]),
            past_key_values=cache,
        )
        for handle in handles:
            handle.remove()
    assert [stage.tokens for stage in routing.trace.stages] == [held[2], held[3], held[7]]
    for number in range(12):
        axes = 1 if seen[0].ndim == 3 and not hasattr(decoder.config, "vision_config") else 3
        place = torch.full((axes, 1, 1), held[number])
        place = place[0] if "mrope_section" not in (decoder.config.rope_parameters or {}) else place.expand(3, 1, 1)
        assert torch.equal(seen[number], decoder.rotary_emb(torch.empty(1), place)[0])


@pytest.mark.parametrize("action", ACTIONS)
def test_text_turn_after_contiguous_positions(model, prompt, action):
    """The answer on a kept cache is that of the slow way, which numbers by the cached tokens."""
    policy = rk.Policy(SCHEDULE, action, positions="contiguous")
    first, then = batch([prompt(1, 5, 12, seed=1)]), prompt(0, 3, 3, seed=5).ids[None]

    def talk():
        output = model.generate(**first, **GREEDY, return_dict_in_generate=True)
        ids = torch.cat([output.sequences, then], dim=1)
        # Else generated tokens with the id of padding would count as padding.
        settings = {"attention_mask": torch.ones_like(ids), "past_key_values": output.past_key_values}
        return model.generate(input_ids=ids, **settings, **GREEDY).tolist()

    with SlowWay(model, policy):
        expected = talk()
    with rk.apply(model, policy):
        assert talk() == expected


# A ranking of one's own; a complete one is in docs/methods.md


@pytest.mark.parametrize(
    ("given", "described"),
    [
        (lambda candidates: None, "NoneType"),
        (lambda candidates: candidates.hidden, r"\(1, \d+, 64\) torch.float32"),
        (lambda candidates: candidates.pool, r"\(1, \d+\) torch.bool"),
    ],
)
def test_scores_of_another_shape(model, inputs, given, described):
    class Wrong:
        def rank(self, candidates):
            return given(candidates)

    message = rf"ranking must give scores \(1, \d+\) float32, or .* got {described} from"
    with rk.apply(model, rk.Policy(SCHEDULE, ranking=Wrong())), pytest.raises(TypeError, match=message):
        model(**inputs)


# Work


def test_one_row_where_one_is_needed(model, inputs, monkeypatch):
    """Only the asking queries are projected and rotated, and scores are computed only if they are asked for."""
    queries = []
    for name in ("route_tokens", "rank_tokens"):
        original = getattr(rk.ops, name)

        def counted(query, *given, original=original, **named: Tensor):
            queries.append(getattr(query, "query", query).shape[1])  # of an Attention, or given alone
            return original(query, *given, **named)

        monkeypatch.setattr(rk.ops, name, counted)
    text = int((inputs["input_ids"] != model.config.image_token_id).sum())
    for ranking, expected in (
        (LastQuery(), 1),
        (LastQuery("previous"), 1),
        (LastQuery(queries=3), 3),
        (AllText(), text),
        (Random(), None),
        (Uniform(), None),
        (KeyNorm(), None),
    ):
        queries.clear()
        with rk.apply(model, rk.Policy(SCHEDULE, ranking=ranking)), torch.no_grad():
            model(**inputs)
        assert queries == ([] if expected is None else [expected] * 3), ranking


# Rankings themselves


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: LastQuery("next"), ValueError, "layer must be one of 'this', 'previous', got 'next'"),
        (lambda: LastQuery(queries=0), ValueError, "queries must be 1 or more, got 0"),
        (lambda: LastQuery(queries="all"), TypeError, "queries must be an integer, got 'all'"),
        (lambda: AllText(head_reduction="sum"), ValueError, "head_reduction must be one of 'mean', 'max', got 'sum'"),
        (lambda: LastQuery(rotary=0), TypeError, "rotary must be a bool, got 0"),
        (lambda: AllText(rotary="no"), TypeError, "rotary must be a bool, got 'no'"),
        (lambda: KeyNorm("last"), ValueError, "layer must be one of 'this', 'previous', got 'last'"),
        (lambda: Random(0.5), TypeError, "seed must be an integer, got 0.5"),
        (lambda: Mixed(Random(), uniform=1.1), ValueError, "uniform must be from 0 to 1, got 1.1"),
        (lambda: Mixed(Random(), uniform=True), TypeError, "uniform must be a number, got True"),
        (lambda: Remembered(LastQuery(), decay=-0.1), ValueError, "decay must be from 0 to 1, got -0.1"),
        (lambda: Remembered(LastQuery(), decay="much"), TypeError, "decay must be a number, got 'much'"),
        (
            lambda: Remembered(Mixed(Remembered(Uniform()))),
            ValueError,
            "ranking must hold no Remembered itself, got Mixed(ranking=Remembered(ranking=Uniform(), decay=0.3), "
            "uniform=0.2)",
        ),
        *(
            (
                lambda ranking=ranking: Remembered(ranking),
                ValueError,
                "ranking must give scores of 0 or more, as LastQuery, AllText, TextRaters, Random and Uniform do, or "
                f"one's own with nonnegative = True, got {ranking!r}",
            )
            for ranking in (KeyNorm(), Mixed(KeyNorm()))
        ),
        (
            lambda: Mixed("chance"),
            TypeError,
            "ranking must be an object such as those of reroute_kernels.rankings, with a method 'rank', got 'chance'",
        ),
        (
            lambda: Mixed(Mixed(Uniform())),
            ValueError,
            "ranking must hold no Mixed itself, got Mixed(ranking=Uniform(), uniform=0.2)",
        ),
    ],
)
def test_refuses_and_says_why(make, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        make()


def test_a_mixed_ranking_is_read_as_the_one_it_holds():
    held = AllText("previous", query_reduction="max")
    mixed = Mixed(held, uniform=0.3)
    assert (mixed.layer, mixed.projects) == ("previous", True)
    assert rk.Policy(SCHEDULE, ranking=mixed).ranks_by_previous_layer
    costs = [rk.cost("llava-1.5-7b", rk.Policy(SCHEDULE, ranking=each), 64, 576) for each in (mixed, held)]
    assert costs[0].prefill_flops == costs[1].prefill_flops
    assert [mixed.count(keep) for keep in (1, 3, 4, 10)] == [0, 0, 1, 3]

    class Own:
        def rank(self, candidates):
            return candidates.hidden[:, :, 0].float()

    assert (Mixed(Own()).layer, Mixed(Own()).projects) == ("this", False)
    with pytest.raises(TypeError, match="ranking must have a method 'flops' to be costed, got <"):
        rk.cost("llava-1.5-7b", rk.Policy(SCHEDULE, ranking=Mixed(Own())), 64, 576)


@pytest.mark.parametrize("action", ACTIONS)
@torch.no_grad()
def test_a_mixed_ranking_of_all_or_none(model, inputs, action):
    """With a share of 1 it is `Uniform`, with one of 0 the ranking that it holds; scores are always those of that."""
    found = []
    for ranking in (Uniform(), Mixed(KeyNorm(), uniform=1), Mixed(KeyNorm(), uniform=0), KeyNorm()):
        with rk.apply(model, rk.Policy(SCHEDULE, action, ranking)) as routing:
            model(**inputs)
            found.append((selections(routing.trace), routing.trace.stages[0].scores[0].tolist()))
    assert found[0][0] == found[1][0] != found[2][0]
    assert found[2] == found[3]
    assert found[1][1] == found[3][1]


# Memory


@pytest.mark.parametrize("action", ACTIONS)
@torch.no_grad()
def test_wrappers_in_either_order(model, inputs, action):
    found = []
    for ranking in (Mixed(Remembered(LastQuery(), 0.7), 0.3), Remembered(Mixed(LastQuery(), 0.3), 0.7)):
        with rk.apply(model, rk.Policy(SCHEDULE, action, ranking)) as routing:
            logits = model(**inputs).logits
            found.append((selections(routing.trace), logits, [stage.scores[0] for stage in routing.trace.stages]))
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])
    for one, other in zip(found[0][2], found[1][2], strict=True):
        assert torch.equal(one.nan_to_num(-1), other.nan_to_num(-1))


@pytest.mark.parametrize("action", ACTIONS)
@torch.no_grad()
def test_nothing_is_remembered_at_decay_0(model, inputs, action):
    found = []
    for ranking in (Remembered(LastQuery(), decay=0), LastQuery()):
        with rk.apply(model, rk.Policy(SCHEDULE, action, ranking)) as routing:
            logits = model(**inputs).logits
            found.append((selections(routing.trace), logits, routing.trace.stages))
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])
    for remembered, plain in zip(found[0][2], found[1][2], strict=True):
        assert float(remembered.scores[0].nansum()) == pytest.approx(1)
        shares = plain.scores[0] / plain.scores[0].nansum()
        torch.testing.assert_close(remembered.scores[0], shares, atol=1e-7, rtol=1e-5, equal_nan=True)


@pytest.mark.parametrize("action", ACTIONS)
def test_threads_remember_their_own_prompts(model, prompt, action):
    """One ranking object, of two models' policies and of two threads; the same calls one after the other."""
    policy = rk.Policy(SCHEDULE, action, Remembered(LastQuery(), decay=0.9))
    prompts = [batch([prompt(1, 5, 12, seed=seed)]) for seed in (1, 2)]
    with rk.apply(model, policy):
        expected = [model.generate(**inputs, **GREEDY).tolist() for inputs in prompts]
        start = threading.Barrier(2)

        def run(inputs):
            start.wait()
            return model.generate(**inputs, **GREEDY).tolist()

        for _ in range(3):
            with ThreadPoolExecutor(2) as pool:
                assert list(pool.map(run, prompts)) == expected
    assert policy.ranking == Remembered(LastQuery(), decay=0.9)
    assert vars(policy.ranking).keys() == {"ranking", "decay"}


@torch.no_grad()
def test_a_prompt_after_a_failed_one_remembers_nothing_of_it(model, inputs, others):
    with rk.apply(model, rk.Policy(SCHEDULE, ranking=Remembered(LastQuery(), decay=0.9))) as routing:
        model(**others)
        expected = selections(routing.trace), [stage.scores[0].nan_to_num(-1) for stage in routing.trace.stages]

        def fail(*_):
            raise KeyboardInterrupt

        handle = model.model.language_model.layers[5].register_forward_pre_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            model(**inputs)
        handle.remove()
        model(**others)
        assert selections(routing.trace) == expected[0]
        for stage, scores in zip(routing.trace.stages, expected[1], strict=True):
            assert torch.equal(stage.scores[0].nan_to_num(-1), scores)


def test_rankings_that_can_be_remembered():
    class Own:
        nonnegative = True

        def rank(self, candidates):
            return candidates.hidden.float().norm(dim=-1)

    for ranking in (LastQuery(), AllText(), Random(), Uniform(), Mixed(LastQuery()), Own()):
        remembered = Remembered(ranking)
        assert (remembered.decay, remembered.layer, remembered.nonnegative) == (0.3, "this", True)
        assert remembered.projects == getattr(ranking, "projects", False)
    costs = [
        rk.cost("llava-1.5-7b", rk.Policy(SCHEDULE, ranking=each), 64, 576)
        for each in (Remembered(LastQuery()), LastQuery())
    ]
    assert costs[0].prefill_flops == costs[1].prefill_flops


def test_a_policy_knows_its_ranking_by_value():
    policy = rk.Policy(SCHEDULE, ranking=Random(3))
    assert policy == rk.Policy(SCHEDULE, ranking=Random(3)) != rk.Policy(SCHEDULE, ranking=Random(4))
    assert replace(policy, ranking="last_query") == rk.Policy(SCHEDULE)


@pytest.mark.parametrize("layer", ["this", "previous"])
@pytest.mark.parametrize("name", ["qwen3_vl", "qwen3_vl_moe"])
@torch.no_grad()
def test_key_norms_of_models_that_normalize_keys(name, layer):
    """After their norm all keys are as long as each other, and rounding would choose."""
    case = load(name)
    prompts = [case.prompt(1, 6, 15, seed=1), case.prompt(1, 3, 9, seed=2)]
    with rk.apply(case.model, rk.Policy([rk.Stage(2, 0.4)], ranking=KeyNorm(layer))) as routing:
        case.model(**case.batch(prompts))
        (stage,) = routing.trace.stages
        for row, prompt in enumerate(prompts):
            scores = stage.scores[row].sort().values
            assert scores.diff().median() > 1e-4 * scores.abs().max()
            shift = case.batch(prompts)["input_ids"].shape[1] - len(prompt)
            selected = (stage.selected[row] - shift).tolist()
            case.model(**case.batch([prompt]))
            assert routing.trace.stages[0].selected[0].tolist() == selected


@pytest.mark.parametrize("queries", [2, 3, 5])
def test_hidden_tokens_do_not_ask(queries):
    """The last queries of a sample are its last tokens, whatever the mask hides between them."""
    case = load("llava")
    inputs = case.batch([case.prompt(1, 6, 15, seed=1)])
    hole = inputs["input_ids"].shape[1] - 2
    places = torch.arange(inputs["input_ids"].shape[1])[None]
    without = {**inputs, "input_ids": inputs["input_ids"][:, places[0] != hole]}
    without["attention_mask"] = torch.ones_like(without["input_ids"])
    without["position_ids"] = places[:, places[0] != hole]
    hidden = {**inputs, "attention_mask": (places != hole).long(), "position_ids": places}
    policy = rk.Policy([rk.Stage(2, 0.4)], ranking=rk.rankings.LastQuery(queries=queries))
    with rk.apply(case.model, policy) as routing, torch.no_grad():
        expected = case.model(**without).logits[:, -1]
        selected = routing.trace.stages[0].selected
        actual = case.model(**hidden).logits[:, -1]
        assert all(map(torch.equal, routing.trace.stages[0].selected, selected))
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)
