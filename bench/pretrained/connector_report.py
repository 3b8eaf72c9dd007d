"""The section of docs/pretrained.md about the trained connector."""

from __future__ import annotations

from collections.abc import Sequence

from bench.grounding.metrics import cell, pc, signed
from bench.pages.markdown import table

from . import train
from .chart import FIELDS
from .packing import SPARE

OUTLOOK = (10_000, 80_000)
"""Scenes that the estimate reckons with: those of the small model, and an eighth of them."""
COMPARED = {"acc@0.5": "ACC@0.5, %", "iou": "mean IoU, %", "same": "answers that are the unrouted model's, %"}


def connector_section(record: dict, log: Sequence[dict]) -> list[str]:
    """Lines of the section.

    Args:
        record: of `bench.pretrained.connector`.
        log: of the training.
    """
    return ["## A connector", "", *_training(record, log), *_reached(record, log), *_outlook(log), *_routed(record)]


def _steps(log: Sequence[dict], phase: str) -> list[dict]:
    return [line for line in log if line.get("phase") == phase]


def _pace(first: dict, last: dict) -> tuple[int, float]:
    """Scenes between two lines of the log, and seconds of each."""
    scenes = last["images"] - first["images"]
    return scenes, (last["seconds"] - first["seconds"]) / scenes


def _parts(log: Sequence[dict]) -> list[dict]:
    """The lines between which the second phase went in one way: its beginning, the last with whole images, the last."""
    answering = _steps(log, "answering")
    whole = [line for line in answering if "tokens" not in line]
    return [_steps(log, "naming")[-1], *whole[-1:], answering[-1]]


def _training(record: dict, log: Sequence[dict]) -> list[str]:
    start, naming, last = log[0], _steps(log, "naming")[-1], _steps(log, "answering")[-1]
    images, _ = _pace(naming, last)
    size, colour, shape, column, row, _ = naming["names"]
    return [
        "`make pretrained-connector` trains the projector and LoRA (peft, rank "
        f"{start['rank']}, on the attention of all layers) on the scenes of `bench/grounding/scenes.py`; the tower and "
        "the decoder's own weights stay as they are. It keeps its state and goes on exactly where it stopped. An "
        f"answer is four tokens, ` C f45`: column and row, of {FIELDS}, of the box's centre, then its width and height "
        "in such fields. The best answer of that form has a mean IoU of 0.81, and always one of 0.5 or more.",
        "",
        f"- First the projector alone, {naming['images']:,} scenes in {naming['seconds'] / 60:.0f} minutes: features "
        "of a visual token on an object become embeddings of the decoder's own words for that object. On scenes not "
        f"seen before, at the end, the nearest word was right at {pc(size)} (size), {pc(colour)} (colour), "
        f"{pc(shape)} (shape), {pc(column)} (column) and {pc(row)} (row) of the tokens on objects.",
        f"- Then projector and LoRA, {images:,} scenes in {(last['seconds'] - naming['seconds']) / 60:.0f} minutes: a "
        "question for every object is packed behind its image, and no question sees another; "
        f"{_way(log)} Scenes have {start['objects']} objects at most in the "
        f"beginning, and {last['objects']} now; one comes in whenever most columns and rows are right or next to it. "
        f"The loss of an answer's token is {last['mean']:.2f} nats at the end.",
        "",
        f"All on a CPU ({record['measured_on']['processor']}, {start['threads']} thread, bfloat16 but for what is "
        f"trained, torch {start['torch']}), beside other work on the same two cores, of which it had about half of "
        "one; log and record are "
        "`bench/results/pretrained/connector.jsonl` and `connector.json`. The weights, 3 MB in bfloat16, are in "
        "`bench/results/pretrained/connector`, and training can begin with them (`--begin`).",
        "",
    ]


def _way(log: Sequence[dict]) -> str:
    """How the second phase went, and its pace."""
    begin, *whole, last = _parts(log)
    batch, told = log[0]["batch"], ""
    if whole:
        scenes, seconds = _pace(begin, whole[0])
        told = (
            f"for the first {scenes:,} scenes, {batch} whole images a step ({seconds:.1f} s a scene); then, as the "
            "trainer does it now, "
        )
    _, seconds = _pace((whole or [begin])[0], last)
    return (
        f"{told}{batch} whole images in every {train.WHOLE}th step, and in the others {batch * train.MORE} of which "
        f"only the visual tokens on objects and at least {SPARE} others stand before the text ({seconds:.1f} s a "
        "scene)."
    )


def _share(final: dict) -> str:
    """Of the boxes around some object those around the right one."""
    return pc(final["acc@0.5"][0] / final["any"][0]) if final["any"][0] else "none"


def _reached(record: dict, log: Sequence[dict]) -> list[str]:
    rows, naming = [], _steps(log, "naming")[-1]
    for line in log:
        if line.get("event") == "held out":
            images = f"{line['images'] - naming['images']:,}"
            rows.append([line["step"], images, *(cell(line[name]) for name in ("acc@0.5", "any", "iou"))])
    final = record["held out"]
    by_count = [[count, cell(value)] for count, value in final["acc@0.5 by objects"].items()]
    return [
        f"Without routing, on {final['questions']} questions about {final['scenes']} held-out scenes of 1 to 8 "
        f"objects: ACC@0.5 {cell(final['acc@0.5'])}%, mean IoU {final['iou'][0]:.3f}. A box around some object of the "
        f"scene, the right one or not: {cell(final['any'])}%, of which {_share(final)} are around the one asked for. "
        f"Who finds an object each time and picks it by chance is right in {pc(final['chance'])}, who always says the "
        f"middle in {pc(final['blind'])}. Intervals are 95%, over questions.",
        "",
        "In the course of training, on fewer and other scenes, by images of the second phase, in %:",
        "",
        *table(["step", "images", "ACC@0.5", "box around some object", "mean IoU"], rows),
        "",
        "By objects in the scene:",
        "",
        *table(["objects", "ACC@0.5, %"], by_count),
        "",
    ]


def _outlook(log: Sequence[dict]) -> list[str]:
    images, _ = _pace(_parts(log)[0], _parts(log)[-1])
    _, seconds = _pace(*_parts(log)[-2:])
    hours = [f"{count * seconds / 3600:.0f}" for count in OUTLOOK]
    few, many = (f"{count:,}" for count in OUTLOOK)
    return [
        "What would it take to reach 85%? This is an estimate, and no measurement. The small model of "
        "[grounding.md](grounding.md) began with nothing, and reached 85% after 64,000 scenes of its tower alone and "
        f"80,000 with some ten questions each. This one begins with a tower and a decoder, and has had {images:,}, "
        f"with at most {_steps(log, 'answering')[-1]['objects']} questions each. If it needs between an eighth and all "
        f"of those 80,000, that is {few} to {many} scenes: {hours[0]} to {hours[1]} hours at the {seconds:.1f} s of a "
        "scene here, on half a core, and more as scenes get more objects. The same command uses a GPU if there is "
        "one; its pace there has not been measured.",
        "",
    ]


def _routed(record: dict) -> list[str]:
    if "comparison" not in record:
        return [
            "Removing and rerouting were not compared on it, for which 20% was the least that should be right without "
            "routing: answers that are mostly wrong have little to lose. `python -m bench.pretrained.connector "
            "--routed` compares them when there is more to lose.",
            "",
        ]
    found = record["comparison"]
    runs = {(run["method"], run["way"], run["budget"]): run for run in found["runs"]}
    whole = runs["unrouted", "-", 1.0]
    budgets = sorted({budget for _, way, budget in runs if way != "-"}, reverse=True)
    methods = list(dict.fromkeys(method for method, way, _ in runs if way != "-"))
    lines = [
        f"Removing and rerouting on it, {found['items']} held-out scenes with one question each, by share of the "
        f"visual tokens that run in a layer; without routing ACC@0.5 {cell(whole['acc@0.5'])}%. Differences are "
        "paired; bold ones are decided (95%).",
        "",
    ]
    for measure, title in COMPARED.items():
        rows = []
        for method in methods:
            for way in ("remove", "reroute"):
                rows.append([method, way, *(cell(runs[method, way, budget][measure]) for budget in budgets)])
            apart = [signed(runs[method, "reroute", budget]["differences"][measure]) for budget in budgets]
            rows.append([method, "reroute less remove", *apart])
        lines += [f"{title}:", "", *table(["schedule", "", *(f"{100 * each:.3g}%" for each in budgets)], rows), ""]
    return lines


def connector_card(record: dict, log: Sequence[dict]) -> str:
    """The README beside the adapter's weights."""
    final, images = record["held out"], _pace(*(_parts(log)[place] for place in (0, -1)))[0]
    begin = f"--begin bench/results/pretrained/connector --objects {_steps(log, 'answering')[-1]['objects']} --seed 1"
    return f"""\
---
license: apache-2.0
library_name: peft
pipeline_tag: image-text-to-text
---

# A connector, at the beginning of its training

The projector and LoRA (rank {log[0]["rank"]}, attention of all layers) of a LLaVA of SmolLM2-135M-Instruct and a
DINOv2-small fine-tuned for saliency; bfloat16, safetensors. `make pretrained` makes that LLaVA in `build/pretrained`.

It is no finished model: after {images:,} scenes of its second phase it finds {100 * final["acc@0.5"][0]:.1f}% of the
objects that it is asked for in held-out scenes of 1 to 8 objects (ACC@0.5, {final["questions"]} questions). It is here
so that training need not begin anew:

    make pretrained-connector ARGS="{begin}"

A prompt is `<|im_start|><image> small red ring`; the answer is four tokens, such as ` C f45`: column, row, width and
height on a chart of {FIELDS} columns and rows. Trained on scenes of `bench/grounding/scenes.py`, whose backgrounds are
the two sample photos of scikit-learn, by `python -m bench.pretrained.train` on a CPU; the log is `../connector.jsonl`,
the figures are those of `docs/pretrained.md`.

    model = AutoModelForImageTextToText.from_pretrained("build/pretrained")
    model = PeftModel.from_pretrained(model, "bench/results/pretrained/connector").merge_and_unload()
"""
