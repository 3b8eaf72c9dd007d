"""Measure what goes beyond the paper's rerouting, against it and against removing, at the same budgets.

    python -m bench.grounding.additions [--scenes N] [--jobs N]

First a ranking is chosen, on scenes of their own: with which memory, with or without position. Then every addition, and
what was chosen, is compared on the held-out scenes. Writes additions.json to bench/results/grounding.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

import reroute_kernels as rk
from reroute_kernels.rankings import LastQuery, Mixed, Remembered

from .answers import SEED, Item, held_out_items
from .benchmark import _here, answer_all, prepare
from .comparison import budget_of, costs_of, scores_by_kind, scores_of, setting, write
from .policies import KEEPS, VISUAL_TOKENS, Way, policy_of
from .processes import command_line, run_all, threads_of, workers
from .scenes import GRID, KINDS

METHODS = ("fastv", "pdrop", "nuwa")
CHOICE_SEED, CHOICE_SCENES = SEED + 2, 800
"""Scenes on which a ranking is chosen; neither the held-out ones nor those that the resemblance is measured on."""
TOLERANCE = 0.01
"""By how much another kind of question may be worse than under the paper's rerouting, on average, for a choice."""
PAPER, REMOVE, RESIZE, CHOSEN = "reroute", "remove", "resize", "recommended"


class Choice(NamedTuple):
    """A ranking that may be recommended: that of the method, with a memory and with or without position."""

    decay: float
    """Of the memory; 0 for none."""
    rotary: bool


AS_PUBLISHED = Choice(0.0, True)
CHOICES = (
    *(Choice(decay, True) for decay in (0.0, 0.1, 0.3, 0.5, 1.0)),
    *(Choice(decay, False) for decay in (0.0, 0.3, 0.5)),
)


class Run(NamedTuple):
    """A way to run the model."""

    method: str
    """One of `METHODS`, or `RESIZE`."""
    addition: str
    """`REMOVE`, `PAPER`, one of `ADDITIONS`, or `CHOSEN`."""
    keep: float
    """The keep ratio of FastV that sets the budget."""


def chosen(choice: Choice, policy: rk.Policy) -> rk.Policy:
    """The policy with another ranking."""
    ranking = policy.ranking
    assert isinstance(ranking, LastQuery)
    ranking = replace(ranking, rotary=choice.rotary)
    return replace(policy, ranking=Remembered(ranking, choice.decay) if choice.decay else ranking)


ADDITIONS: Mapping[str, Callable[[rk.Policy], rk.Policy]] = {
    "memory 0.3": partial(chosen, Choice(0.3, True)),
    "no position": partial(chosen, Choice(0.0, False)),
    "mixed 0.2": lambda policy: replace(policy, ranking=Mixed(policy.ranking, 0.2)),
    "align": lambda policy: replace(policy, align="stage"),
}
"""Additions to the paper's rerouting, one at a time."""


def policy_for(run: Run, choice: Choice) -> rk.Policy:
    """The policy of a way to run the model."""
    action = REMOVE if run.addition == REMOVE else PAPER
    policy = policy_of(Way(run.method, action, run.keep))
    assert policy is not None
    if run.addition == CHOSEN:
        return chosen(choice, policy)
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


def answers_of(run: Run, choice: Choice) -> list[str]:
    """The answers to all scenes of this process."""
    if run.method == RESIZE:
        return answer_resized(budget_of(run.keep))
    return answer_all(policy_for(run, choice))[0]


def choice_runs() -> list[tuple[Run, Choice]]:
    """The runs by which a ranking is chosen."""
    return [(Run(method, CHOSEN, keep), choice) for choice in CHOICES for method in METHODS for keep in KEEPS]


def compared_runs() -> list[Run]:
    """The runs on the held-out scenes."""
    additions = (REMOVE, PAPER, *ADDITIONS, CHOSEN)
    return [Run(RESIZE, RESIZE, keep) for keep in KEEPS] + [
        Run(method, addition, keep) for method in METHODS for addition in additions for keep in KEEPS
    ]


def choose(means: Mapping[Choice, Mapping[str, float]]) -> Choice:
    """The ranking by which most boxes are found, of those that cost other questions no more than `TOLERANCE`.

    Args:
        means: for each choice and kind of question the mean of its main measure, over methods and budgets.
    """
    paper = means[AS_PUBLISHED]
    others = [kind for kind in KINDS if kind != "box"]
    allowed = [each for each in means if all(means[each][kind] >= paper[kind] - TOLERANCE for kind in others)]
    return max(allowed, key=lambda choice: means[choice]["box"])


def means_of(items: Sequence[Item], answers: Mapping[tuple[Run, Choice], list[str]]) -> dict[Choice, dict[str, float]]:
    """For each choice and kind of question, the mean of the main measure over methods and budgets."""
    means = {}
    for choice in CHOICES:
        given = [answers[pair] for pair in answers if pair[1] == choice]
        means[choice] = {
            kind: float(np.mean([np.mean(scores_of(items, each, kind)) for each in given])) for kind in KINDS
        }
    return means


def comparison(items: Sequence[Item], answers: Mapping[Run, list[str]], run: Run, choice: Choice) -> dict[str, object]:
    """Figures of one run: its scores, and the paired differences to the paper's rerouting and to removing."""
    if run.method == RESIZE:
        return run._asdict() | scores_by_kind(items, answers[run], {})
    others = {other: answers[run._replace(addition=other)] for other in (PAPER, REMOVE)}
    return run._asdict() | costs_of(policy_for(run, choice)) | scores_by_kind(items, answers[run], others)


def collect(
    args: argparse.Namespace, scenes: int, seed: int, runs: Sequence[tuple[Run, Choice]], what: str
) -> dict[tuple[Run, Choice], list[str]]:
    """The answers to scenes under every run."""
    with workers(args.jobs, prepare, args.model, scenes, threads_of(args.jobs), seed) as (pool, progress):
        return run_all(pool, progress, answers_of, {each: each for each in runs}, what)


def main():
    args = command_line(__doc__)

    started = time.perf_counter()
    few = min(args.scenes, CHOICE_SCENES)
    tried = collect(args, few, CHOICE_SEED, choice_runs(), "choices")
    means = means_of(held_out_items(few, seed=CHOICE_SEED), tried)
    choice = choose(means)
    runs = compared_runs()
    given = collect(args, args.scenes, SEED, [(run, choice) for run in runs], "additions")
    answers, items = {run: given[run, choice] for run in runs}, held_out_items(args.scenes)
    results = {
        **setting(args, items),
        "tried": {"seed": CHOICE_SEED, "scenes": few, "means": [each._asdict() | means[each] for each in CHOICES]},
        "choice": choice._asdict(),
        "runs": [comparison(items, answers, run, choice) for run in runs],
        "seconds": round(time.perf_counter() - started),
    }
    write(args, "additions", results)


if __name__ == "__main__":
    main()
