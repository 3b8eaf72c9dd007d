"""Measure every policy on held-out scenes, and the figures that explain the outcome.

    python -m bench.grounding.benchmark [--scenes N] [--jobs N]

Writes results.json and results.csv to bench/results/grounding, and the example that the demo shows beside the model.
"""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

import reroute_kernels as rk
from bench.speed.device import description

from .answers import SEED, Answerer, Item, batches, held_out_items
from .example import write_example
from .metrics import interval, measures, score
from .policies import VISUAL_TOKENS, Way, decoder, policy_of, ways
from .processes import command_line, run_all, threads_of, workers
from .resemblance import coverage, without_layers
from .scenes import KINDS

RESEMBLANCE_SCENES = 800
TEXT_TOKENS = 7
"""Text tokens of the prompt that is costed: one before the image, and the six words that ask for a box."""

_here: dict[str, object] = {}  # of this worker process


def prepare(folder: Path, scenes: int, threads: int, seed: int = SEED) -> None:
    """Load the model and make the scenes, once a worker process."""
    torch.set_num_threads(threads)
    answerer, items = Answerer(folder), held_out_items(scenes, seed=seed)
    encoded = [
        (places, answerer.encoded(answerer.inputs([items[place] for place in places]))) for places in batches(items)
    ]
    _here.update(answerer=answerer, items=items, encoded=encoded)


def answer_all(policy: rk.Policy | None) -> tuple[list[str], list[dict[str, float]]]:
    """The answers to all items under a policy, and the result of `follow` for its decisions."""
    answerer, items = _here["answerer"], _here["items"]
    answers, selected = [""] * len(items), [[] for _ in items]
    routing = rk.models.apply(answerer.model, policy) if policy else None
    try:
        for places, inputs in _here["encoded"]:
            if policy is not None and policy.reducer is not None:  # which takes part in encoding
                inputs = answerer.inputs([items[place] for place in places])
            got = answerer.answer(inputs)
            for row, place in enumerate(places):
                answers[place] = got[row]
                if routing is not None:
                    selected[place] = [set((stage.selected[row] - 1).tolist()) for stage in routing.trace.stages]
    finally:
        if routing is not None:
            routing.remove()
    return answers, follow(items, selected, [stage.layer for stage in policy.schedule] if policy else [])


def follow(items: Sequence[Item], selected: Sequence[list[set[int]]], layers: list[int]) -> list[dict[str, float]]:
    """Follow the tokens of the objects asked for through the decisions, for items that ask for a box.

    Args:
        items: all items.
        selected: of each item, the visual tokens that ran in each stage, as places in the image.
        layers: the decision layers.

    Returns:
        For each decision: `objects`, the share of the objects' tokens that ran; `seen`, the share of objects of which
        at least one token ran; `returned`, the share of these that had
        been deferred by an earlier decision; `overlap`, of all tokens that ran here or in the stage before, those that
        ran in both.
    """
    boxes = [place for place, item in enumerate(items) if item.question.kind == "box"]
    followed = []
    for stage, layer in enumerate(layers):
        there, ran, seen, returned, overlaps = 0, 0, 0, 0, []
        for place in boxes:
            stages = selected[place]
            target = set(items[place].question.target.tokens())
            now = target & stages[stage]
            always = set.intersection(*stages[: stage + 1])
            there, ran, seen, returned = (
                there + len(target),
                ran + len(now),
                seen + bool(now),
                returned + len(now - always),
            )
            if stage:
                before = stages[stage - 1]
                overlaps.append(len(before & stages[stage]) / len(before | stages[stage]))
        followed.append(
            {
                "layer": layer,
                "objects": ran / there,
                "seen": seen / len(boxes),
                "returned": returned / ran if ran else 0.0,
                "overlap": float(np.mean(overlaps)) if overlaps else None,
            }
        )
    return followed


def resemblance(scenes: int) -> dict[str, object]:
    """Both measures of resemblance, on other scenes than those that policies are compared on."""
    items = [item for item in held_out_items(scenes, seed=SEED + 1) if item.question.kind == "box"]
    looks = coverage(_here["answerer"], items)
    whole, *without = without_layers(_here["answerer"], items)
    return {"items": len(items), **looks, "whole": whole, "without_layer": without}


def summary(items: Sequence[Item], way: Way, answers: list[str], stages: list[dict]) -> dict[str, object]:
    """Figures of one way of running the model."""
    policy = policy_of(way)
    cost, unrouted = (rk.cost(decoder(), each, TEXT_TOKENS, VISUAL_TOKENS) for each in (policy, None))
    scores = {kind: {} for kind in KINDS}
    for kind in KINDS:
        scored = [
            score(item.question, answer)
            for item, answer in zip(items, answers, strict=True)
            if item.question.kind == kind
        ]
        scores[kind] = {measure: interval([each[measure] for each in scored]) for measure in measures(kind)}
    return {
        **way._asdict(),
        "average_visual_tokens": cost.average_visual_tokens,
        "prefill_flops": cost.prefill_flops,
        "prefill_flops_share": cost.prefill_flops / unrouted.prefill_flops,
        "kv_bytes": cost.kv_bytes,
        "kv_bytes_share": cost.kv_bytes / unrouted.kv_bytes,
        "schedule": [[stage.layer, stage.keep] for stage in policy.schedule] if policy else [],
        "scores": scores,
        "stages": stages,
    }


def differences(items: Sequence[Item], answers: dict[Way, list[str]]) -> list[dict[str, object]]:
    """By method, budget and kind: the main measure under `reroute` less that under `remove`, item by item."""
    found = []
    for way in answers:
        if way.action != "reroute":
            continue
        for kind in KINDS:
            measure = measures(kind)[0]
            pairs = zip(items, answers[way], answers[way._replace(action="remove")], strict=True)
            apart = [
                score(item.question, deferred)[measure] - score(item.question, removed)[measure]
                for item, deferred, removed in pairs
                if item.question.kind == kind
            ]
            found.append(
                {"method": way.method, "keep": way.keep, "kind": kind, "measure": measure, "value": interval(apart)}
            )
    return found


def rows(results: dict) -> list[dict[str, object]]:
    """One row for each way of running the model, kind of question and measure."""
    columns = ("method", "action", "keep", "average_visual_tokens", "prefill_flops", "kv_bytes")
    return [
        {column: way[column] for column in columns}
        | {"kind": kind, "items": results["items"][kind], "measure": measure}
        | dict(zip(("mean", "low", "high"), value, strict=True))
        for way in results["ways"]
        for kind, scores in way["scores"].items()
        for measure, value in scores.items()
    ]


def main():
    args = command_line(__doc__)

    started = time.perf_counter()
    threads = threads_of(args.jobs)
    with workers(args.jobs, prepare, args.model, args.scenes, threads) as (pool, progress):
        like = pool.submit(resemblance, min(args.scenes, RESEMBLANCE_SCENES))
        found = run_all(pool, progress, answer_all, {way: (policy_of(way),) for way in ways()}, "policies")
        resembles = like.result()
    items = held_out_items(args.scenes)
    answers, stages = ({way: found[way][part] for way in found} for part in range(2))
    results = {
        "measured_on": description(torch.device("cpu")) | {"threads": threads, "jobs": args.jobs},
        "seed": SEED,
        "items": {kind: sum(item.question.kind == kind for item in items) for kind in KINDS},
        "visual_tokens": VISUAL_TOKENS,
        "text_tokens": TEXT_TOKENS,
        "resemblance": resembles,
        "ways": [summary(items, way, answers[way], stages[way]) for way in answers],
        "differences": differences(items, answers),
        "seconds": round(time.perf_counter() - started),
    }
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    with (args.output / "results.csv").open("w", newline="") as file:
        table = rows(results)
        writer = csv.DictWriter(file, list(table[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
    write_example(items, answers, results, args.model)


if __name__ == "__main__":
    main()
