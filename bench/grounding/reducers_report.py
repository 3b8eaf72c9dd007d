"""The part of docs/grounding.md on methods of other authors, removed and rerouted, from reducers.json."""

from __future__ import annotations

from bench.pages.markdown import table

from .additions_report import points, short, verdict
from .metrics import cell, signed
from .policies import KEEPS
from .reducers import EVEN, FASTV, METHODS, REMOVE, REROUTE, SPARSEVLM
from .scenes import KINDS

OTHERS = tuple(method for method in METHODS if method != FASTV)
REDUCERS = tuple(method for method in OTHERS if method not in (EVEN, SPARSEVLM))
REGISTERED = (
    "A published method leaves as many tokens as the budget has; a rerouted one leaves twice as many, of which the "
    "decoder defers some, at layers 2, 4, 8 and 12. All tokens keep their positions, so that nothing else differs. "
    "The comparisons were fixed in `bench/grounding/reducers.py` before the held-out scenes were asked, all at equal "
    "budgets and by paired differences: (1) whether rerouting a method finds more boxes than the method as published, "
    "which was expected of every method, since a reducer does not know the question and a decision does (`cdpruner` "
    "knows its words); (2) the same for the other questions, without an expectation; (3) whether a method finds more "
    "boxes than `fastv` under the same action, and than `even`, a control that leaves tokens at even distances. "
    "`sparsevlm`, which prunes in the decoder alone (layers 2, 4, 8), was added after the others had been asked, and "
    "counts in the tables only; rerouted, it recycles nothing and selects as many tokens at each decision."
)


def reducers_section(results: dict | None) -> list[str]:
    """The comparisons that were registered, and their outcome.

    Args:
        results: the results of `bench.grounding.reducers`, if there are any.
    """
    registered = ["## Other methods, removed and rerouted", "", REGISTERED, ""]
    if results is None:
        return [*registered, "They wait to be run.", ""]
    items, runs = results["items"], _runs(results)
    return [
        *registered,
        *_answer(runs),
        f"Boxes found (ACC@0.5, %; the first {sum(items.values()):,} of the held-out scenes, {items['box']:,} of them "
        "asked for a box), by visual tokens per layer. At the largest budget twice as many are more than there are: "
        "rerouted methods leave all tokens there, and differ from `fastv` in their keep ratios alone.",
        "",
        *table(["method", "", *_budgets(results)], _boxes(runs)),
        "",
        "By kind of question, the mean difference over the budgets in points, and in how many of them it is "
        "better/worse/undecided (the 95% interval holds 0): rerouted less as published; and for boxes less `fastv` and "
        "less `even` under the same action.",
        "",
        *table(
            ["method", *(f"{kind}: rerouted less published" for kind in KINDS), *_OTHERS],
            [[method, *_differences(runs, method)] for method in OTHERS],
        ),
        "",
    ]


_OTHERS = tuple(f"box: {action} less {other}" for other in (FASTV, EVEN) for action in (REMOVE, REROUTE))


def boxes_by_method(results: dict) -> list[list[str]]:
    """Rows of a table: boxes that each method finds under both actions at every budget, the control aside."""
    runs = _runs(results)
    return [
        [method, action, *(cell(runs[method, action, keep]["box"]["score"]) for keep in KEEPS)]
        for method in (*REDUCERS, SPARSEVLM)
        for action in (REMOVE, REROUTE)
    ]


def _answer(runs: dict[tuple[str, str, float], dict]) -> list[str]:
    apart = [runs[method, REROUTE, keep]["box"][f"less {REMOVE}"] for method in REDUCERS for keep in KEEPS]
    better, worse, undecided = verdict(apart)
    gains = ", ".join(
        f"{method} {points([runs[method, REROUTE, keep]['box'][f'less {REMOVE}'] for keep in KEEPS])}"
        for method in REDUCERS
    )
    others = [
        (
            other,
            action,
            verdict([runs[method, action, keep]["box"][f"less {other}"] for method in REDUCERS for keep in KEEPS]),
        )
        for other in (FASTV, EVEN)
        for action in (REMOVE, REROUTE)
    ]
    told = "; ".join(f"less `{other}`, both {action}: {short(each)}" for other, action, each in others)
    return [
        f"(1) Of {len(apart)} pairs of a method and a budget, rerouting finds more boxes in {better}, fewer in "
        f"{worse}, and {undecided} are undecided; the mean differences over the budgets are {gains} points. (3) Pairs "
        f"that are better/worse/undecided: {told}.",
        "",
    ]


def _boxes(runs: dict[tuple[str, str, float], dict]) -> list[list[str]]:
    rows = []
    for method in METHODS:
        rows += [
            [method, action, *(cell(runs[method, action, keep]["box"]["score"]) for keep in KEEPS)]
            for action in (REMOVE, REROUTE)
        ]
        apart = [signed(runs[method, REROUTE, keep]["box"][f"less {REMOVE}"]) for keep in KEEPS]
        rows.append([method, "difference", *apart])
    return rows


def _differences(runs: dict[tuple[str, str, float], dict], method: str) -> list[str]:
    pairs = [(kind, REROUTE, f"less {REMOVE}") for kind in KINDS]
    pairs += [("box", action, f"less {other}") for other in (FASTV, EVEN) for action in (REMOVE, REROUTE)]
    cells = []
    for kind, action, name in pairs:
        apart = [found for keep in KEEPS if (found := runs[method, action, keep][kind].get(name)) is not None]
        cells.append(f"{points(apart)} ({short(verdict(apart))})" if apart else "")
    return cells


def _runs(results: dict) -> dict[tuple[str, str, float], dict]:
    return {(run["method"], run["action"], run["keep"]): run for run in results["runs"]}


def _budgets(results: dict) -> list[str]:
    return [f"{results['budgets'][str(keep)]:.1f}" for keep in KEEPS]
