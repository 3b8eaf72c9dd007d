"""Measurements in several processes, each with a model of its own, and their command line."""

from __future__ import annotations

import argparse
import multiprocessing
import os
from collections.abc import Callable, Hashable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from rich.progress import Progress

from .checkpoint import FOLDER

RESULTS = Path(__file__).parents[1] / "results" / "grounding"
SCENES = 2400

Key = TypeVar("Key", bound=Hashable)
Result = TypeVar("Result")


def command_line(description: str) -> argparse.Namespace:
    """The options of a measurement: `model`, `output`, `scenes` and `jobs`."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--model", type=Path, default=FOLDER, help="folder of the checkpoint")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--scenes", type=int, default=SCENES, help="held-out scenes, one question each")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="worker processes")
    return parser.parse_args()


def threads_of(jobs: int) -> int:
    """Threads of each worker process."""
    return max(1, (os.cpu_count() or 1) // jobs)


@contextmanager
def workers(jobs: int, prepare: Callable[..., None], *given: object) -> Iterator[tuple[ProcessPoolExecutor, Progress]]:
    """Worker processes that were prepared with the given arguments, and a progress bar."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, prepare, given) as pool, Progress() as progress:
        yield pool, progress


def run_all(
    pool: ProcessPoolExecutor,
    progress: Progress,
    function: Callable[..., Result],
    calls: Mapping[Key, tuple],
    what: str,
) -> dict[Key, Result]:
    """The results of a function for the arguments of each call, in the order of the calls."""
    running = {pool.submit(function, *given): key for key, given in calls.items()}
    results = {}
    for done in progress.track(as_completed(running), len(running), description=what):
        results[running[done]] = done.result()
    return {key: results[key] for key in calls}
