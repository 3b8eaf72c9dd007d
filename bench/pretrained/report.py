"""docs/pretrained.md with its picture, from bench/results/pretrained; without results the plan alone."""

from __future__ import annotations

from .passages import KINDS, TOKENS
from .runs import ADDITIONS, BUDGETS, METHODS, SOME_BUDGETS

TITLE = "# A decoder that nobody here trained"


def plan_section() -> list[str]:
    """The comparisons, as they were fixed before the run."""
    shares = ", ".join(f"{budget:.3g}" for budget in BUDGETS)
    some = ", ".join(f"{budget:.3g}" for budget in SOME_BUDGETS)
    additions = ", ".join(f"`{name}`" for name in ADDITIONS)
    return [
        "## The plan, fixed before the run",
        "",
        "This section and `bench/pretrained/runs.py` were committed before any item of the comparison was asked.",
        "",
        f"- Items: passages of {TOKENS} tokens of three kinds, {', '.join(KINDS)}, as many of each; the passage's "
        "token embeddings are handed in as the features of an image, so that its positions are visual tokens; a question "
        "follows as text, and the answer is the next token.",
        f"- Main comparison: at each of the budgets {shares} (share of the visual tokens that run in a layer, mean "
        f"over the layers), with the schedules of {' and '.join(METHODS)}: the paper's rerouting less removing. "
        f"{len(BUDGETS) * len(METHODS)} comparisons, each with two measures.",
        f"- Additions, at the budgets {some}, on the schedule of reroute-fastv: {additions}, each less the paper's "
        f"rerouting. At most {len(ADDITIONS) * len(SOME_BUDGETS)} comparisons, each with two measures. Settings are "
        "those that docs/grounding.md settled on; none is chosen here. The calibrated layers come from "
        "`rk.measure_layers` without labels on items of another seed.",
        "- Measures, over all kinds together: `choice`, the share of items whose right candidate has the highest logit "
        "of the candidates in the passage; and the divergence KL(unrouted || routed) of the next token, in nats, which "
        "needs no right answer. Per kind, the exact greedy answer and the same next token are reported and decide "
        "nothing.",
        "- Intervals: 95%, bootstrap over items, of paired differences. A comparison is decided if its interval does "
        "not hold 0. Of so many comparisons one in twenty would look decided by chance.",
        "- Stale states matter if aligning them (`align`) makes choice or divergence better, decided so, at two of "
        "three budgets or more.",
        "- The number of items follows from a fixed time of work, not from the figures; batches take the kinds in "
        "turn.",
        "",
    ]


def plan_page() -> list[str]:
    """The page before there are results."""
    return [TITLE, "", "No results yet.", "", *plan_section()]
