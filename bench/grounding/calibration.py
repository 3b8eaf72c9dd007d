"""Choose decision layers by calibration, and compare them with the published ones and with the best of a search.

    python -m bench.grounding.calibration [--scenes N] [--jobs N]

The layers are measured on scenes of their own, once without labels and once by the share of right answers. On other
scenes every choice of layers on a coarse grid is tried at every budget. The published layers, both calibrated choices
and the best of the search are then compared on the held-out scenes. Writes calibration.json to bench/results/grounding.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

import reroute_kernels as rk
from bench.speed.device import description
from reroute_kernels.budget import OverBudget

from .answers import SEED, Answerer, Item, batches, held_out_items
from .benchmark import TEXT_TOKENS
from .checkpoint import FOLDER
from .comparison import budget_of, write
from .metrics import interval, measures, score
from .policies import KEEPS, VISUAL_TOKENS, decoder, scaled
from .processes import command_line, run_all, threads_of, workers
from .scenes import KINDS

PUBLISHED, AGREEMENT, LABELS, SEARCH = "published", "agreement", "labels", "search"
CHOICES = (PUBLISHED, AGREEMENT, LABELS, SEARCH)
"""The published layers; those by calibration without labels and with them; the best of the search."""
PUBLISHED_LAYERS = tuple(scaled(3, 7, 15, 23))
DECISIONS = len(PUBLISHED_LAYERS)
GRID = tuple(range(2, 16, 2))
"""Layers among which the search chooses: every other one; the published ones are among them."""
CALIBRATION_SEED, CALIBRATION_SCENES = SEED + 3, 200
SEARCH_SEED, SEARCH_SCENES = SEED + 4, 400


class Run(NamedTuple):
    """Decision layers at a budget."""

    layers: tuple[int, ...]
    keep: float
    """The keep ratio of FastV that sets the budget."""

    @property
    def policy(self) -> rk.Policy:
        """Rerouting that keeps as many tokens at each decision, within the budget."""
        return rk.solve(
            decoder(),
            self.layers,
            avg_tokens=budget_of(self.keep),
            visual_tokens=VISUAL_TOKENS,
            text_tokens=TEXT_TOKENS,
        )


def searched_runs() -> list[Run]:
    """Every choice of layers on the grid that a budget admits, for all budgets."""
    runs = [Run(layers, keep) for keep in KEEPS for layers in combinations(GRID, DECISIONS)]
    return [run for run in runs if _is_admitted(run)]


def _is_admitted(run: Run) -> bool:
    try:
        return bool(run.policy)
    except OverBudget:
        return False


def rights(items: Sequence[Item], answers: Sequence[str]) -> list[float]:
    """The main measure of each answer: 1 if it is right."""
    return [
        score(item.question, answer)[measures(item.question.kind)[0]]
        for item, answer in zip(items, answers, strict=True)
    ]


def share_right(model: nn.Module, sample: tuple[Mapping[str, object], Sequence[Item]]) -> list[float]:
    """The main measure of each answer in a batch, as `rk.measure_layers` takes it."""
    inputs, items = sample
    return rights(items, _answerer().answer(dict(inputs)))


# In worker processes


class _Place:
    """Folder of the checkpoint in this process."""

    folder = FOLDER


def prepare(folder: Path, threads: int) -> None:
    """Set up a worker process."""
    torch.set_num_threads(threads)
    _Place.folder = folder


@cache
def _answerer() -> Answerer:
    return Answerer(_Place.folder)


@cache
def _encoded(seed: int, scenes: int) -> list[tuple[list[int], dict[str, object]]]:
    items = held_out_items(scenes, seed=seed)
    answerer = _answerer()
    return [
        (places, answerer.encoded(answerer.inputs([items[place] for place in places]))) for places in batches(items)
    ]


def calibration(scenes: int, by_labels: bool) -> rk.Calibration:
    """The qualities of all layers on the scenes of the calibration, by right answers or without labels."""
    items = held_out_items(scenes, seed=CALIBRATION_SEED)
    encoded = _encoded(CALIBRATION_SEED, scenes)
    model = _answerer().model
    if by_labels:
        samples = [(inputs, [items[place] for place in places]) for places, inputs in encoded]
        found = rk.measure_layers(model, samples, score=share_right, progress=False)
        return replace(found, model=FOLDER.name, measure="right answers")
    found = rk.measure_layers(model, [inputs for _, inputs in encoded], progress=False)
    return replace(found, model=FOLDER.name)


def answers_under(run: Run, scenes: int, seed: int) -> list[str]:
    """The answers to scenes under a run."""
    answers = [""] * scenes
    with rk.apply(_answerer().model, run.policy):
        for places, inputs in _encoded(seed, scenes):
            for place, answer in zip(places, _answerer().answer(inputs), strict=True):
                answers[place] = answer
    return answers


# Chosen and compared


def chosen_layers(
    calibrations: Mapping[str, rk.Calibration], searched: Mapping[Run, float]
) -> dict[tuple[str, float], tuple[int, ...]]:
    """The decision layers of each choice at each budget, by (choice, keep).

    Args:
        calibrations: by choice.
        searched: the share of right answers of each run of the search.
    """
    found = {}
    for keep in KEEPS:
        found[PUBLISHED, keep] = PUBLISHED_LAYERS
        for choice, each in calibrations.items():
            policy = each.policy(
                DECISIONS, avg_tokens=budget_of(keep), visual_tokens=VISUAL_TOKENS, text_tokens=TEXT_TOKENS
            )
            found[choice, keep] = tuple(stage.layer for stage in policy.schedule)
        of_budget = [run for run in searched if run.keep == keep]
        found[SEARCH, keep] = max(of_budget, key=lambda run: (searched[run], [-layer for layer in run.layers])).layers
    return found


def correlations(calibration: rk.Calibration, searched: Mapping[Run, float]) -> dict[str, float | None]:
    """By budget, Spearman's rank correlation of the objective with the share of right answers, over the search.

    None if all choices answer alike.
    """
    from scipy.stats import spearmanr

    found = {}
    for keep in KEEPS:
        of_budget = [run for run in searched if run.keep == keep]
        worth, right = zip(*((calibration.objective(run.layers), searched[run]) for run in of_budget), strict=True)
        found[str(keep)] = float(spearmanr(worth, right).statistic) if len(set(right)) > 1 else None
    return found


def compared(
    items: Sequence[Item], answers: Mapping[Run, list[str]], choice: str, keep: float, layers: tuple[int, ...]
) -> dict[str, object]:
    """Figures of one choice at a budget: its scores, and the paired differences to the published layers."""
    run = Run(layers, keep)
    mine, published = (rights(items, answers[each]) for each in (run, Run(PUBLISHED_LAYERS, keep)))
    found: dict[str, object] = {
        "choice": choice,
        "keep": keep,
        "layers": list(layers),
        "average_visual_tokens": run.policy.budget.reached,
    }
    for kind in ("all", *KINDS):
        places = [place for place, item in enumerate(items) if kind in ("all", item.question.kind)]
        if places:
            apart = [mine[place] - published[place] for place in places]
            found[kind] = {"score": interval([mine[place] for place in places]), "less published": interval(apart)}
    return found


def measure(folder: Path, scenes: int, jobs: int) -> dict[str, object]:
    """All results.

    Args:
        folder: of the checkpoint.
        scenes: held-out scenes; those of the calibration and of the search are no more than these.
        jobs: worker processes.
    """
    started = time.perf_counter()
    of_calibration, of_search = min(scenes, CALIBRATION_SCENES), min(scenes, SEARCH_SCENES)
    threads = threads_of(jobs)
    with workers(jobs, prepare, folder, threads) as (pool, progress):
        measured = {
            choice: pool.submit(calibration, of_calibration, choice == LABELS) for choice in (AGREEMENT, LABELS)
        }
        tried = run_all(
            pool, progress, answers_under, {run: (run, of_search, SEARCH_SEED) for run in searched_runs()}, "search"
        )
        calibrations = {choice: each.result() for choice, each in measured.items()}
        others = held_out_items(of_search, seed=SEARCH_SEED)
        searched = {run: sum(rights(others, answers)) / of_search for run, answers in tried.items()}
        layers = chosen_layers(calibrations, searched)
        runs = list(dict.fromkeys(Run(chosen, keep) for (_, keep), chosen in layers.items()))
        answers = run_all(pool, progress, answers_under, {run: (run, scenes, SEED) for run in runs}, "choices")
    items = held_out_items(scenes)
    return {
        "measured_on": description(torch.device("cpu")) | {"threads": threads, "jobs": jobs},
        "items": {kind: sum(item.question.kind == kind for item in items) for kind in KINDS},
        "decisions": DECISIONS,
        "grid": list(GRID),
        "budgets": {str(keep): budget_of(keep) for keep in KEEPS},
        "calibration": {"seed": CALIBRATION_SEED, "scenes": of_calibration},
        "calibrations": {choice: each.to_dict() for choice, each in calibrations.items()},
        "correlations": {choice: correlations(each, searched) for choice, each in calibrations.items()},
        "search": {
            "seed": SEARCH_SEED,
            "scenes": of_search,
            "runs": [{"keep": run.keep, "layers": list(run.layers), "right": searched[run]} for run in searched],
        },
        "runs": [compared(items, answers, choice, keep, layers[choice, keep]) for choice, keep in layers],
        "seconds": round(time.perf_counter() - started),
    }


def main():
    args = command_line(__doc__)
    results = measure(args.model, args.scenes, args.jobs)
    write(args, "calibration", results)


if __name__ == "__main__":
    main()
