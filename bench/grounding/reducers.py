"""Compare methods that reduce images before the decoder, as published and rerouted, at the same budgets.

    python -m bench.grounding.reducers [--scenes N] [--jobs N]

A published one leaves as many tokens as the budget has. A rerouted one leaves twice as many, and the decoder defers
among them. Fixed before the held-out scenes were asked, all at equal budgets, by paired differences:

1. Does rerouting a method find more boxes than the method as published? Expected of every method, since a reducer does
   not know the question (CDPruner but for its words), and a decision does.
2. The same for the other kinds of questions, without an expectation.
3. Does a method find more boxes than FastV under the same action, and than the control: tokens at even distances in
   place of the reducer's?

SparseVLM, which prunes in the decoder alone, was added after the others had been asked, without an expectation. Under
rerouting it recycles nothing and selects as many tokens at each decision.

Writes reducers.json to bench/results/grounding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

import reroute_kernels as rk
from reroute_kernels.reduced import IMAGE_METHODS, reduced_policy
from reroute_kernels.reducers import VisionFeatures
from reroute_kernels.reducers.base import ShareReducer, with_features

from .benchmark import answer_all
from .comparison import budget_of, compare, costs_of, scores_by_kind
from .policies import KEEPS, VISUAL_TOKENS, Way, decoder, policy_of, scaled
from .processes import command_line

REMOVE, REROUTE = "remove", "reroute"
FASTV, EVEN, SPARSEVLM = "fastv", "even", "sparsevlm"
METHODS = (FASTV, EVEN, *IMAGE_METHODS, SPARSEVLM)


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
    if run.method == SPARSEVLM:
        return _sparsevlm(run)
    # Whole tokens: what is rerouted gets no part of one more than what is removed.
    share = int(budget_of(run.keep)) / VISUAL_TOKENS
    known = "divprune" if run.method == EVEN else run.method
    name = f"reroute-{known}" if run.action == REROUTE else known
    count = decoder().layers
    policy = reduced_policy(name, share, count, range(count), scaled(3, 7, 15, 23), "", VISUAL_TOKENS)
    return (
        rk.Policy(policy.schedule, policy.action, reducer=Even(policy.reducer.keep)) if run.method == EVEN else policy
    )


def _sparsevlm(run: Run) -> rk.Policy:
    """SparseVLM at its layers, with the shape of its largest budget; rerouted, within what is reached so."""
    layers, ranking = scaled(3, 7, 16), rk.rankings.TextRaters()
    published = rk.solve(
        decoder(),
        layers,
        (300, 200, 110),
        avg_tokens=int(budget_of(run.keep)),
        visual_tokens=VISUAL_TOKENS,
        action=REMOVE,
        ranking=ranking,
        recycle=0.3,
    )
    if run.action == REMOVE:
        return published
    limit = published.budget.reached
    return rk.solve(decoder(), layers, avg_tokens=limit, visual_tokens=VISUAL_TOKENS, ranking=ranking)


def all_runs() -> list[Run]:
    """Every method under both actions at every budget."""
    return [Run(method, action, keep) for method in METHODS for action in (REMOVE, REROUTE) for keep in KEEPS]


def answers_of(run: Run) -> list[str]:
    """The answers to all scenes of this process."""
    return answer_all(policy_for(run))[0]


def figures(items: list, answers: Mapping[Run, list[str]], run: Run) -> dict[str, object]:
    """Scores of a run, what it costs, and its paired differences to removing, to FastV and to the control."""
    others = {
        REMOVE: run._replace(action=REMOVE),
        FASTV: run._replace(method=FASTV),
        EVEN: run._replace(method=EVEN),
    }
    compared = {name: answers[other] for name, other in others.items() if other != run}
    return run._asdict() | costs_of(policy_for(run)) | scores_by_kind(items, answers[run], compared)


def main():
    compare(command_line(__doc__), "reducers", all_runs(), answers_of, figures)


if __name__ == "__main__":
    main()
