"""The comparison on a pretrained decoder, without its weights: items, the measurement on a tiny model, figures."""

import json
import re
import time

import numpy as np
import pytest
import torch
import transformers
from torch import nn

import reroute_kernels as rk
from bench.pretrained import measure, passages, report, runs, summary
from bench.pretrained.passages import KINDS, TOKENS, make_item
from bench.pretrained.runs import PAPER, UNROUTED, Run

IMAGE, LAYERS = 16, 24
VOCABULARY: dict[str, int] = {"<image>": IMAGE}


def encode(text):
    """One token a word, with the space before it."""
    found = []
    for match in re.finditer(r"\s?\w+|\s|\S", text):
        found.append((VOCABULARY.setdefault(match[0], IMAGE + len(VOCABULARY)), *match.span()))
    return found


@pytest.fixture(scope="module")
def items():
    return {kind: [make_item(kind, number, 0, encode) for number in range(12)] for kind in KINDS}


@pytest.fixture(scope="module")
def config():
    return transformers.LlavaConfig(
        text_config={
            "model_type": "llama",
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "vocab_size": 1024,
            "initializer_range": 0.2,
        },
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": 24,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "image_size": 28,
            "patch_size": 14,
        },
        image_token_index=IMAGE,
    )


@pytest.fixture(scope="module")
def model(config):
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    model.lm_head = measure.Float32Head(model.lm_head)
    model.model.get_image_features = measure.Handed()
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_items_hold_their_answer_once(kind, items):
    words = {number: text for text, number in VOCABULARY.items()}
    for item in items[kind]:
        passage = "".join(words[each] for each in item.passage)
        question = "".join(words[each] for each in item.question)
        assert len(item.passage) == TOKENS
        assert item.answer in item.candidates
        assert len(set(item.candidates)) == len(item.candidates) == {"needle": 5, "facts": 4, "list": 12}[kind]
        assert item.chance == 1 / len(item.candidates)
        assert item.answer not in item.question
        assert set(item.candidates) <= set(item.passage)
        assert {item.passage[place] for place in item.evidence} == {item.answer}
        assert set(item.evidence) <= set(item.sentence)
        told = "".join(words[item.passage[place]] for place in item.sentence)
        asked = question.rpartition("..." if kind == "list" else "Answer:")[2].strip()
        assert f"{asked}{words[item.answer]}" in told
        assert passage.count(f"{asked}{words[item.answer]}") == 1
    assert len({item.passage for item in items[kind]}) == 12
    assert len({item.answer for item in items[kind]}) > 4


def test_items_are_drawn_by_number_and_seed(items):
    assert make_item("list", 3, 0, encode) == items["list"][3]
    assert make_item("list", 3, 1, encode) != items["list"][3]
    split = passages.WORDS[0]

    def encode_otherwise(text):
        return [*encode(text), *([(1, len(text), len(text))] if text == f" {split}" else [])]

    asked = {make_item("needle", number, 0, encode_otherwise).answer for number in range(60)}
    assert VOCABULARY[f" {split}"] not in asked
    with pytest.raises(ValueError, match="a passage must have 208 tokens with the answer in them, got 5 of facts"):
        make_item("facts", 0, 0, lambda text: encode(text) if len(text) < 40 else encode(text)[:5])


@pytest.mark.parametrize("plan", runs.PLANS, ids=lambda plan: plan.name)
def test_runs_match_in_tokens_and_flops(plan, config):
    of_runs = runs.policies(config, (1, 4, 6, 8), plan)
    for run, policy in of_runs.items():
        if policy is None:
            assert run == UNROUTED
            continue
        assert policy.action == {"remove": "remove", "freeze, same FLOPs": "freeze"}.get(run.way, "reroute")
        tokens = rk.cost(config, policy, runs.QUESTION_TOKENS, TOKENS).average_visual_tokens
        assert tokens <= run.budget * TOKENS + 1e-9
        if policy.action != "freeze":
            assert tokens > 0.95 * run.budget * TOKENS
    budget = plan.some_budgets[0]
    remembered = of_runs[Run("fastv", "memory 0.3", budget)]
    assert remembered.schedule == of_runs[Run("fastv", PAPER, budget)].schedule
    assert remembered.ranking == rk.rankings.Remembered(rk.rankings.LastQuery(), 0.3)
    if plan == runs.FIRST:
        calibrated = of_runs[Run("fastv", "calibrated layers", budget)]
        assert [stage.layer for stage in calibrated.schedule] == [1, 4, 6, 8]
    else:
        late = [of_runs[Run("late", way, budget)] for way in ("remove", PAPER)]
        assert [[stage.layer for stage in policy.schedule] for policy in late] == [[14], [14, 17, 19, 21]]


def test_answers_of_logits(items):
    """The first item's answer is likeliest, the second's among its candidates, the third's nowhere."""
    asked = items["needle"][:3]
    logits = torch.zeros(3, 1024)
    other = [next(each for each in item.candidates if each != item.answer) for item in asked]
    logits[0, asked[0].answer] = 3
    logits[1, [1, asked[1].answer]] = torch.tensor([9.0, 2.0])
    logits[2, other[2]] = 4
    unrouted = logits.clone()
    unrouted[2, other[2]] = 0
    unrouted[2, asked[2].answer] = 1
    found = measure.answers(logits, unrouted, asked)
    assert found["choice"] == [1, 1, 0]
    assert found["exact"] == [1, 0, 0]
    assert found["same"] == [1, 1, 0]
    expected = nn.functional.kl_div(
        logits.double().log_softmax(-1), unrouted.double().log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    assert found["divergence"] == pytest.approx(expected.tolist(), abs=1e-5)


def test_passage_is_what_the_decoder_reads_as_text(model, items):
    asked = items["facts"][:2]
    found = measure.ask(model, None, measure.inputs_of(model, asked))
    ids = torch.tensor([[*item.passage, *item.question] for item in asked])
    with torch.no_grad():
        expected = model(input_ids=ids).logits[:, -1]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_places_are_those_of_the_attention(model, items):
    """Percentiles and coverage from attention of the model itself."""
    asked = items["facts"][:2]
    inputs = measure.inputs_of(model, asked)
    found = measure.places_by_layer(model, asked, inputs)
    implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = model(**inputs, output_attentions=True).attentions
    model.set_attn_implementation(implementation)
    for layer, attention in enumerate(maps):
        for row, item in enumerate(asked):
            looks = attention[row, :, -1, :TOKENS].mean(0)
            above = np.mean([(looks > looks[place]).sum().item() for place in item.evidence])
            assert found["rank"][row][layer] == pytest.approx(1 - above / (TOKENS - 1), abs=1e-4)
            best = set(looks.topk(TOKENS // 4).indices.tolist())
            share = np.mean([place in best for place in item.sentence])
            assert found["coverage"][row][layer] == pytest.approx(share, abs=1e-4)


def test_a_measurement_goes_on_where_it_stopped(model, items, tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "WITHOUT_LAYERS", 1)
    path, header = tmp_path / "rows.jsonl", {"seed": 0}
    few = {UNROUTED: None, Run("fastv", "remove", 1 / 3): rk.Policy.parse("remove:2:0.25")}
    later = time.monotonic() + 600
    rows = measure.Rows(path, header)
    measure.measure(model, encode, rows, few, 0, 1, later)
    measure.measure_without_layers(model, encode, rows, later)
    whole = path.read_text()
    assert len(rows.found) == 3 * (2 + 1 + LAYERS)
    path.write_text(whole[: len(whole) // 2])
    again = measure.Rows(path, header)
    assert 0 < len(again.found) < len(rows.found)
    measure.measure(model, encode, again, few, 0, 1, time.monotonic() - 1)
    assert measure.Rows(path, header).found == again.found
    measure.measure(model, encode, again, few, 0, 1, later)
    measure.measure_without_layers(model, encode, again, later)
    assert sorted(path.read_text().splitlines()) == sorted(whole.splitlines())
    with pytest.raises(ValueError, match="must hold rows of this measurement, got those of another"):
        measure.Rows(path, {"seed": 1})
    found = summary.resemblance(again.found)
    assert [len(found[name]["facts"]) for name in ("rank", "coverage")] == [LAYERS, LAYERS]
    assert list(found["without layers"]["layers"]) == [str(layer) for layer in range(LAYERS)]
    assert found["without layers"]["items"] == 3


def synthetic(of_runs, batches=3):
    """Rows in which rerouting is always right, removing in every other item, and one batch is not whole."""
    rows = {}
    for number, kind in [(number, kind) for number in range(batches) for kind in KINDS]:
        for run in of_runs:
            right = [1.0] * 8 if run.way != "remove" else [1.0, 0.0] * 4
            if run.way == "mixed 0.2":
                right = [0.0] * 8
            apart = [0.5 if run.way == "remove" else 0.1] * 8
            row = {"kind": kind, "run": list(run), "choice": right, "exact": right, "same": right, "divergence": apart}
            rows[f"{kind} {8 * number} {run.name}"] = row
        rows[f"{kind} {8 * number} places"] = {
            "kind": kind,
            "rank": [[0.5] * LAYERS] * 8,
            "coverage": [[0.25] * LAYERS] * 8,
        }
        values = {measure: [0.5] * 8 for measure in summary.MEASURES}
        rows |= {f"{kind} {8 * number} without {layer}": {"kind": kind, "without": layer, **values} for layer in (0, 1)}
    del rows[f"list {8 * (batches - 1)} {list(of_runs)[-1].name}"]
    return rows


@pytest.fixture(scope="module")
def results(config):
    found = {"resemblance": summary.resemblance(synthetic([UNROUTED])), "plans": {}}
    for plan in runs.PLANS:
        of_runs = runs.policies(config, (1, 4, 6, 8), plan)
        found["plans"][plan.name] = summary.summarize(synthetic(of_runs), of_runs, config)
    return found


def test_differences_are_paired_and_of_whole_batches(results):
    first = results["plans"]["first"]
    assert first["items"] == {"needle": 24, "facts": 24, "list": 16}
    by_name = {(run["method"], run["way"], round(run["budget"], 3)): run for run in first["runs"]}
    found = by_name["fastv", PAPER, 0.333]
    assert found["less"] == "remove"
    mean, low, high = found["differences"]["choice"]
    assert (mean, low > 0.3, high < 0.7) == (0.5, True, True)
    assert found["differences"]["divergence"] == pytest.approx((-0.4, -0.4, -0.4))
    assert by_name["fastv", "mixed 0.2", 0.333]["differences"]["choice"] == (-1, -1, -1)
    assert by_name["fastv", "mixed 0.2", 0.333]["less"] == PAPER
    assert "less" not in by_name["fastv", "remove", 0.5]
    with pytest.raises(ValueError, match="rows must hold a batch that all 2 runs have answered, got 0 rows"):
        summary.values_of({}, [UNROUTED, Run("fastv", "remove", 0.5)])


def test_page_says_what_the_figures_say(results, tmp_path):
    conversion = {
        "differences": {"logits": 2e-6},
        "parameters": 157e6,
        "new parameters": 554112,
        "megabytes": 630,
        "seconds": 40,
    }
    qualities = [{"layer": layer, "mean": layer / 30, "low": 0.0, "high": 1.0} for layer in range(3, 24)]
    versions = {"device": "CPU", "threads": 1, "dtype": "bfloat16", "torch": "2", "transformers": "5"}
    told = json.loads(json.dumps(results)) | {
        "conversion": conversion,
        "measured_on": versions,
        "command": "python",
        "calibrated layers": [1, 4, 6, 8],
        "calibration": {"qualities": qualities, "samples": 24, "early": 3},
    }
    report.pretrained_page(told, tmp_path)
    page = (tmp_path / "pretrained.md").read_text()
    assert (
        "By divergence from the unrouted model yes: 16 of 16 comparisons better and 0 worse; by right choices" in page
    )
    assert "Not clearly above chance" not in page
    assert "over 10 pairs of a schedule and a budget: right choices 10 better, 0 worse, 0 undecided; divergence" in page
    assert "divergence from the unrouted model 6 better, 0 worse, 0 undecided" in page
    assert "at any: none at the larger budgets, none at the published ones." in page
    assert "in the second plan neither alignment makes it better; in the first plan neither alignment" in page
    assert "| mixed 0.2 | **-100.0 [-100.0, -100.0]** |" in page
    assert "Layers before 14 lie between 0.10 and 0.43; the best is layer 23 with 0.77." in page
    assert (tmp_path / "pretrained.svg").stat().st_size > 1000
    for line in report.plan_section():
        assert line in page
    report.pretrained_page(None, tmp_path)
    assert (tmp_path / "pretrained.md").read_text().startswith(f"{report.TITLE}\n\nNo results yet.")


def test_lower_divergence_is_better():
    intervals = [(-0.4, -0.5, -0.3), (0.1, -0.1, 0.2), (0.3, 0.1, 0.4)]
    assert report.better("divergence", intervals) == (1, 1, 1)
    assert report.better("choice", intervals[:1]) == (0, 1, 0)
