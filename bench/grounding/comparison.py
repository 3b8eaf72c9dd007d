"""Policies against each other on the held-out scenes: scores, costs, paired differences, and the record of them."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TypeVar

import torch

import reroute_kernels as rk
from bench.speed.device import description

from .answers import SEED, Item, held_out_items
from .benchmark import TEXT_TOKENS, prepare
from .metrics import Interval, interval, measures, score
from .policies import KEEPS, VISUAL_TOKENS, Way, decoder, policy_of
from .processes import run_all, threads_of, workers
from .scenes import KINDS

Run = TypeVar("Run", bound=Hashable)


def budget_of(keep: float) -> float:
    """Visual tokens per layer of FastV at a keep ratio."""
    policy = policy_of(Way("fastv", "remove", keep))
    return rk.cost(decoder(), policy, TEXT_TOKENS, VISUAL_TOKENS).average_visual_tokens


def costs_of(policy: rk.Policy) -> dict[str, object]:
    """A policy, and what it costs."""
    counted = rk.cost(decoder(), policy, TEXT_TOKENS, VISUAL_TOKENS)
    return {
        "policy": repr(policy),
        "average_visual_tokens": counted.average_visual_tokens,
        "prefill_flops": counted.prefill_flops,
        "kv_bytes": counted.kv_bytes,
    }


def scores_of(items: Sequence[Item], answers: Sequence[str], kind: str) -> list[float]:
    """The main measure of each answer to a kind of question."""
    measure = measures(kind)[0]
    return [
        score(item.question, answer)[measure]
        for item, answer in zip(items, answers, strict=True)
        if item.question.kind == kind
    ]


def scores_by_kind(
    items: Sequence[Item], answers: Sequence[str], others: Mapping[str, Sequence[str]]
) -> dict[str, dict[str, Interval]]:
    """For each kind of question the score, and the paired difference to each of other answers, under "less <name>"."""
    found = {}
    for kind in KINDS:
        mine = scores_of(items, answers, kind)
        found[kind] = {"score": interval(mine)}
        for name, theirs in others.items():
            pairs = zip(mine, scores_of(items, theirs, kind), strict=True)
            found[kind][f"less {name}"] = interval([a - b for a, b in pairs])
    return found


def setting(args: argparse.Namespace, items: Sequence[Item]) -> dict[str, object]:
    """The part of a record that says where and on what it was measured."""
    return {
        "measured_on": description(torch.device("cpu")) | {"jobs": args.jobs},
        "items": {kind: sum(item.question.kind == kind for item in items) for kind in KINDS},
        "budgets": {str(keep): budget_of(keep) for keep in KEEPS},
    }


def write(args: argparse.Namespace, name: str, results: Mapping[str, object]) -> None:
    """Write a record into the folder of the results."""
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")


def compare(
    args: argparse.Namespace,
    name: str,
    runs: Sequence[Run],
    answers_of: Callable[[Run], list[str]],
    figures: Callable[[Sequence[Item], Mapping[Run, list[str]], Run], dict[str, object]],
) -> None:
    """Ask the held-out scenes under every run, and write a record of the figures.

    Args:
        args: of the command line.
        name: of the record.
        answers_of: the answers of a run to all scenes of a worker process.
        figures: of one run, from the answers of all.
    """
    started = time.perf_counter()
    with workers(args.jobs, prepare, args.model, args.scenes, threads_of(args.jobs), SEED) as (pool, progress):
        answers = run_all(pool, progress, answers_of, {run: (run,) for run in runs}, name)
    items = held_out_items(args.scenes)
    found = [figures(items, answers, run) for run in runs]
    write(args, name, {**setting(args, items), "runs": found, "seconds": round(time.perf_counter() - started)})
