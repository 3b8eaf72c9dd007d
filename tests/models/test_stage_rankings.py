"""A ranking for each decision, against the slow way: alone, batched, padded, through `generate`, in every part."""

import pytest
import torch

import reroute_kernels as rk
from reroute_kernels.rankings import AllText, KeyNorm, LastQuery, Random, TextRaters, Uniform
from reroute_kernels.reducers import Nuwa
from tests.models import static_prefills, test_graphed_prefills, test_norms
from tests.models.families import load
from tests.models.prompts import selections
from tests.models.slow_way import SlowWay
from tests.models.test_graph_lifecycle import Middle
from tests.models.test_rankings import check

# Neighbouring layers too, and both layers that may rank, in either order.
MIXED = (rk.Stage(1, 0.5), rk.Stage(2, 0.4, KeyNorm("previous")), rk.Stage(3, 0.3, AllText()), rk.Stage(5, 0.15))
AHEAD_FIRST = (
    rk.Stage(1, 0.5, LastQuery("previous", queries=2)),
    rk.Stage(2, 0.4, Random(3)),
    rk.Stage(3, 0.3),
    rk.Stage(5, 0.15, LastQuery("previous")),
)
POLICIES = {
    "reroute": rk.Policy(MIXED, ranking=LastQuery(queries=3, head_reduction="max")),
    "reroute-ahead-first": rk.Policy(AHEAD_FIRST, ranking=KeyNorm()),
    "remove": rk.Policy(AHEAD_FIRST, "remove", Uniform()),
    "remove-contiguous": rk.Policy(MIXED, "remove", LastQuery("previous"), "contiguous"),
}


@pytest.fixture(params=POLICIES)
def this(request):
    return POLICIES[request.param]


@pytest.fixture(params=["llava", "qwen2_5_vl", "qwen3_vl"])
def case(request):
    family = load(request.param)
    yield family
    assert rk.routing_of(family.model) is None


def test_alone_and_through_generate(case, this):
    check(case.model, case.batch([case.prompt(2, 3, 8, seed=2)]), this)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.filterwarnings("ignore:.*right-padding.*")
@torch.no_grad()
def test_each_sample_of_a_batch(case, this, side):
    prompts = [case.prompt(1, 4, 9, seed=1), case.prompt(2, 7, 20, seed=2)]
    inputs = case.batch(prompts, side)
    length = inputs["input_ids"].shape[1]
    with rk.apply(case.model, this) as routing:
        logits = case.model(**inputs).logits
        trace = routing.trace
    for row, prompt in enumerate(prompts):
        with SlowWay(case.model, this) as slow:
            # Positions of LLaVA count from the first of the row.
            begin = length - len(prompt) if side == "left" else 0
            places = {"position_ids": torch.arange(begin, begin + len(prompt))[None]} if case.name == "llava" else {}
            expected = case.model(**case.batch([prompt]), **places).logits
        assert selections(trace, row, begin) == slow.selected
        torch.testing.assert_close(logits[row, begin + len(prompt) - 1], expected[0, -1], atol=1e-4, rtol=0)


def test_the_policys_ranking_is_not_asked_where_each_stage_has_its_own():
    case = load("llava")
    inputs, stages = case.batch([case.prompt(1, 4, 9, seed=1)]), [(1, 0.4), (3, 0.2)]
    own = rk.Policy([rk.Stage(*each, KeyNorm()) for each in stages], ranking=Middle())
    same = rk.Policy([rk.Stage(*each) for each in stages], ranking=KeyNorm())
    assert own.rankings == same.rankings
    found = []
    for this in (own, same):
        with rk.apply(case.model, this) as routing, torch.no_grad():
            case.model(**inputs)
        found.append(selections(routing.trace))
    assert found[0] == found[1]


def test_wrong_scores_name_the_stages_ranking():
    class Wrong:
        def rank(self, candidates):
            return None

    case = load("llava")
    this = rk.Policy([rk.Stage(1, 0.5), rk.Stage(3, 0.5, Wrong())])
    with rk.apply(case.model, this), pytest.raises(TypeError, match=r"got NoneType from <.*Wrong"):
        case.model(**case.batch([case.prompt(1, 4, 9, seed=1)]))


# Other parts that ask for it


@pytest.mark.parametrize("action", ["reroute", "remove"])
def test_behind_a_reducer(action):
    """The stage of the reducer has no ranking: those of the schedule are not moved by it."""
    case, reducer = load("llava"), Nuwa(keep=0.5, per_cell=2)
    inputs = case.batch([case.prompt(1, 4, 9, seed=1)])
    stages = (rk.Stage(2, 0.4, KeyNorm("previous")), rk.Stage(4, 0.2))
    with rk.apply(case.model, rk.Policy(stages, action, LastQuery(), reducer=reducer)) as routing, torch.no_grad():
        case.model(**inputs)
    mixed = routing.trace
    traces = []
    for stage, ranking in ((0, KeyNorm("previous")), (1, LastQuery())):
        alone = [rk.Stage(each.layer, each.keep) for each in stages[: stage + 1]]
        given = [*stages[:stage], alone[-1]]
        with rk.apply(case.model, rk.Policy(given, action, ranking, reducer=reducer)) as routing, torch.no_grad():
            case.model(**inputs)
        traces.append(routing.trace.stages[stage].selected[0].tolist())
    assert [stage.selected[0].tolist() for stage in mixed.stages] == traces


@pytest.mark.parametrize("name", ["reroute", "remove"])
def test_static_prefills(name, monkeypatch):
    runs, case = static_prefills.use(monkeypatch), load("qwen3_vl")
    inputs = case.batch([case.prompt(1, 6, 15, seed=1), case.prompt(2, 4, 9, seed=2)])
    test_graphed_prefills.check(case.model, inputs, POLICIES[name], runs)


@pytest.mark.parametrize(("ranking", "named"), [(Middle(), "<.*Middle"), (TextRaters(), r"TextRaters\(")])
def test_static_prefills_refuse_a_stages_own_ranking(monkeypatch, ranking, named):
    static_prefills.use(monkeypatch)
    case = load("llava")
    this = rk.Policy([rk.Stage(1, 0.5), rk.Stage(3, 0.5, ranking)])
    with pytest.raises(NotImplementedError, match=rf"other than TextRaters, got {named}"):
        rk.apply(case.model, this, cuda_graph="require")


@test_norms.pytest_device
def test_norms_are_computed_where_the_stages_ranking_reads_them(launches):
    case = load("qwen2_vl")
    inputs = case.batch([case.prompt(1, 6, 15, seed=1)])
    for rankings, norms in (((LastQuery(), Uniform()), 1), ((Uniform(), KeyNorm()), 1), ((KeyNorm(), LastQuery()), 2)):
        stages = [rk.Stage(layer, 0.4, ranking) for layer, ranking in zip((1, 3), rankings, strict=True)]
        _, _, names = test_norms.run(case, inputs, rk.Policy(stages), launches)
        assert names.count("normalize_rows") == norms


@pytest.mark.parametrize("name", POLICIES)
def test_warm_up_asks_as_the_model_does(name, monkeypatch):
    """The same rankings at the same decisions."""
    case, asked = load("llava"), []
    for kind in (LastQuery, AllText, KeyNorm, Random, TextRaters, Uniform):

        def noted(self, candidates, rank=kind.rank):
            asked.append((self, candidates.decision))
            return rank(self, candidates)

        monkeypatch.setattr(kind, "rank", noted)
    rk.warm_up(case.model, POLICIES[name], [64])
    warmed = asked[: len(MIXED)]
    asked.clear()
    with rk.apply(case.model, POLICIES[name]), torch.no_grad():
        case.model(**case.batch([case.prompt(1, 4, 9, seed=1)]))
    assert warmed == asked == [(ranking, number) for number, ranking in enumerate(POLICIES[name].rankings)]


def test_a_stage_that_no_layer_ranks_for():
    case = load("qwen3_5")
    with pytest.raises(NotImplementedError, match="got layer 3 after one of 'linear_attention'"):
        rk.apply(case.model, rk.Policy([rk.Stage(1, 0.5), rk.Stage(3, 0.5, KeyNorm("previous"))]))
    rk.apply(case.model, rk.Policy([rk.Stage(1, 0.5, LastQuery()), rk.Stage(3, 0.5)])).remove()
