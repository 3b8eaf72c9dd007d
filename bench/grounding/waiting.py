"""Compare waiting tokens that are aligned, or frozen, with those of the paper's rerouting.

    python -m bench.grounding.waiting [--scenes N] [--jobs N]

Alignments are compared at the same tokens, frozen tokens at the same tokens and at the same FLOPs of the prefill, where
freezing fits into them at all. Writes waiting.json to bench/results/grounding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import NamedTuple

import reroute_kernels as rk
from reroute_kernels.budget import OverBudget, solve_like

from .additions import METHODS
from .benchmark import TEXT_TOKENS, answer_all
from .comparison import compare, costs_of, scores_by_kind
from .policies import KEEPS, VISUAL_TOKENS, Way, decoder, policy_of
from .processes import command_line

PAPER = "reroute"


class Run(NamedTuple):
    """A way to run the model."""

    method: str
    """One of `METHODS`."""
    waiting: str
    """`PAPER`, or one of `VARIANTS`."""
    keep: float
    """The keep ratio of FastV that sets the budget."""


def frozen_at_equal_flops(policy: rk.Policy) -> rk.Policy | None:
    """The policy that freezes, with fewer tokens at each decision, at the FLOPs of this one; None if none fits."""
    flops = rk.cost(decoder(), policy, TEXT_TOKENS, VISUAL_TOKENS).prefill_flops
    frozen = replace(policy, action="freeze")
    try:
        return solve_like(decoder(), frozen, flops=flops, visual_tokens=VISUAL_TOKENS, text_tokens=TEXT_TOKENS)
    except OverBudget:
        return None


VARIANTS: Mapping[str, Callable[[rk.Policy], rk.Policy | None]] = {
    'align="stage"': lambda policy: replace(policy, align="stage"),
    'align="proxy"': lambda policy: replace(policy, align="proxy"),
    "freeze, same tokens": lambda policy: replace(policy, action="freeze"),
    "freeze, same FLOPs": frozen_at_equal_flops,
}
"""The policies of each variant, from that of the paper's rerouting; None if there is none."""


def policy_for(run: Run) -> rk.Policy | None:
    """The policy of a way to run the model; None if there is none."""
    policy = policy_of(Way(run.method, "reroute", run.keep))
    assert policy is not None
    return policy if run.waiting == PAPER else VARIANTS[run.waiting](policy)


def possible_runs() -> list[Run]:
    """The paper's rerouting and every variant that fits, by method and budget."""
    runs = [Run(method, waiting, keep) for method in METHODS for waiting in (PAPER, *VARIANTS) for keep in KEEPS]
    return [run for run in runs if policy_for(run) is not None]


def answers_of(run: Run) -> list[str]:
    """The answers to all scenes of this process."""
    return answer_all(policy_for(run))[0]


def figures(items: list, answers: Mapping[Run, list[str]], run: Run) -> dict[str, object]:
    """Scores of a run, what it costs, and its paired differences to the paper's rerouting."""
    paper = answers[run._replace(waiting=PAPER)]
    compared = scores_by_kind(items, answers[run], {PAPER: paper})
    return run._asdict() | costs_of(policy_for(run)) | compared


def main():
    compare(command_line(__doc__), "waiting", possible_runs(), answers_of, figures)


if __name__ == "__main__":
    main()
