"""Training of the connector between a pretrained tower and decoder, on a tiny model of random weights."""

import json
import re
import time

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file

import reroute_kernels as rk
from bench.grounding import scenes
from bench.pages.report import CONNECTOR
from bench.pretrained import chart, connector, convert, packing, train
from bench.pretrained.connector_report import connector_section
from bench.pretrained.measure import Rows
from bench.pretrained.runs import UNROUTED, Run
from reroute_kernels.boxes import overlap

SIDE, PATCH, GRID, IMAGE = 56, 14, 4, 1
VOCABULARY = {"": 0, "<image>": IMAGE}
ONE_TOKEN = re.compile(r"<\|im_start\|>| ?[A-Za-z]+|\d")


def encode(text):
    """One token a word, with the space before it, and one a digit."""
    return [VOCABULARY.setdefault(word, len(VOCABULARY)) for word in ONE_TOKEN.findall(text)]


def new_model():
    config = transformers.LlavaConfig(
        text_config={
            "model_type": "llama",
            "hidden_size": 48,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 128,
            "initializer_range": 0.2,
            "tie_word_embeddings": True,
        },
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "image_size": SIDE,
            "patch_size": PATCH,
            "initializer_range": 0.5,
        },
        image_token_index=IMAGE,
        image_seq_length=GRID**2,
        vision_feature_layer=-2,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return transformers.LlavaForConditionalGeneration(config).eval()


def new_trainee(**options):
    return train.Trainee(new_model(), encode, SIDE, train.Options(**{"naming": 3, "rank": 4, **options}))


def scatter_adapter(trainee):
    """Weights of LoRA that change what the decoder says, and which bfloat16 can hold."""
    torch.manual_seed(1)
    for each in trainee.trained.values():
        each.data = (each.data + 0.1 * torch.randn_like(each)).bfloat16().float()


def prompt(target):
    return [*encode(packing.BEGIN), *[IMAGE] * GRID**2, *encode(packing.question_text(target))]


@pytest.fixture(scope="module")
def pictures():
    return [scenes.held_out_scene(0, number) for number in (2, 5)]


def test_text_of_a_box_reads_back():
    for number in range(40):
        for each in scenes.held_out_scene(3, number).objects:
            text = chart.box_text(each.box)
            assert overlap(chart.read_box(text), each.box) > 0.6
            assert len(encode(text)) == len(chart.PARTS)
            assert [
                encode(tokens[part]) for tokens, part in zip(chart.PARTS, chart.box_parts(each.box), strict=True)
            ] == [[token] for token in encode(text)]
    assert chart.box_text((0, 0, 192, 192)) == " N n99"
    for text in ("", " C f4", " C f40", "C f44", " c f44", " C f444", " C F44"):
        assert chart.read_box(text) is None


def test_pixels_are_those_of_the_processor(pictures):
    settings = convert.processor_files(convert.SIDE, convert.PATCH, convert.MEAN, convert.STD)[
        "preprocessor_config.json"
    ]
    settings = {name: value for name, value in settings.items() if not name.endswith(("_type", "_class"))}
    processor = transformers.models.clip.image_processing_pil_clip.CLIPImageProcessorPil(**settings)
    images = [scene.image for scene in pictures]
    expected = processor([Image.fromarray(each) for each in images], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(packing.pixels_of(images, convert.SIDE), expected, atol=1e-5, rtol=0)


def test_visual_tokens_of_an_object():
    target = scenes.Object("small", "red", "ring", (48, 0, 82, 34))  # of fields of 48 pixels
    assert packing.tokens_of(target, GRID) == [1]
    assert packing.tokens_of(target, scenes.GRID) == target.tokens()


@torch.no_grad()
def test_packed_questions_are_what_each_is_alone(pictures):
    """Logits and greedy answers of the plain model, with the adapter merged, one question a prompt."""
    trainee = new_trainee()
    scatter_adapter(trainee)
    packed = packing.pack(pictures, encode, SIDE, GRID)
    logits, answers = trainee.logits(trainee.features(packed), packed), trainee.answers(packed)
    written = trainee.written
    model = trainee.adapted.merge_and_unload()
    asked = [(scene, target) for scene in pictures for target in scene.objects]
    for number, (scene, target) in enumerate(asked):
        pixels = packing.pixels_of([scene.image], SIDE)
        ids = prompt(target)
        whole = torch.tensor([[*ids, *encode(chart.box_text(target.box))[:-1]]])
        expected = model(input_ids=whole, pixel_values=pixels).logits[0, len(ids) - 1 :]
        torch.testing.assert_close(logits[number], expected, atol=1e-4, rtol=1e-4)
        given = model.generate(
            input_ids=torch.tensor([ids]), pixel_values=pixels, max_new_tokens=4, do_sample=False, eos_token_id=None
        )[0, len(ids) :].tolist()
        assert answers[number] == "".join(written.get(each, "?") for each in given)
    assert len(set(answers)) > 1


@torch.no_grad()
def test_tokens_that_are_left_out_are_not_seen(pictures):
    trainee = new_trainee()
    scatter_adapter(trainee)
    kept = packing.kept_tokens(pictures, 12, np.random.default_rng(0))
    for row, scene in zip(kept.tolist(), pictures, strict=True):
        assert row == sorted(set(row))
        assert len(row) < 144
        assert {each for target in scene.objects for each in target.tokens()} <= set(row)
    kept = torch.tensor([[0, 2, 3, 7, 9], [1, 2, 8, 14, 15]])
    packed = packing.pack(pictures, encode, SIDE, GRID, kept)
    logits, answers = trainee.logits(trainee.features(packed), packed), trainee.answers(packed)
    model, number = trainee.adapted.merge_and_unload(), 0
    for scene, row in zip(pictures, kept, strict=True):
        for target in scene.objects:
            ids = prompt(target)
            seen = torch.ones(1, len(ids), dtype=torch.long)
            seen[0, 1 : 1 + GRID**2] = 0
            seen[0, 1 + row] = 1
            pixels, places = packing.pixels_of([scene.image], SIDE), torch.arange(len(ids))[None]
            inputs = {"input_ids": torch.tensor([ids]), "pixel_values": pixels, "attention_mask": seen}
            expected = model(**inputs, position_ids=places).logits[0, -1]
            torch.testing.assert_close(logits[number, 0], expected, atol=1e-4, rtol=1e-4)
            assert answers[number].startswith(trainee.written.get(int(expected.argmax()), "?"))
            number += 1


RUNS = {
    UNROUTED: None,
    Run("fastv", "remove", 0.5): rk.Policy.parse("remove:1:0.25"),
    Run("fastv", "reroute", 0.5): rk.Policy.parse("1:0.25"),
}


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """Of a connector whose answers mean nothing: unrouted, removing and rerouting."""
    trainee = new_trainee()
    scatter_adapter(trainee)
    found = {"held out": connector.unrouted(trainee, 4), "measured_on": {"processor": "some CPU"}}
    model = trainee.adapted.merge_and_unload()
    rows = Rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", {})
    given = (model, encode, SIDE, trainee.written, RUNS, rows)
    connector.measure(*given, 8, time.monotonic() - 1)
    assert not rows.found
    connector.measure(*given, 8, time.monotonic() + 600)
    assert len(rows.found) == len(RUNS)
    found["comparison"] = connector.summarize(rows.found, RUNS, model.config)
    rows.found.pop(f"0 {UNROUTED.name}")
    assert connector.summarize({**rows.found, **BY_HAND}, RUNS, model.config)["items"] == 8
    return found


def by_hand(first, run):
    """Unrouted always right, removing never a box, rerouting right in every other scene."""
    numbers = range(first, first + 8)
    held_out = [scenes.held_out_scene(connector.SEED, number) for number in numbers]
    right = [
        chart.box_text(connector.asked_object(scene, number).box)
        for scene, number in zip(held_out, numbers, strict=True)
    ]
    wrong = {"-": [], "remove": range(8), "reroute": range(0, 8, 2)}[run.way]
    return {"answers": ["?" if place in wrong else answer for place, answer in enumerate(right)]}


BY_HAND = {f"8 {run.name}": by_hand(8, run) for run in RUNS}


def test_measures_of_the_connector(record):
    held_out, compared = record["held out"], record["comparison"]
    assert (held_out["scenes"], held_out["questions"]) == (4, 1 + 2 + 3 + 4)
    assert held_out["chance"] == pytest.approx(4 / 10)
    assert held_out["blind"] <= 0.2
    assert list(held_out["acc@0.5 by objects"]) == ["1", "2", "3", "4"]
    assert compared["items"] == 8
    assert compared["runs"][0]["same"] == (1, 1, 1)
    found = connector.summarize(BY_HAND, RUNS, new_model().config)["runs"]
    assert [run["acc@0.5"][0] for run in found] == [1, 0, 0.5]
    assert [run["same"][0] for run in found] == [1, 0, 0.5]
    assert found[2]["differences"]["acc@0.5"][0] == 0.5
    assert "differences" not in found[1]


def test_section_says_what_the_figures_say(record):
    step = {"step": 160, "images": 1280, "seconds": 300, "phase": "naming", "names": [0.8, 0.7, 0.6, 0.3, 0.2, 0.5]}
    last = step | {"step": 560, "images": 2080, "seconds": 2300, "phase": "answering", "mean": 1.5, "objects": 4}
    last["tokens"] = 40
    start = {"event": "start", "batch": 2, "rank": 8, "naming": 160, "objects": 2, "threads": 1, "torch": "2"}
    seen = {name: [0.125, 0.1, 0.2] for name in ("acc@0.5", "any", "iou")}
    log = [start, step, {"event": "held out", "step": 360, "images": 1680, **seen}, last]
    told = json.loads(json.dumps(record))
    section = "\n".join(connector_section(told, log))
    assert "800 scenes" in section
    assert "2 whole images in every 4th step, and in the others 8 of which" in section
    assert "(2.5 s a scene)" in section
    whole = step | {"step": 360, "images": 1680, "seconds": 1700, "phase": "answering"}
    section = "\n".join(connector_section(told, [*log[:-1], whole, last]))
    assert "for the first 400 scenes, 2 whole images a step (3.5 s a scene); then" in section
    assert "(1.5 s a scene)" in section
    assert "at the 1.5 s of a scene" in section
    assert "| 360 | 400 | 12.5 [10.0, 20.0] |" in section
    assert "| fastv | reroute less remove |" in section
    del told["comparison"]
    assert "Removing and rerouting were not compared on it" in "\n".join(connector_section(told, log))


def test_loss_is_that_of_the_right_answers():
    logits = torch.zeros(1, 4, 128)
    answers = torch.tensor([[0, 5, 3, 3]])
    parts = [torch.tensor([encode(token)[0] for token in tokens]) for tokens in chart.PARTS]
    assert train.answer_loss(logits, parts, answers).tolist()[0] == pytest.approx([np.log(128)] * 4)
    for place, number in enumerate(answers[0]):
        logits[0, place, parts[place][number]] = 9
    right = train.answer_loss(logits, parts, answers)
    logits[0, 1] = 0
    logits[0, 1, parts[1][6]] = 9
    near = train.answer_loss(logits, parts, answers)
    logits[0, 1] = 0
    logits[0, 1, parts[1][9]] = 9
    far = train.answer_loss(logits, parts, answers)
    assert right[0, 1] < near[0, 1] < far[0, 1]
    assert torch.equal(right[:, 2:], far[:, 2:])


def test_loss_falls_in_both_phases(tmp_path):
    trainee = new_trainee(naming=12, batch=4)
    tower = {name: each.clone() for name, each in trainee.llava.model.vision_tower.state_dict().items()}
    run = train.Run(trainee, tmp_path)
    told = [run.step() for _ in range(80)]
    for phase, count in (("naming", 3), ("answering", 6)):
        losses = [each["loss"] for each in told if each["phase"] == phase]
        assert sum(losses[-count:]) < 0.9 * sum(losses[:count])
    assert all(torch.equal(each, tower[name]) for name, each in trainee.llava.model.vision_tower.state_dict().items())


def test_training_goes_on_exactly(tmp_path, monkeypatch):
    """Broken off in each phase, in the midst of writing the state and between two of them."""
    monkeypatch.setattr(train, "LOGGED", 1)
    monkeypatch.setattr(train, "KEPT", 2)
    monkeypatch.setattr(train, "NAMING_BATCH", 2)

    def new_run(name):
        return train.Run(new_trainee(), tmp_path / name)

    whole = new_run("whole")
    whole.train(60, 4, 2, steps=9)

    class Interrupted(Exception):
        pass

    write, step = train.save_file, train.Run.step
    for broken in (2, 3, 5, 8):
        run = new_run("parts")

        def step_or_stop(self, broken=broken):
            if self.now["step"] == broken:
                raise Interrupted
            return step(self)

        with monkeypatch.context() as patched:
            patched.setattr(train.Run, "step", step_or_stop)
            with pytest.raises(Interrupted):
                run.train(60, 4, 2, steps=9)

    def write_half(tensors, path, metadata):
        path.write_bytes(b"half")
        raise Interrupted

    run = new_run("parts")
    assert run.now["step"] == 8
    with monkeypatch.context() as patched:
        patched.setattr(train, "save_file", write_half)
        with pytest.raises(Interrupted):
            run.train(60, 4, 2, steps=9)
    assert train.save_file is write
    parts = new_run("parts")
    parts.train(60, 4, 2, steps=9)
    for name, each in whole.trainee.trained.items():
        assert torch.equal(each, parts.trainee.trained[name]), name
    logs = [
        [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in file.open()]
        for file in (tmp_path / name / train.LOG for name in ("whole", "parts"))
    ]
    assert logs[0] == logs[1]
    assert [row["step"] for row in logs[0] if "loss" in row] == list(range(1, 10))
    assert [row["questions"] for row in logs[0] if row.get("event") == "held out"] == [3, 3]
    with pytest.raises(
        ValueError, match=r"must hold a run with the options .*'rank': 8.*, got .*'rank': 4.*--no-resume"
    ):
        train.Run(new_trainee(rank=8), tmp_path / "parts")
    anew = train.Run(new_trainee(rank=8), tmp_path / "parts", resume=False)
    assert (anew.now["step"], anew.log.lines) == (0, 1)


def test_shipped_adapter():
    """Its figures are measured with the base, which is not here; its weights have the base's shapes."""
    path = CONNECTOR / train.ADAPTER
    assert path.stat().st_size < 4e6
    weights = load_file(path)
    assert {each.dtype for each in weights.values()} == {torch.bfloat16}
    lora = {name: each for name, each in weights.items() if "lora_" in name}
    assert len(lora) == 30 * 4 * 2
    assert {each.shape for each in lora.values()} == {(8, 576), (576, 8), (192, 8)}
    assert sum(each.numel() for name, each in weights.items() if name not in lora) == 554112
    assert all("multi_modal_projector" in name for name in weights.keys() - lora.keys())
    config = json.loads((CONNECTOR / "adapter_config.json").read_text())
    assert (config["target_modules"], config["base_model_name_or_path"]) == (train.TARGETS, "build/pretrained")


@torch.no_grad()
def test_saved_adapter_loads_into_the_plain_model(tmp_path, pictures):
    import peft

    trainee = new_trainee()
    scatter_adapter(trainee)
    train.save(trainee, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    count = sum(each.numel() for each in trainee.trained.values())
    assert 2 * count < (tmp_path / "adapter_model.safetensors").stat().st_size < 2 * count + 10_000
    again = new_trainee()
    train.begin_with(again, tmp_path)
    assert all(torch.equal(each, again.trained[name]) for name, each in trainee.trained.items())
    with pytest.raises(ValueError, match=r"rank must be that of .*, 4, got 8"):
        train.begin_with(new_trainee(rank=8), tmp_path)
    loaded = peft.PeftModel.from_pretrained(new_model(), tmp_path).merge_and_unload()
    target = pictures[0].objects[0]
    inputs = {"input_ids": torch.tensor([prompt(target)]), "pixel_values": packing.pixels_of([pictures[0].image], SIDE)}
    mine = trainee.llava(**inputs).logits
    assert not torch.allclose(new_model()(**inputs).logits, mine, atol=1e-2)
    torch.testing.assert_close(loaded(**inputs).logits, mine, atol=1e-4, rtol=1e-4)


def test_scores_tell_the_object_asked_for_from_others():
    scene = scenes.held_out_scene(0, 2)
    first, _, third = (chart.box_text(each.box) for each in scene.objects)
    answers = (first, third, "?? 4")
    found = [train.score(scene, *each) for each in zip(scene.objects, answers, strict=True)]
    assert [row["acc@0.5"] for row in found] == [1, 0, 0]
    assert [row["any"] for row in found] == [1, 1, 0]
    assert found[0]["iou"] > 0.6
    assert found[2]["iou"] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--minutes", "0"], "--minutes must be above 0, got 0.0"),
        (["--every", "0"], "--every and --scenes must be at least 1, got 0 and 32"),
        (["--rank", "0"], "rank must be in [1, 256], got 0"),
        (["--batch", "-1"], "batch must be in [1, 4096], got -1"),
        (["--objects", "9"], "objects must be in [1, 8], got 9"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
    ],
)
def test_bad_options_are_refused(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["train", *arguments])
    with pytest.raises(SystemExit):
        train.main()
    assert message in capsys.readouterr().err


def test_checkpoint_and_vocabulary_are_needed(tmp_path):
    with pytest.raises(FileNotFoundError, match="must hold the converted checkpoint: make pretrained"):
        train.load(tmp_path, torch.device("cpu"), torch.float32)
    with pytest.raises(ValueError, match="every word of an answer must be one token"):
        train.Trainee(new_model(), lambda text: encode(text) * (1 + ("star" in text)), SIDE, train.Options())
