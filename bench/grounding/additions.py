"""Measure what goes beyond the paper's rerouting, against it and against removing, at the same budgets.

    python -m bench.grounding.additions [--scenes N] [--jobs N]

First the decay of the memory is chosen, on scenes of their own. Then every addition, and what was chosen, is compared
on the held-out scenes. Writes additions.json to bench/results/grounding.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from rich.progress import Progress
from transformers.modeling_outputs import BaseModelOutputWithPooling

import reroute_kernels as rk
from bench.speed.device import description
from reroute_kernels.budget import solve_like
from reroute_kernels.rankings import LastQuery, Mixed, RankingLike, Remembered

from .answers import SEED, Item, held_out_items
from .benchmark import RESULTS, SCENES, TEXT_TOKENS, _here, answer_all, prepare
from .checkpoint import FOLDER
from .metrics import interval, measures, score
from .policies import KEEPS, VISUAL_TOKENS, Way, decoder, policy_of
from .scenes import GRID, KINDS

METHODS = ("fastv", "pdrop", "nuwa")
CHOICE_SEED, CHOICE_SCENES = SEED + 2, 800
"""Scenes on which the decay is chosen; neither the held-out ones nor those that the resemblance is measured on."""
DECAYS = (0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
TOLERANCE = 0.01
"""By how much another kind of question may be worse than under the paper's rerouting, on average, for a choice."""
PAPER, REMOVE, RESIZE, CHOSEN = "reroute", "remove", "resize", "recommended"


class Run(NamedTuple):
    """A way to run the model."""

    method: str
    """One of `METHODS`, or `RESIZE`."""
    addition: str
    """`REMOVE`, `PAPER`, one of `ADDITIONS`, or `CHOSEN`."""
    keep: float
    """The keep ratio of FastV that sets the budget."""


def with_ranking(policy: rk.Policy, around: Callable[[RankingLike], RankingLike]) -> rk.Policy:
    return replace(policy, ranking=around(policy.ranking))


def without_position(ranking: RankingLike) -> RankingLike:
    assert isinstance(ranking, LastQuery)
    return replace(ranking, rotary=False)


def remembering(decay: float) -> Callable[[rk.Policy], rk.Policy]:
    """The policy with a memory; without one if the decay is 0."""
    return lambda policy: with_ranking(policy, lambda ranking: Remembered(ranking, decay)) if decay else policy


def frozen(policy: rk.Policy) -> rk.Policy:
    """The same decisions under `freeze`, at no more FLOPs of the prefill: the cache saves nothing."""
    flops = rk.cost(decoder(), policy, TEXT_TOKENS, VISUAL_TOKENS).prefill_flops
    return solve_like(
        decoder(), replace(policy, action="freeze"), flops=flops, visual_tokens=VISUAL_TOKENS, text_tokens=TEXT_TOKENS
    )


ADDITIONS: Mapping[str, Callable[[rk.Policy], rk.Policy]] = {
    "memory 0.3": remembering(0.3),
    "no position": lambda policy: with_ranking(policy, without_position),
    "mixed 0.2": lambda policy: with_ranking(policy, lambda ranking: Mixed(ranking, 0.2)),
    "align": lambda policy: replace(policy, align="stage"),
    "freeze": frozen,
}
"""What is added to the paper's rerouting, one at a time."""


def policy_for(run: Run, decay: float = 0.0) -> rk.Policy:
    """The policy of a way to run the model; `decay` is what was chosen."""
    action = REMOVE if run.addition == REMOVE else PAPER
    policy = policy_of(Way(run.method, action, run.keep))
    assert policy is not None
    if run.addition == CHOSEN:
        return remembering(decay)(policy)
    return ADDITIONS.get(run.addition, lambda same: same)(policy)


def resized(budget: float) -> tuple[int, int]:
    """Rows and columns of the largest grid, square or nearly so, that holds no more tokens than a budget."""
    side = math.isqrt(int(budget))
    return (side, side + 1) if side * (side + 1) <= budget else (side, side)


@torch.no_grad()
def answer_resized(budget: float) -> list[str]:
    """The answers of the unrouted model to image features that are averaged over neighbours, to fit a budget."""
    answerer, (rows, columns) = _here["answerer"], resized(budget)
    answers = [""] * len(_here["items"])
    for places, inputs in _here["encoded"]:
        features = torch.stack(list(inputs["mm_encoder_outputs"]["image"].pooler_output))
        grid = features.transpose(1, 2).unflatten(2, (GRID, GRID))
        few = torch.nn.functional.adaptive_avg_pool2d(grid, (rows, columns)).flatten(2).transpose(1, 2)
        first = 1 + VISUAL_TOKENS - rows * columns  # behind the first token
        shorter = {
            name: torch.cat([inputs[name][:, :1], inputs[name][:, first:]], dim=1)
            for name in ("input_ids", "attention_mask")
        }
        encoded = {"image": BaseModelOutputWithPooling(pooler_output=list(few))}
        got = answerer.answer({**inputs, **shorter, "mm_encoder_outputs": encoded})
        for row, place in enumerate(places):
            answers[place] = got[row]
    return answers


def answers_of(run: Run, decay: float) -> list[str]:
    if run.method == RESIZE:
        return answer_resized(budget_of(run.keep))
    return answer_all(policy_for(run, decay))[0]


def budget_of(keep: float) -> float:
    """Visual tokens per layer of FastV at a keep ratio."""
    policy = policy_of(Way("fastv", REMOVE, keep))
    return rk.cost(decoder(), policy, TEXT_TOKENS, VISUAL_TOKENS).average_visual_tokens


def choice_runs() -> dict[Run, float]:
    """The runs that the decay is chosen by, with their decays."""
    return {Run(method, f"memory {decay:g}", keep): decay for decay in DECAYS for method in METHODS for keep in KEEPS}


def compared_runs() -> list[Run]:
    """The runs on the held-out scenes."""
    additions = (REMOVE, PAPER, *ADDITIONS, CHOSEN)
    return [Run(RESIZE, RESIZE, keep) for keep in KEEPS] + [
        Run(method, addition, keep) for method in METHODS for addition in additions for keep in KEEPS
    ]


def choose(curve: Mapping[float, Mapping[str, float]]) -> float:
    """The decay under which most boxes are found, of those that cost other questions no more than `TOLERANCE`.

    Args:
        curve: for each decay and kind of question the mean of its main measure, over methods and budgets.
    """
    allowed = [
        decay
        for decay, scores in curve.items()
        if all(scores[kind] >= curve[0.0][kind] - TOLERANCE for kind in KINDS if kind != "box")
    ]
    return max(allowed, key=lambda decay: curve[decay]["box"])


def scores_of(items: Sequence[Item], answers: Sequence[str], kind: str) -> list[float]:
    """The main measure of each answer to a kind of question."""
    measure = measures(kind)[0]
    return [
        score(item.question, answer)[measure]
        for item, answer in zip(items, answers, strict=True)
        if item.question.kind == kind
    ]


def curve_of(items: Sequence[Item], answers: Mapping[Run, list[str]]) -> dict[float, dict[str, float]]:
    """For each decay and kind of question, the mean of the main measure over methods and budgets."""
    decays = choice_runs()
    curve = {}
    for decay in DECAYS:
        runs = [run for run in decays if decays[run] == decay]
        means = {
            kind: [sum(got) / len(got) for run in runs if (got := scores_of(items, answers[run], kind))]
            for kind in KINDS
        }
        curve[decay] = {kind: sum(each) / len(each) for kind, each in means.items()}
    return curve


def comparison(items: Sequence[Item], answers: Mapping[Run, list[str]], run: Run, decay: float) -> dict[str, object]:
    """Figures of one run: its scores, and the paired differences to the paper's rerouting and to removing."""
    found: dict[str, object] = run._asdict()
    if run.method != RESIZE:
        policy = policy_for(run, decay)
        counted = rk.cost(decoder(), policy, TEXT_TOKENS, VISUAL_TOKENS)
        found |= {"policy": repr(policy), "average_visual_tokens": counted.average_visual_tokens}
        found |= {"prefill_flops": counted.prefill_flops, "kv_bytes": counted.kv_bytes}
    for kind in KINDS:
        mine = scores_of(items, answers[run], kind)
        found[kind] = {"score": interval(mine)}
        for other in (PAPER, REMOVE) if run.method != RESIZE else ():
            theirs = scores_of(items, answers[run._replace(addition=other)], kind)
            found[kind][f"less {other}"] = interval([a - b for a, b in zip(mine, theirs, strict=True)])
    return found


def collect(
    folder: Path, scenes: int, seed: int, runs: Mapping[Run, float], jobs: int, what: str
) -> dict[Run, list[str]]:
    """The answers to scenes under every run, each with its decay."""
    threads = max(1, os.cpu_count() // jobs)
    context = multiprocessing.get_context("spawn")
    answers = {}
    with ProcessPoolExecutor(jobs, context, prepare, (folder, scenes, threads, seed)) as pool, Progress() as progress:
        running = {pool.submit(_answers_under, run, decay): run for run, decay in runs.items()}
        for done in progress.track(as_completed(running), len(running), description=what):
            answers[running[done]] = done.result()
    return answers


def _answers_under(run: Run, decay: float) -> list[str]:
    if run.addition in (REMOVE, PAPER, RESIZE, CHOSEN, *ADDITIONS):
        return answers_of(run, decay)
    return answer_all(remembering(decay)(policy_for(run)))[0]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=FOLDER, help="folder of the checkpoint")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--scenes", type=int, default=SCENES, help="held-out scenes, one question each")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="worker processes")
    args = parser.parse_args()

    started = time.perf_counter()
    few = min(args.scenes, CHOICE_SCENES)
    chosen_from = collect(args.model, few, CHOICE_SEED, choice_runs(), args.jobs, "decays")
    curve = curve_of(held_out_items(few, seed=CHOICE_SEED), chosen_from)
    decay = choose(curve)
    runs = compared_runs()
    answers = collect(args.model, args.scenes, SEED, dict.fromkeys(runs, decay), args.jobs, "additions")
    items = held_out_items(args.scenes)
    results = {
        "measured_on": description(torch.device("cpu")) | {"jobs": args.jobs},
        "items": {kind: sum(item.question.kind == kind for item in items) for kind in KINDS},
        "choice": {"seed": CHOICE_SEED, "scenes": few, "curve": [{"decay": each, **curve[each]} for each in DECAYS]},
        "decay": decay,
        "budgets": {str(keep): budget_of(keep) for keep in KEEPS},
        "runs": [comparison(items, answers, run, decay) for run in runs],
        "seconds": round(time.perf_counter() - started),
    }
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "additions.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
