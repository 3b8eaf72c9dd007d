"""Compare methods that reduce images before the decoder, as published and rerouted, at the same budgets.

    python -m bench.grounding.reducers [--scenes N] [--jobs N]

A published one leaves as many tokens as the budget has. A rerouted one leaves twice as many, and the decoder defers
among them. Fixed before the held-out scenes were asked, all at equal budgets, by paired differences:

1. Does rerouting a method find more boxes than the method as published? Expected of every method, since a reducer does
   not know the question (CDPruner but for its words), and a decision does.
2. The same for the other kinds of questions, without an expectation.
3. Does a method find more boxes than FastV under the same action, and than the control: tokens at even distances in
   place of the reducer's?

Writes reducers.json to bench/results/grounding.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

import reroute_kernels as rk
from bench.speed.device import description
from reroute_kernels.reduced import IMAGE_METHODS, reduced_policy
from reroute_kernels.reducers import VisionFeatures
from reroute_kernels.reducers.base import ShareReducer, with_features

from .additions import budget_of, scores_of
from .answers import SEED, held_out_items
from .benchmark import TEXT_TOKENS, answer_all, prepare
from .metrics import interval
from .policies import KEEPS, VISUAL_TOKENS, Way, decoder, policy_of, scaled
from .processes import command_line, run_all, threads_of, workers
from .scenes import KINDS

REMOVE, REROUTE = "remove", "reroute"
FASTV, EVEN = "fastv", "even"
METHODS = (FASTV, EVEN, *IMAGE_METHODS)


class Even(ShareReducer):
    """Tokens at even distances, whatever they show."""

    def reduce(self, image: VisionFeatures) -> tuple[Tensor, Tensor]:
        frames, tokens, _ = image.features.shape
        count = self.survivors(tokens)
        places = torch.arange(count, dtype=torch.int64, device=image.features.device) * tokens // count
        return with_features(image.features, places.expand(frames, -1))


class Run(NamedTuple):
    """A way to run the model."""

    method: str
    """One of `METHODS`."""
    action: str
    """`REMOVE`, as published, or `REROUTE`."""
    keep: float
    """The keep ratio of FastV that sets the budget."""


def policy_for(run: Run) -> rk.Policy:
    """The policy of a way to run the model."""
    if run.method == FASTV:
        policy = policy_of(Way(FASTV, run.action, run.keep))
        assert policy is not None
        return policy
    # Whole tokens: what is rerouted gets no part of one more than what is removed.
    share = int(budget_of(run.keep)) / VISUAL_TOKENS
    known = "divprune" if run.method == EVEN else run.method
    name = f"reroute-{known}" if run.action == REROUTE else known
    count = decoder().layers
    policy = reduced_policy(name, share, count, range(count), scaled(3, 7, 15, 23), "", VISUAL_TOKENS)
    return (
        rk.Policy(policy.schedule, policy.action, reducer=Even(policy.reducer.keep)) if run.method == EVEN else policy
    )


def all_runs() -> list[Run]:
    """Every method under both actions at every budget."""
    return [Run(method, action, keep) for method in METHODS for action in (REMOVE, REROUTE) for keep in KEEPS]


def answers_of(run: Run) -> list[str]:
    """The answers to all scenes of this process."""
    return answer_all(policy_for(run))[0]


def figures(items: list, answers: Mapping[Run, list[str]], run: Run) -> dict[str, object]:
    """Scores of a run, what it costs, and its paired differences to removing, to FastV and to the control."""
    policy = policy_for(run)
    counted = rk.cost(decoder(), policy, TEXT_TOKENS, VISUAL_TOKENS)
    found: dict[str, object] = run._asdict() | {
        "policy": repr(policy),
        "average_visual_tokens": counted.average_visual_tokens,
        "prefill_flops": counted.prefill_flops,
        "kv_bytes": counted.kv_bytes,
    }
    others = {
        f"less {REMOVE}": run._replace(action=REMOVE),
        f"less {FASTV}": run._replace(method=FASTV),
        f"less {EVEN}": run._replace(method=EVEN),
    }
    for kind in KINDS:
        mine = scores_of(items, answers[run], kind)
        found[kind] = {"score": interval(mine)}
        for name, other in others.items():
            if other != run:
                theirs = scores_of(items, answers[other], kind)
                found[kind][name] = interval([a - b for a, b in zip(mine, theirs, strict=True)])
    return found


def main():
    args = command_line(__doc__)

    started = time.perf_counter()
    with workers(args.jobs, prepare, args.model, args.scenes, threads_of(args.jobs), SEED) as (pool, progress):
        answers = run_all(pool, progress, answers_of, {run: (run,) for run in all_runs()}, "reducers")
    items = held_out_items(args.scenes)
    results = {
        "measured_on": description(torch.device("cpu")) | {"jobs": args.jobs},
        "items": {kind: sum(item.question.kind == kind for item in items) for kind in KINDS},
        "budgets": {str(keep): budget_of(keep) for keep in KEEPS},
        "runs": [figures(items, answers, run) for run in answers],
        "seconds": round(time.perf_counter() - started),
    }
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "reducers.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
