"""Ask the LLaVA with its trained connector where objects of held-out scenes are, unrouted and under policies.

    python -m bench.pretrained.connector [--minutes M] [--routed]

First every object of some scenes, without routing, as training packs them. With `--routed` also one object a scene,
by the plain model with the adapter merged, without routing, removing and rerouting at the same budgets; rows are kept
in the folder of the training, and a repeated command goes on behind them. Writes connector.json to
bench/results/pretrained, and beside it the log of the training.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn

import reroute_kernels as rk
from bench.grounding.metrics import interval
from bench.grounding.scenes import Object, Scene, held_out_scene
from bench.speed.device import cpu_name, description

from . import train
from .convert import FOLDER, SIDE
from .measure import RESULTS, Rows
from .packing import BEGIN, Encode, pixels_of, question_text
from .runs import UNROUTED, Run, scheduled

SEED = 1
"""Of the scenes; the evaluations in the course of training have another."""
SCENES = 64
METHODS, BUDGETS = ("fastv", "late"), (0.75, 0.5)
"""Schedules and budgets of the comparison, fixed before any of its items was asked."""
MIDDLE = {"small": " N n44", "large": " N n77"}
"""The answer without a look, by the size that a question tells: in the middle."""
ITEMS = 320
"""Scenes of the comparison at most."""
MEASURES = ("acc@0.5", "iou", "same")
BATCH = 8


def policies(config: object) -> dict[Run, rk.Policy | None]:
    """Every run of the comparison with its policy, None without routing."""
    found: dict[Run, rk.Policy | None] = {UNROUTED: None}
    for budget in BUDGETS:
        for method in METHODS:
            for way in ("remove", "reroute"):
                found[Run(method, way, budget)] = scheduled(config, method, way, budget)
    return found


def asked_object(scene: Scene, number: int) -> Object:
    """The object of a scene that is asked for."""
    return scene.objects[np.random.default_rng([SEED, number, 1]).integers(len(scene.objects))]


def inputs_of(scenes: Sequence[Scene], targets: Sequence[Object], encode: Encode, side: int, image: int, count: int):
    """Arguments of the plain model for a question about each scene; all questions have equally many tokens.

    Args:
        image: id of the image token.
        count: visual tokens of an image.
    """
    ids = [[*encode(BEGIN), *[image] * count, *encode(question_text(target))] for target in targets]
    return {"input_ids": torch.tensor(ids), "pixel_values": pixels_of([scene.image for scene in scenes], side)}


@torch.no_grad()
def ask(model: nn.Module, policy: rk.Policy | None, inputs: Mapping[str, Tensor], written: Mapping[int, str]):
    """The greedy answers, four tokens each."""
    inputs = {name: each.to(model.device) for name, each in inputs.items()}
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    if policy is None:
        tokens = model.generate(**inputs, **settings)
    else:
        with rk.apply(model, policy):
            tokens = model.generate(**inputs, **settings)
    given = tokens[:, inputs["input_ids"].shape[1] :].tolist()
    return ["".join(written.get(each, "?") for each in row) for row in given]


def measure(
    model: nn.Module,
    encode: Encode,
    side: int,
    written: Mapping[int, str],
    of_runs: Mapping[Run, rk.Policy | None],
    rows: Rows,
    count: int,
    until: float,
) -> None:
    """Ask about one object of each of `count` scenes under every policy, batch by batch, until a time."""
    image, tokens = model.config.image_token_index, model.config.image_seq_length
    for first in range(0, count, BATCH):
        if time.monotonic() > until:
            return
        numbers = range(first, first + BATCH)
        held_out = [held_out_scene(SEED, number) for number in numbers]
        targets = [asked_object(scene, number) for scene, number in zip(held_out, numbers, strict=True)]
        inputs = inputs_of(held_out, targets, encode, side, image, tokens)
        for run, policy in of_runs.items():
            if f"{first} {run.name}" not in rows.found:
                rows.add(f"{first} {run.name}", {"answers": ask(model, policy, inputs, written)})


def summarize(rows: Mapping[str, Mapping[str, Any]], of_runs: Mapping[Run, rk.Policy | None], config) -> dict:
    """Scores, and the paired differences of rerouting and removing, over the batches that all runs have answered."""
    firsts = sorted({int(key.split()[0]) for key in rows})
    firsts = [first for first in firsts if all(f"{first} {run.name}" in rows for run in of_runs)]
    values: dict[Run, dict[str, list[float]]] = {run: {measure: [] for measure in MEASURES} for run in of_runs}
    for first in firsts:
        unrouted = rows[f"{first} {UNROUTED.name}"]["answers"]
        for run in of_runs:
            for place, answer in enumerate(rows[f"{first} {run.name}"]["answers"]):
                scene = held_out_scene(SEED, first + place)
                scored = train.score(scene, asked_object(scene, first + place), answer)
                for measure in ("acc@0.5", "iou"):
                    values[run][measure].append(scored[measure])
                values[run]["same"].append(float(answer == unrouted[place]))
    told = []
    for run, policy in of_runs.items():
        cost = rk.cost(config, policy, 6, config.image_seq_length)
        row = run._asdict() | {
            "policy": None if policy is None else repr(policy),
            "average_visual_tokens": cost.average_visual_tokens,
            "prefill_flops": cost.prefill_flops,
            **{measure: interval(values[run][measure]) for measure in MEASURES},
        }
        if run.way == "reroute":
            other = values[run._replace(way="remove")]
            row["differences"] = {
                measure: interval(np.subtract(values[run][measure], other[measure])) for measure in MEASURES
            }
        told.append(row)
    return {"items": BATCH * len(firsts), "runs": told}


def unrouted(trainee: train.Trainee, scenes: int) -> dict[str, Any]:
    """Measures over all objects of held-out scenes, together and by the number of objects."""
    found, held_out = train.evaluate(trainee, scenes, SEED), [held_out_scene(SEED, number) for number in range(scenes)]
    counts = [len(scene.objects) for scene in held_out]
    blind = [train.score(scene, each, MIDDLE[each.size]) for scene in held_out for each in scene.objects]
    of_question = np.repeat(counts, counts)
    by_count = {
        str(count): interval(np.asarray(found["acc@0.5"])[of_question == count]) for count in sorted(set(counts))
    }
    return {
        "seed": SEED,
        "scenes": scenes,
        "questions": len(of_question),
        "chance": float(np.mean(1 / of_question)),
        "blind": float(np.mean([each["acc@0.5"] for each in blind])),
        **{name: interval(values) for name, values in found.items()},
        "acc@0.5 by objects": by_count,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=FOLDER, help="folder that bench.pretrained.convert wrote")
    parser.add_argument("--work", type=Path, default=train.WORK, help="folder of the training")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--scenes", type=int, default=SCENES, help="held-out scenes without routing")
    parser.add_argument("--routed", action="store_true", help="compare removing and rerouting, too")
    parser.add_argument("--minutes", type=float, default=20, help="minutes of the comparison")
    args = parser.parse_args()

    with safe_open(args.work / train.STATE, "pt") as file:
        options = train.Options(**json.loads(file.metadata()["run"])["options"])
    model, encode = train.load(args.model, torch.device("cpu"), torch.bfloat16)
    trainee = train.Trainee(model, encode, SIDE, options)
    run = train.Run(trainee, args.work)
    record = {
        "measured_on": description(torch.device("cpu"))
        | {"processor": cpu_name(), "threads": torch.get_num_threads(), "dtype": "bfloat16"},
        "command": "python -m bench.pretrained.connector" + " --routed" * args.routed,
        "trained": run.now,
        "held out": unrouted(trainee, args.scenes),
    }
    if args.routed:
        merged = trainee.adapted.merge_and_unload()
        of_runs = policies(merged.config)
        header = {"seed": SEED, "step": run.now["step"], "runs": {each.name: repr(of_runs[each]) for each in of_runs}}
        rows = Rows(args.work / "rows.jsonl", header)
        measure(merged, encode, SIDE, trainee.written, of_runs, rows, ITEMS, time.monotonic() + 60 * args.minutes)
        record["comparison"] = summarize(rows.found, of_runs, merged.config)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "connector.json").write_text(json.dumps(record, indent=1) + "\n")
    (args.output / "connector.jsonl").write_text((args.work / train.LOG).read_text())


if __name__ == "__main__":
    main()
