"""Choices of decision layers against brute force, under budgets; calibrations and their logs as files."""

import json
import random
from fractions import Fraction
from itertools import combinations, pairwise

import pytest
import torch

import reroute_kernels as rk
from reroute_kernels.calibration import LayerQuality, best_layers
from reroute_kernels.calibration_log import Log, SampleRecord
from reroute_kernels.cost import Decoder
from reroute_kernels.rankings import LastQuery, Mixed

LAYERS = 12
# The last layers cost more, as in decoders whose later MLPs are mixtures of experts.
DECODER = Decoder(64, LAYERS, 4, 2, 16, 512, mlp_weights=(3 * 64 * 96,) * 7 + (7 * 64 * 96,) * 5)


def worth(quality, layers, num_layers=LAYERS):
    """Sum over the stages of quality x length, exact."""
    return sum(Fraction(quality[first]) * (end - first) for first, end in pairwise([*layers, num_layers]))


def by_brute_force(quality, decisions, is_admitted=lambda layers: True):
    """The best admitted choice; of equal ones the first."""
    admitted = [layers for layers in combinations(sorted(quality), decisions) if is_admitted(layers)]
    return min(admitted, key=lambda layers: (-worth(quality, layers), layers)) if admitted else None


def qualities(seed, layers=range(2, LAYERS), steps=None):
    drawn = random.Random(seed)
    values = [drawn.randint(0, steps) / steps if steps else drawn.random() for _ in layers]
    return dict(zip(layers, values, strict=True))


def calibration(quality, **changed):
    told = {"early": 2, "share": 0.2, "decoder": DECODER, "visual_tokens": 60, "text_tokens": 9}
    return rk.Calibration("tiny", LAYERS, [LayerQuality(*each, 0.0, 1.0) for each in quality.items()], **told | changed)


# The choice


@pytest.mark.parametrize("steps", [None, 3, 1], ids=["distinct", "ties", "many ties"])
@pytest.mark.parametrize("decisions", [1, 2, 3, 4, 10])
def test_best_layers_are_those_of_brute_force(decisions, steps):
    for seed in range(6):
        quality = qualities(seed, steps=steps)
        expected = by_brute_force(quality, decisions)
        assert best_layers(quality, decisions, LAYERS)[0] == expected
        found = calibration(quality)
        assert found.best_layers(decisions) == expected
        assert found.objective(expected) == float(worth(quality, expected))


def test_choices_are_the_best_of_each_first_layer():
    quality = qualities(3, layers=[0, 3, 4, 7, 8, 11])
    choices = best_layers(quality, 3, LAYERS)
    assert sorted(each[0] for each in choices) == [0, 3, 4, 7]
    for layers in choices:
        assert layers == by_brute_force(quality, 3, lambda other, first=layers[0]: other[0] == first)
    worths = [worth(quality, each) for each in choices]
    assert worths == sorted(worths, reverse=True)


def test_sums_are_exact():
    """In floats, 0.1 + 0.2 is above 0.3, and the choice would be another."""
    quality = {9: 0.1, 10: 0.2, 11: 0.1 + 0.2}
    assert best_layers(quality, 2, LAYERS)[0] == by_brute_force(quality, 2)
    big = {1: 2.0**53, 5: 1.0, 6: 1.0, 7: 2.0}
    assert best_layers(big, 2, LAYERS)[0] == by_brute_force(big, 2) == (1, 7)


COSTS = {"avg_tokens": "average_visual_tokens", "flops": "prefill_flops", "kv_bytes": "kv_bytes"}


@pytest.mark.parametrize("action", ["reroute", "remove"])
@pytest.mark.parametrize("kind", COSTS)
def test_policy_is_the_best_that_the_budget_admits(kind, action):
    """The best layers begin late, where small budgets do not reach: one token at every decision is too much there."""
    quality = {2: 0.01, 3: 0.1, 4: 0.5, 5: 1.0, 6: 3.0, 7: 1.0, 8: 1.0}
    found, most = calibration(quality), getattr(rk.cost(DECODER, None, 9, 60), COSTS[kind])

    def least(layers):
        one_token = rk.Policy([rk.Stage(layer, 1e-9) for layer in layers], action)
        return getattr(rk.cost(DECODER, one_token, 9, 60), COSTS[kind])

    chosen = []
    for share in (0.1, 0.25, 0.3, 0.4, 0.7):
        expected = by_brute_force(quality, 3, lambda layers, limit=share * most: least(layers) <= limit)
        if expected is None:
            with pytest.raises(ValueError, match=rf"^{kind} must be [\d.]+ or more, which one token"):
                found.policy(3, "pyramid", action=action, **{kind: share * most})
            continue
        policy = found.policy(3, "pyramid", action=action, **{kind: share * most})
        budget = {kind: share * most, "visual_tokens": 60, "text_tokens": 9}
        assert policy == rk.solve(DECODER, expected, "pyramid", action=action, **budget)
        assert policy.budget.reached <= policy.budget.limit == share * most
        chosen.append(expected)
    assert len(set(chosen)) >= 2, "the budgets must decide where the first decision is"
    assert chosen[-1] == found.best_layers(3) == (4, 5, 6)


def test_the_refusal_of_a_budget_tells_the_least_of_all_choices():
    with pytest.raises(ValueError, match=r"^avg_tokens must be 10\.8\d+ or more, .*, got 5$"):
        calibration(qualities(1)).policy(2, avg_tokens=5)  # (2 * 60 + 10) / 12


def test_policy_takes_what_solve_takes():
    found = calibration(qualities(2), ranking=LastQuery(rotary=False))
    policy = found.policy(1, avg_tokens=30, positions="contiguous", ranking=Mixed(found.ranking, 0.5))
    assert policy.positions == "contiguous"
    assert policy.ranking == Mixed(LastQuery(rotary=False), 0.5)
    assert found.policy(1, avg_tokens=30).ranking == LastQuery(rotary=False)
    more = found.policy(1, avg_tokens=30, visual_tokens=120)
    assert more.selected_counts(120) != found.policy(1, avg_tokens=30).selected_counts(120)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda found: found.policy(0, avg_tokens=30), ValueError, "decisions must be from 1 to 10, .*, got 0"),
        (lambda found: found.best_layers(11), ValueError, "decisions must be from 1 to 10, .*, got 11"),
        (lambda found: found.best_layers(2.0), TypeError, "decisions must be an integer, got 2.0"),
        (lambda found: found.best_layers(True), TypeError, "decisions must be an integer, got True"),
        (
            lambda found: found.policy(2),
            ValueError,
            "exactly one of avg_tokens, flops, kv_bytes must be given, got none",
        ),
        (lambda found: found.policy(2, [1], avg_tokens=30), ValueError, "shape must hold .* 2 decision layers"),
        (lambda found: found.objective([3, 2]), ValueError, r"layers must be ascending ones of 2, .*, got \[3, 2\]"),
        (lambda found: found.objective([0]), ValueError, r"layers must be .*, got \[0\]"),
        (lambda found: calibration({}), ValueError, "qualities must be of ascending layers from 0 to 11, got layers"),
        (lambda found: calibration({12: 1.0}), ValueError, r"ascending layers .*, got layers \[12\]"),
        (lambda found: calibration({3: -0.1}), ValueError, "finite and 0 or more, got -0.1 at layer 3"),
        (lambda found: calibration({3: float("nan")}), ValueError, "finite and 0 or more, got nan at layer 3"),
        (
            lambda found: calibration({3: 1.0}, decoder=None).policy(1, avg_tokens=30),
            NotImplementedError,
            "model must have full attention in all layers",
        ),
    ],
)
def test_refused(call, error, message):
    with pytest.raises(error, match=message):
        call(calibration(qualities(0)))


# As files


def test_a_file_says_everything(tmp_path):
    found = calibration(qualities(5), ranking=LastQuery(queries=3), measure="my.score", seed=7, samples=3, unrouted=0.9)
    found.save(tmp_path / "calibration.json")
    read = rk.Calibration.load(tmp_path / "calibration.json")
    assert read == found
    assert read.policy(3, avg_tokens=30) == found.policy(3, avg_tokens=30)
    without = calibration(qualities(5), decoder=None)
    assert rk.Calibration.from_dict(json.loads(json.dumps(without.to_dict()))) == without


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"version": 2}, ValueError, "version must be 1, .*, got 2"),
        ({"layer": 2}, ValueError, "calibration must hold model, .* only, got 'layer'"),
        ({"share": "much"}, TypeError, "share must be a number, got 'much'"),
        ({"num_layers": True}, TypeError, "num_layers must be an integer, got True"),
        ({"qualities": 3}, TypeError, "qualities must be a list, got 3"),
        ({"qualities": [{"layer": 3}]}, ValueError, r"qualities\[0\] must hold 'mean'"),
        ({"qualities": [{"layer": "3", "mean": 1, "low": 1, "high": 1}]}, TypeError, r"qualities\[0\].layer must be"),
        ({"ranking": {"name": "Nothing"}}, ValueError, "ranking.name must be one of"),
        ({"decoder": {"layers": 3}}, ValueError, "decoder must hold 'hidden_size'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_files_that_are_refused(change, error, message, tmp_path):
    given = calibration(qualities(5)).to_dict() | change
    with pytest.raises(error, match=message):
        rk.Calibration.from_dict(given)
    (tmp_path / "calibration.json").write_text(json.dumps(given))
    with pytest.raises(ValueError, match=f"must hold a calibration: {message}"):
        rk.Calibration.load(tmp_path / "calibration.json")


# The log

HEADER = {"model": "tiny", "layers": [2, 3], "share": 0.2, "seed": 0}
RECORDS = [SampleRecord(f"digest {number}", [60], [9], [1.0], [[0.1 * number], [1 / 3]]) for number in range(3)]


def written(path):
    log = Log(path, HEADER)
    for record in RECORDS:
        log.add(record)
    return path


def test_a_log_gives_back_its_records_exactly(tmp_path):
    again = Log(written(tmp_path / "log.jsonl"), HEADER)
    assert again.records == RECORDS
    assert again.found(2, "digest 2")
    assert not again.found(3, "digest 3")
    with pytest.raises(ValueError, match=r"the same samples in the same order, got another sample 1 in '.*log.jsonl'"):
        again.found(1, "digest 2")
    assert Log(None, HEADER).records == []


@pytest.mark.parametrize("cut", [3, 40, None])
def test_a_last_line_that_was_cut_off_is_dropped(tmp_path, cut):
    path = written(tmp_path / "log.jsonl")
    lines = path.read_bytes().splitlines(keepends=True)
    keep = 0 if cut is None else 3  # the header itself, or the last record
    path.write_bytes(b"".join(lines[:keep]) + lines[keep][: cut or 25])
    log = Log(path, HEADER)
    assert log.records == RECORDS[: max(0, keep - 1)]
    for record in RECORDS[len(log.records) :]:
        log.add(record)
    assert path.read_bytes() == b"".join(lines)


@pytest.mark.parametrize("name", HEADER)
def test_a_log_of_another_measurement_is_refused_by_name(tmp_path, name):
    path = written(tmp_path / "log.jsonl")
    before = path.read_bytes()
    with pytest.raises(
        ValueError, match=rf"^resume must hold measurements with {name} 'other', got .* in '.*log.jsonl'"
    ):
        Log(path, HEADER | {name: "other"})
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("hello", "resume must be a file of measurements, or none yet, got b'hello'"),
        ("hello\nyou\n", "resume must be a file of measurements, or none yet, got 'hello'"),
        ('{"a": 1}\n', "resume must be a file of measurements"),
        ('{header}\n{"inputs": 3}\n', "resume must hold a record of a sample in each line .* in line 2 of"),
        ("{header}\nnothing\n", "resume must hold a record .* got 'nothing' in line 2 of"),
    ],
)
def test_other_files_are_refused_and_left(tmp_path, content, message):
    path = tmp_path / "log.jsonl"
    path.write_text(content.replace("{header}", json.dumps({"version": 1, **HEADER})))
    before = path.read_bytes()
    with pytest.raises(ValueError, match=message):
        Log(path, HEADER)
    assert path.read_bytes() == before


# Shown


def test_table_and_picture_mark_the_decision_layers():
    pytest.importorskip("rich")
    pytest.importorskip("matplotlib")
    found = calibration(qualities(8))
    policy = found.policy(3, avg_tokens=40)
    layers = [stage.layer for stage in policy.schedule]
    columns = [list(column.cells) for column in found.table(policy).columns]
    assert [int(layer) for layer, decides in zip(columns[0], columns[-1], strict=True) if decides] == layers
    assert [float(cell) for cell in columns[1]] == pytest.approx(list(found.quality.values()), rel=1e-3)
    (axis,) = found.plot(policy).axes
    lines = {line.get_label(): line for line in axis.lines}
    assert list(lines["quality"].get_ydata()) == list(found.quality.values())
    dashed = [line.get_xdata()[0] for line in axis.lines if line.get_linestyle() == "--"]
    assert dashed == layers
    assert "best by layer" in repr(found)


def test_intervals_follow_from_the_seed_and_hold_the_mean():
    from reroute_kernels.intervals import bootstrap_intervals

    values = torch.rand(3, 50, dtype=torch.float64)
    first, again, other = (bootstrap_intervals(values, seed) for seed in (1, 1, 2))
    assert first == again != other
    for (mean, low, high), row in zip(first, values, strict=True):
        assert mean == row.mean().item()
        error = 1.96 * row.std().item() / 50**0.5  # the normal interval, which bootstrap's is near
        assert low == pytest.approx(mean - error, abs=0.25 * error)
        assert high == pytest.approx(mean + error, abs=0.25 * error)
