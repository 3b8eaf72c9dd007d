"""Policies as plain values and as files: what comes back, and what is refused."""

import dataclasses
import inspect
import json
import math
import os
import re
from fractions import Fraction

import numpy as np
import pytest

import reroute_kernels as rk
from reroute_kernels import Policy, Stage, policy_file, rankings, reducers
from reroute_kernels.policy import Budget
from reroute_kernels.rankings import AllText, KeyNorm, LastQuery, Mixed, Random, Remembered, TextRaters, Uniform
from reroute_kernels.reducers import CDPruner, DivPrune, FlashVid, HoloV, Nuwa, VidCom2, VisionZip, VisPruner

PLAIN = {"version": 1, "schedule": [{"layer": 3, "keep": 0.25}]}
REDUCER = Nuwa(keep=1 / 3, per_cell=2, distance=0.1 + 0.2, quantile=0.55, keeps_own=False)
REDUCERS = [
    REDUCER,
    FlashVid(0.1, expansion=1.2, alpha=1, tau=0.7, segment_threshold=0.8, min_segments=4, selection="v1"),
    *(CDPruner(0.1), DivPrune(1 / 9), VidCom2(0.25), VisionZip(1 / 3, contextual=0.1 + 0.2)),
    *(HoloV(0.1, chunks=4, variation=0.1), VisPruner(1, salient=1 / 3)),
]
NAMES = ", ".join(repr(name) for name in vars(reducers) if name in {type(each).__name__ for each in REDUCERS})
RANKINGS = [
    LastQuery(),
    LastQuery("previous", queries=3, query_reduction="max", head_reduction="max"),
    AllText("previous", head_reduction="max"),
    TextRaters("this", rotary=False),
    KeyNorm("previous"),
    Random(2**70),
    Uniform(),
    Mixed(LastQuery(rotary=False), 1 / 3),
    Mixed(Remembered(Random(3)), uniform=0.4),
    Remembered(AllText(), 1 / 7),
]


@dataclasses.dataclass(frozen=True)
class Own(rankings.Ranking):
    """A ranking of one's own that holds another; as a class of `rankings` it could be written."""

    ranking: object
    share: float = 0.5
    rotary: bool = True

    def __post_init__(self):
        if not 0 <= self.share <= 1:
            raise ValueError(f"share must be in [0, 1], got {self.share}")

    def rank(self, candidates):
        raise NotImplementedError

    def flops(self, decoder, tokens, text_tokens):
        return 0


class OwnReducer:
    def reduce(self, image):
        raise NotImplementedError


@pytest.fixture
def shipped(monkeypatch):
    """The class above as one of this library."""
    monkeypatch.setattr(rankings, "Own", Own, raising=False)
    monkeypatch.setattr(Own, "__module__", rankings.__name__)
    policy_file._rules.cache_clear()
    yield Own
    policy_file._rules.cache_clear()


def comes_back(policy, path):
    """The same from values, from JSON and from a file; also its budget, which comparisons leave out."""
    policy.save(path)
    given = policy.to_dict()
    for found in (Policy.from_dict(given), Policy.from_dict(json.loads(json.dumps(given))), Policy.load(path)):
        assert found == policy
        assert repr(found) == repr(policy)
        assert (found.budget, type(found.budget)) == (policy.budget, type(policy.budget))
    assert json.loads(path.read_text()) == given
    assert Policy.parse(str(path)) == policy


@pytest.mark.parametrize("ranking", RANKINGS, ids=repr)
def test_every_ranking_comes_back(ranking, tmp_path):
    comes_back(Policy([Stage(3, 0.25), Stage(5, 0.1)], "remove", ranking, "contiguous"), tmp_path / "policy.json")
    comes_back(Policy([Stage(3, 0.25), Stage(5, 0.1, ranking)]), tmp_path / "policy.json")


@pytest.mark.parametrize("reducer", REDUCERS, ids=repr)
def test_every_reducer_comes_back(reducer, tmp_path):
    comes_back(Policy([], reducer=reducer), tmp_path / "policy.json")
    comes_back(Policy([Stage(3, math.nextafter(0.1, 1))], reducer=Nuwa(1, 3)), tmp_path / "policy.json")


def test_all_that_is_shipped_is_in_these_tests():
    for module, base, found in ((rankings, rankings.Ranking, RANKINGS), (reducers, reducers.Reducer, REDUCERS)):
        shipped = {
            each
            for name, each in vars(module).items()
            if isinstance(each, type) and issubclass(each, base) and not inspect.isabstract(each) and name[0] != "_"
        }
        assert shipped == set(map(type, found))


@pytest.mark.parametrize("name", rk.presets(originals=True), ids=str)
def test_presets_come_back(name, tmp_path):
    comes_back(rk.preset(*name), tmp_path / "policy.json")


@pytest.mark.parametrize("limit", [96, 96.1, np.float64(96.1)])
def test_budgets_come_back(limit, tmp_path):
    policy = rk.solve("llava-1.5-7b", [3, 7, 15], "pyramid", avg_tokens=limit, rankings=[KeyNorm(), None, None])
    comes_back(policy, tmp_path / "policy.json")
    assert policy.to_dict()["budget"] == {"kind": "avg_tokens", "limit": limit, "reached": policy.budget.reached}


def test_keeps_come_back_exactly(tmp_path):
    keeps = [0.1 + 0.2, 1 / 3, 5e-324, math.nextafter(1, 0), 1.0, float(np.float32(0.1))]
    policy = Policy([Stage(layer, keep) for layer, keep in enumerate(keeps)])
    policy.save(tmp_path / "policy.json")
    assert [stage.keep for stage in Policy.load(tmp_path / "policy.json").schedule] == keeps


@pytest.mark.usefixtures("shipped")
def test_rankings_inside_rankings_come_back(tmp_path):
    nested = Own(Own(LastQuery(queries=2), share=0.1 + 0.2), rotary=False)
    comes_back(Policy([Stage(3, 0.25, Own(KeyNorm()))], ranking=nested), tmp_path / "policy.json")
    given = Policy([Stage(3, 0.25)], ranking=nested).to_dict()["ranking"]
    assert given["ranking"]["ranking"]["name"] == "LastQuery"
    for change, message in (
        ({"queries": 0}, "ranking.ranking.ranking: queries must be 1 or more, got 0"),
        ({"name": "Best"}, "ranking.ranking.ranking.name must be one of 'LastQuery', .*'Own'"),
        ({"share": 1}, "ranking.ranking.ranking must hold layer, .* only, got 'share'"),
    ):
        inner = given["ranking"]["ranking"] | change
        with pytest.raises(ValueError, match=f"^{message}"):
            Policy.from_dict(PLAIN | {"ranking": given | {"ranking": given["ranking"] | {"ranking": inner}}})
    with pytest.raises(TypeError, match=r"^ranking.ranking must be a mapping, got 'KeyNorm'$"):
        Policy.from_dict(PLAIN | {"ranking": {"name": "Own", "ranking": "KeyNorm"}})
    with pytest.raises(ValueError, match=r"^ranking must hold 'ranking', got"):
        Policy.from_dict(PLAIN | {"ranking": {"name": "Own"}})


def test_a_file_for_people(tmp_path):
    """The format: one that is written by hand, and what is written."""
    path = tmp_path / "policy.json"
    path.write_text('\ufeff{"schedule": [{"keep": 1, "layer": 3, "ranking": {"name": "Uniform"}}], "version": 1}')
    policy = Policy.load(path)
    assert policy == Policy([Stage(3, 1.0, Uniform())])
    policy.save(path)
    expected = {
        "version": 1,
        "schedule": [{"layer": 3, "keep": 1.0, "ranking": {"name": "Uniform"}}],
        "action": "reroute",
        "ranking": {
            "name": "LastQuery",
            "layer": "this",
            "queries": 1,
            "query_reduction": "mean",
            "head_reduction": "mean",
            "rotary": True,
        },
        "positions": "original",
        "reducer": None,
        "budget": None,
        "align": None,
        "recycle": 0.0,
    }
    found = json.loads(path.read_text())
    assert found == expected
    assert next(iter(found)) == "version"


def test_values_are_not_those_of_the_caller():
    given = json.loads(json.dumps(Policy([Stage(3, 0.25, KeyNorm())]).to_dict()))
    before = json.dumps(given)
    Policy.from_dict(given)
    assert json.dumps(given) == before
    policy = Policy([Stage(3, 0.25, KeyNorm())])
    policy.to_dict()["schedule"][0]["ranking"]["layer"] = "previous"
    assert policy.rankings == (KeyNorm(),)


# Refused


def keyed(**values):
    return PLAIN | values


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ([], TypeError, "policy must be a mapping, got []"),
        ("3:0.25", TypeError, "policy must be a mapping, got '3:0.25'"),
        ({}, ValueError, "policy must hold 'version', got {}"),
        ({"schedule": []}, ValueError, "policy must hold 'version', got {'schedule': []}"),
        ({"version": 1}, ValueError, "policy must hold 'schedule', got {}"),
        (keyed(version=2), ValueError, "version must be 1, the one that this reroute_kernels reads, got 2"),
        (keyed(version="1"), ValueError, "version must be 1, the one that this reroute_kernels reads, got '1'"),
        (keyed(version=True), ValueError, "version must be 1, the one that this reroute_kernels reads, got True"),
        (keyed(layers=3), ValueError, r"policy must hold schedule, action, .*recycle only, got 'layers'"),
        (keyed(action="drop"), ValueError, "action must be one of 'reroute', 'remove', 'freeze', got 'drop'"),
        (keyed(action=["remove"]), TypeError, "action must be a number, string, boolean or None, got ['remove']"),
        (keyed(positions=None), ValueError, "positions must be one of 'original', 'contiguous', got None"),
        (keyed(schedule={}), TypeError, "schedule must be a list of stages, got {}"),
        (keyed(schedule=[]), ValueError, "schedule must hold at least one Stage, got none"),
        (keyed(schedule=[[3, 0.25]]), TypeError, "schedule[0] must be a mapping, got [3, 0.25]"),
        (keyed(schedule=[{"layer": 3}]), ValueError, "schedule[0] must hold 'keep', got {'layer': 3}"),
        (
            keyed(schedule=[{"layer": 3, "keep": 0.5, "ratio": 1}]),
            ValueError,
            "schedule[0] must hold layer, keep, ranking only, got 'ratio'",
        ),
        (
            keyed(schedule=[{"layer": 3, "keep": 0.5}, {"layer": 4, "keep": 1.5}]),
            ValueError,
            "schedule[1]: keep must be in (0, 1], got 1.5 at layer 4",
        ),
        (
            keyed(schedule=[{"layer": "3", "keep": 0.5}]),
            TypeError,
            "schedule[0]: layer must be an integer, got '3'",
        ),
        (
            keyed(schedule=[{"layer": 3, "keep": math.nan}]),
            ValueError,
            "schedule[0].keep must be finite, got nan",
        ),
        (
            keyed(schedule=[{"layer": 3, "keep": 0.5, "ranking": "last_query"}]),
            TypeError,
            "schedule[0].ranking must be a mapping, got 'last_query'",
        ),
        (
            keyed(schedule=[{"layer": 4, "keep": 0.5}, {"layer": 3, "keep": 0.5}]),
            ValueError,
            "schedule must have strictly ascending layers, got [4, 3]",
        ),
        (keyed(ranking=None), TypeError, "ranking must be an object with a method 'rank', got None"),
        (keyed(ranking={}), ValueError, "ranking must hold 'name', one of LastQuery, AllText, "),
        (keyed(ranking={"name": "Ranking"}), ValueError, "ranking.name must be one of 'LastQuery', 'AllText', "),
        (keyed(ranking={"name": "Nuwa"}), ValueError, "ranking.name must be one of 'LastQuery', 'AllText', "),
        (keyed(ranking={"name": ["KeyNorm"]}), ValueError, "ranking.name must be one of 'LastQuery', 'AllText', "),
        (
            keyed(ranking={"name": "Random", "layer": "this"}),
            ValueError,
            "ranking must hold seed only, got 'layer'",
        ),
        (keyed(ranking={"name": "Uniform", "seed": 1}), ValueError, "ranking must hold no argument only, got 'seed'"),
        (
            keyed(ranking={"name": "LastQuery", "queries": 1.0}),
            TypeError,
            "ranking: queries must be an integer, got 1.0",
        ),
        (
            keyed(ranking={"name": "KeyNorm", "layer": "last"}),
            ValueError,
            "ranking: layer must be one of 'this', 'previous', got 'last'",
        ),
        (keyed(reducer={"name": "Uniform"}), ValueError, f"reducer.name must be one of {NAMES}, got 'Uniform'"),
        (keyed(reducer={"name": "Nuwa", "keep": 0.5}), ValueError, "reducer must hold 'per_cell', got {'keep': 0.5}"),
        (
            keyed(reducer={"name": "Nuwa", "keep": "0.5", "per_cell": 2}),
            TypeError,
            "reducer: keep must be a number, got '0.5'",
        ),
        (keyed(budget=96), TypeError, "budget must be a mapping, got 96"),
        (keyed(budget={"kind": "flops", "limit": 1}), ValueError, "budget must hold 'reached', got "),
        (
            keyed(budget={"kind": "time", "limit": 1, "reached": 1}),
            ValueError,
            "budget.kind must be one of 'avg_tokens', 'flops', 'kv_bytes', got 'time'",
        ),
        (
            keyed(budget={"kind": "flops", "limit": True, "reached": 1}),
            TypeError,
            "budget.limit must be a number, got True",
        ),
        (
            keyed(budget={"kind": "flops", "limit": 1, "reached": math.inf}),
            ValueError,
            "budget.reached must be finite, got inf",
        ),
    ],
)
def test_values_that_are_no_policy(given, error, message, tmp_path):
    pattern = f"^{message}$" if ".*" in message else f"^{re.escape(message)}"
    with pytest.raises(error, match=pattern):
        Policy.from_dict(given)
    path = tmp_path / "policy.json"
    path.write_text(json.dumps(given))
    with pytest.raises(ValueError, match=f"^{re.escape(repr(str(path)))} must hold a policy") as found:
        Policy.load(path)
    assert "NaN" in str(found.value) or "Infinity" in str(found.value) or re.search(pattern[1:], str(found.value))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "Expecting value"),
        (b"3:0.25", "Extra data"),
        (b'{"version": 1, "schedule": [', "Expecting value"),
        (b"\xff\xfe\x00", "can't decode byte"),
        (b'{"version": 1, "version": 1}', "keys must differ, got 'version' twice"),
        (b'{"version": NaN}', "numbers must be finite, got NaN"),
        (b"[" * 100_000, "recursion"),
    ],
)
def test_files_that_are_no_json(content, message, tmp_path):
    path = tmp_path / "policy.json"
    path.write_bytes(content)
    named = re.escape(repr(str(path)))
    for read in (Policy.load, Policy.parse):
        with pytest.raises(ValueError, match=f"^{named} must hold a policy as JSON: .*{message}"):
            read(str(path))


def test_numbers_too_large_for_a_float(tmp_path):
    path = tmp_path / "policy.json"
    path.write_text('{"version": 1, "schedule": [{"layer": 3, "keep": 1e999}]}')
    with pytest.raises(ValueError, match=r"must hold a policy: schedule\[0\].keep must be finite, got inf"):
        Policy.load(path)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"ranking": Own(KeyNorm())},
            TypeError,
            r"ranking must be of reroute_kernels.rankings \(LastQuery, .*\) to be",
        ),
        (
            {"schedule": [Stage(3, 0.5), Stage(4, 0.5, Own(KeyNorm()))]},
            TypeError,
            r"schedule\[1\].ranking must be of reroute_kernels.rankings \(.*\) to be written, got Own\(",
        ),
        ({"ranking": type("LastQuery", (LastQuery,), {})()}, TypeError, "ranking must be of reroute_kernels.rankings"),
        (
            {"reducer": OwnReducer()},
            TypeError,
            r"reducer must be of reroute_kernels.reducers \(.*Nuwa.*\) to be written",
        ),
        ({"budget": ("flops", 1, 1)}, TypeError, "budget must be a Budget or None to be written, got"),
        (
            {"budget": Budget("flops", Fraction(1, 3), 0.1)},
            ValueError,
            r"budget.limit must be finite and a float to be written, got Fraction\(1, 3\)",
        ),
        ({"budget": Budget("flops", math.inf, 0.1)}, ValueError, "budget.limit must be finite and a float"),
        ({"budget": Budget("flops", "9", 0.1)}, TypeError, "budget.limit must be a number, got '9'"),
        ({"budget": Budget("time", 9, 9)}, ValueError, "budget.kind must be one of 'avg_tokens', .* got 'time'"),
    ],
)
def test_what_cannot_be_written(arguments, error, message, tmp_path):
    policy = Policy(**{"schedule": [Stage(3, 0.5)]} | arguments)
    path = tmp_path / "policy.json"
    path.write_text("as before")
    for write in (policy.to_dict, lambda: policy.save(path)):
        with pytest.raises(error, match=f"^{message}"):
            write()
    assert path.read_text() == "as before"
    assert os.listdir(tmp_path) == ["policy.json"]


@pytest.mark.parametrize("path", [3, None, b"policy.json", True])
def test_what_is_no_path(path):
    for call in (Policy([Stage(3, 0.5)]).save, Policy.load):
        with pytest.raises(TypeError, match=r"^path must be a string or a path, got"):
            call(path)


# Files


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=repr)
def test_a_failure_leaves_the_file_that_was_there(step, error, tmp_path, monkeypatch):
    path, policy = tmp_path / "policy.json", Policy([Stage(3, 0.25)])
    policy.save(path)
    before = path.read_bytes()

    def fail(*args):
        raise error

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(type(error)) as found:
        Policy([Stage(5, 0.5)]).save(path)
    if isinstance(error, OSError):
        assert found.value.filename == str(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["policy.json"]


def test_files_are_replaced_also_behind_links(tmp_path):
    path, link = tmp_path / "policy.json", tmp_path / "link.json"
    link.symlink_to(path)
    for policy in (Policy([Stage(3, 0.25)]), Policy([Stage(5, 0.5)], "remove")):
        policy.save(link)
        assert Policy.load(path) == Policy.load(link) == policy
    assert link.is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["link.json", "policy.json"]


def test_files_that_cannot_be_opened(tmp_path):
    missing = tmp_path / "none" / "policy.json"
    with pytest.raises(FileNotFoundError, match=r"No such file or directory: '.*/none/policy.json'"):
        Policy([Stage(3, 0.25)]).save(missing)
    for read in (Policy.load, Policy.parse):
        with pytest.raises(FileNotFoundError, match=r"none/policy.json"):
            read(str(missing))
    with pytest.raises(IsADirectoryError):
        Policy([Stage(3, 0.25)]).save(tmp_path)
    assert not os.listdir(tmp_path)


# Where a policy is named


def test_texts_that_name_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    policy = Policy([Stage(3, 0.25, KeyNorm())])
    for name in ("policy.json", "POLICY.JSON", "mine", "mine:1"):
        policy.save(name)
        assert Policy.parse(name) == policy
    assert Policy.parse("3:0.25") == Policy([Stage(3, 0.25)])
    with pytest.raises(ValueError, match=r"a schedule like .* or a file like policy.json, got 'other'"):
        Policy.parse("other")
    assert rk.cost("llava-1.5-7b", "mine") == rk.cost("llava-1.5-7b", policy)


def test_models_take_files(tmp_path):
    pytest.importorskip("transformers")
    from tests.models.families import load

    case, policy = load("llava"), Policy([Stage(1, 0.5), Stage(3, 0.25, KeyNorm("previous"))])
    policy.save(tmp_path / "policy.json")
    with rk.apply(case.model, str(tmp_path / "policy.json")) as routing:
        assert routing.policy == policy
