"""The grounding benchmark: its scenes, its measures, its training, and the model that ships."""

import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import reroute_kernels as rk
from bench.grounding import answers, batches, benchmark, checkpoint, example, metrics, policies, scenes, train
from bench.grounding.scenes import Object, Question, Scene

FOLDER = checkpoint.FOLDER


def scene_of(*objects, brightness=0):
    return Scene(np.full((scenes.SIDE, scenes.SIDE, 3), brightness, np.uint8), objects, night=False)


def put(name, left, top, side=30):
    size, colour, shape = name.split()
    return Object(size, colour, shape, (left, top, left + side, top + side))


def test_scenes_follow_from_the_seed():
    first, again = (scenes.held_out_scene(3, 12) for _ in range(2))
    assert np.array_equal(first.image, again.image)
    assert first.objects == again.objects
    assert not np.array_equal(first.image, scenes.held_out_scene(3, 13).image)
    assert not np.array_equal(first.image, scenes.held_out_scene(4, 12).image)


@pytest.mark.parametrize("number", range(16))
def test_objects_differ_and_do_not_overlap(number):
    scene = scenes.held_out_scene(0, number)
    assert len(scene.objects) == 1 + number % 8
    assert len({each.name for each in scene.objects}) == len(scene.objects)
    for each in scene.objects:
        left, top, right, bottom = each.box
        assert 0 < left < right <= scenes.SIDE
        assert 0 < top < bottom <= scenes.SIDE
    boxes = [each.box for each in scene.objects]
    overlaps = [metrics.overlap(one, other) for one, other in product(boxes, boxes) if one is not other]
    assert not any(overlaps)


def test_backgrounds_of_held_out_scenes_are_apart(monkeypatch):
    """The photos' left two thirds are black, so a training scene without objects is, too."""
    photos = []
    for photo in scenes._photos():
        pixels = np.array(photo)
        pixels[:, : photo.width * 2 // 3] = 0
        photos.append(Image.fromarray(pixels))
    monkeypatch.setattr(scenes, "_photos", lambda: photos)
    random = np.random.default_rng(0)
    assert not any(scenes.make_scene(random, 0).image.any() for _ in range(50))
    assert all(scenes.make_scene(random, 0, held_out=True).image.any() for _ in range(50))


def test_questions_have_one_answer():
    middle = put("small red ring", 80, 80)
    left, corner = put("large blue cross", 20, 80), put("small green star", 140, 20)
    asked = {question.text: question.answer for question in scene_of(middle, left, corner).questions()}
    assert asked["box of the small red ring"] == "0.42 0.42 0.58 0.58"
    assert asked["what is left of the small red ring"] == "blue cross"
    assert asked["what is right of the large blue cross"] == "red ring"
    assert asked["what colour is the object at the top right of the small red ring"] == "green"
    assert asked["what colour is the object at the bottom left of the small green star"] == "red"
    assert asked["how many objects"] == "three"
    assert asked["is it day or night"] == "day"
    assert "what is above the small red ring" not in asked
    rival = put("large white circle", 40, 60)
    assert "what is left of the small red ring" not in {
        question.text for question in scene_of(middle, left, corner, rival).questions()
    }


def test_words_of_boxes_and_back():
    assert scenes.box_words((48, 96, 144, 192)) == "0.24 0.50 0.76 1.00"
    assert scenes.read_box("0.24 0.50 0.76 1.00") == pytest.approx((46.08, 96, 145.92, 192))
    for text in (
        "",
        "red ring",
        "0.10 0.20 0.30",
        "0.10 0.20 0.30 0.40 0.50",
        "0.30 0.20 0.10 0.40",
        "0.3 0.2 0.4 0.4",
    ):
        assert scenes.read_box(text) is None
    assert all(word in checkpoint.TOKEN_ID for word in scenes.COORDINATES)


def test_tokens_of_an_object():
    assert put("small red ring", 16, 32, side=16).tokens() == [2 * 12 + 1]
    assert put("small red ring", 8, 32, side=16).tokens() == [24, 25]
    assert put("large red ring", 16, 16, side=32).tokens() == [13, 14, 25, 26]


def test_scores():
    question = Question("box", "", "", put("small red ring", 0, 0, side=48))
    assert metrics.score(question, "0.00 0.00 0.25 0.25".replace("0.25", "0.24"))["iou"] == pytest.approx(0.9216)
    assert metrics.score(question, "0.00 0.00 0.24 0.12") == pytest.approx(
        {"acc@0.5": 0, "acc@0.3": 1, "iou": 0.4608, "centre": 1}
    )
    assert set(metrics.score(question, "red ring").values()) == {0.0}
    assert metrics.score(Question("light", "", "day"), "day") == {"exact": 1.0}
    assert metrics.score(Question("light", "", "day"), "day day") == {"exact": 0.0}


def test_intervals_are_those_of_a_binomial():
    values = np.arange(1000) % 4 == 0
    mean, low, high = metrics.interval(values)
    assert mean == 0.25
    spread = 1.96 * (0.25 * 0.75 / 1000) ** 0.5
    assert (mean - low, high - mean) == pytest.approx((spread, spread), rel=0.15)
    assert metrics.interval([1, 1, 1]) == (1, 1, 1)


def test_both_actions_have_the_same_budget():
    for method, keep in product(policies.METHODS, policies.KEEPS):
        fastv, *averages = (
            rk.cost(policies.decoder(), policies.policy_of(way), 7, 144).average_visual_tokens
            for way in (
                policies.Way("fastv", "remove", keep),
                policies.Way(method, "remove", keep),
                policies.Way(method, "reroute", keep),
            )
        )
        assert abs(averages[0] - averages[1]) <= 1 / 16
        assert fastv - 0.5 <= min(averages) <= max(averages) <= fastv


def test_batch_is_what_the_processor_makes():
    """Questions that share an image in training see the same tokens as each alone."""
    torch.manual_seed(0)
    model = checkpoint.make_model(0).eval()
    trainee = train.Trainee(0, torch.device("cpu"), compiled=False)
    trainee.model.load_state_dict(model.state_dict())
    trainee.model.eval()
    items = [scenes.held_out_scene(0, number) for number in (2, 5)]
    asked = [scene.questions()[::2][:5] for scene in items]
    batch = batches.make_batch(items, asked)
    with torch.no_grad():
        packed = trainee.answer(trainee.see(batch), batch)
        alone = []
        for scene, questions in zip(items, asked, strict=True):
            for question in questions:
                words = [checkpoint.TOKEN_ID[word] for word in f"{question.text} {question.answer}".split()]
                ids = torch.tensor([[checkpoint.TOKEN_ID["<s>"], *[checkpoint.TOKEN_ID["<image>"]] * 144, *words]])
                logits = model(input_ids=ids, pixel_values=batches.pixels_of([scene.image])).logits[0]
                alone.append(logits[-1 - len(question.answer.split()) :])
    torch.testing.assert_close(packed, torch.cat(alone), atol=2e-4, rtol=0)


def test_training_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "VISION_BATCH", 2)
    monkeypatch.setattr(train, "BATCH", 2)
    monkeypatch.setattr(train, "EVALUATED", 2)
    cpu = torch.device("cpu")
    whole = train.train(tmp_path / "whole", cpu, 0, 1, 3, compiled=False)

    class Interrupted(Exception):
        pass

    keep, steps = torch.save, []

    def save_then_stop(state, path):
        keep(state, path)
        steps.append(path)
        Path(path).rename(tmp_path / "parts" / "state.pt")
        raise Interrupted

    monkeypatch.setattr(torch, "save", save_then_stop)
    for _ in range(2):  # after the only step of the first phase, and at the change to the second
        with pytest.raises(Interrupted):
            train.train(tmp_path / "parts", cpu, 0, 1, 3, compiled=False)
    monkeypatch.setattr(torch, "save", keep)
    parts = train.train(tmp_path / "parts", cpu, 0, 1, 3, compiled=False)
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, parts.model.state_dict()[name]), name
    first, second = ((tmp_path / run / "training.jsonl").read_text().splitlines() for run in ("whole", "parts"))
    assert len(first) == len(second) == 2
    assert first[-1] == second[-1]


def test_followed_tokens():
    target = put("small red ring", 0, 0, side=32)  # tokens 0, 1, 12, 13
    item = answers.Item(0, scene_of(target), Question("box", "", "", target))
    selected = [[{0, 1, 50}, {1, 12, 50}, {0, 1, 12, 13}]]
    first, second, third = benchmark.follow([item], selected, [2, 4, 8])
    assert first == {"layer": 2, "objects": 0.5, "seen": 1.0, "returned": 0.0, "overlap": None}
    assert second == {"layer": 4, "objects": 0.5, "seen": 1.0, "returned": 0.5, "overlap": 0.5}
    assert third == {"layer": 8, "objects": 1.0, "seen": 1.0, "returned": 0.75, "overlap": 0.4}


def test_example_agrees_with_the_rates():
    target = put("small red ring", 0, 0, side=48)
    question = Question("box", "", "", target)
    items = [answers.Item(number, scene_of(target, brightness=128), question) for number in range(4)]
    right, wrong = "0.00 0.00 0.24 0.24", "0.50 0.50 0.60 0.60"
    given = {
        policies.UNROUTED: [right, wrong, right, right],
        example.REROUTE: [right, right, right, wrong],
        example.REMOVE: [right, wrong, wrong, right],
    }
    assert example.pick(items, given, better=example.REROUTE, worse=example.REMOVE) == 2
    assert example.pick(items, given, better=example.REMOVE, worse=example.REROUTE) == 3
    outside = [answers.Item(0, scene_of(target, brightness=brightness), question) for brightness in (95, 161)]
    shows_it = {way: 3 * each[2:3] for way, each in given.items()}
    assert example.pick([*outside, items[2]], shows_it, better=example.REROUTE, worse=example.REMOVE) == 2
    given[example.REMOVE] = [right] * 4
    with pytest.raises(ValueError, match=r"no scene shows that reroute fastv .* is better than remove"):
        example.pick(items, given, better=example.REROUTE, worse=example.REMOVE)


@pytest.fixture(scope="module")
def answerer():
    return answers.Answerer()


def test_shipped_model_grounds(answerer):
    """The benchmark measures accuracy on more scenes; this test checks that the shipped weights reach it."""
    items = [item for item in answers.held_out_items(96) if item.question.kind == "box"]
    hits = []
    for places in answers.batches(items):
        inputs = answerer.inputs([items[place] for place in places])
        for place, answer in zip(places, answerer.answer(inputs), strict=True):
            hits.append(metrics.score(items[place].question, answer)["acc@0.5"])
    assert len(hits) > 40
    rate = json.loads((FOLDER / "example.json").read_text())["rates"]["unrouted"][0]
    assert rate >= 0.85
    spread = (rate * (1 - rate) / len(hits)) ** 0.5
    assert np.mean(hits) >= rate - 4 * spread


@pytest.mark.parametrize("way", [example.REMOVE, example.REROUTE], ids=lambda way: way.action)
def test_policies_route_the_shipped_model(answerer, way):
    (item,) = [item for item in answers.held_out_items(3) if item.question.kind == "box"][:1]
    inputs = answerer.inputs([item])
    with rk.models.apply(answerer.model, policies.policy_of(way)) as routing:
        answerer.answer(inputs)
    stages = routing.trace.stages
    assert [len(stage.selected[0]) for stage in stages] == [36] * len(stages)
    assert len(stages) == (1 if way.action == "remove" else 4)


def test_shipped_files():
    assert (FOLDER / "model.safetensors").stat().st_size < 16e6
    assert json.loads((FOLDER / "config.json").read_text()) == checkpoint.CONFIG
    log = [json.loads(line) for line in (FOLDER / "training.jsonl").read_text().splitlines()]
    assert log[0]["seed"] == train.SEED
    assert (log[0]["vision_steps"], log[0]["steps"]) == (train.VISION_STEPS, train.STEPS)
    assert log[-1]["step"] == train.STEPS
