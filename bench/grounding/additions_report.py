"""The part of docs/grounding.md on what goes beyond the paper's rerouting, from additions.json."""

from __future__ import annotations

from bench.pages.markdown import table
from reroute_kernels.rankings import LastQuery, Remembered

from .additions import ADDITIONS, CHOSEN, METHODS, PAPER, REMOVE, RESIZE, TOLERANCE
from .metrics import cell, measures, signed
from .policies import KEEPS
from .scenes import KINDS


def additions_section(results: dict) -> list[str]:
    """The answer, the comparison by budget, every addition, and how the decay was chosen."""
    return [
        "## What to use",
        "",
        *_answer(results),
        *_by_budget(results),
        *_by_addition(results),
        *_choice(results),
    ]


def recommended_table(results: dict) -> list[str]:
    """Boxes found by removing, by the paper's rerouting and by what is recommended, at every budget."""
    runs = _runs(results)
    rows = []
    for method in METHODS:
        for addition in (REMOVE, PAPER, CHOSEN):
            rows.append([method, addition, *(cell(runs[method, addition, keep]["box"]["score"]) for keep in KEEPS)])
    rows.append([RESIZE, "", *(cell(runs[RESIZE, RESIZE, keep]["box"]["score"]) for keep in KEEPS)])
    return table(["method", "", *_budgets(results)], rows)


def _answer(results: dict) -> list[str]:
    runs, choice = _runs(results), results["choice"]
    pairs = [runs[method, CHOSEN, keep] for method in METHODS for keep in KEEPS]
    counts = {
        (kind, other): _verdict([pair[kind][f"less {other}"] for pair in pairs])
        for kind in KINDS
        for other in (PAPER, REMOVE)
    }
    gains = [
        f"{method} {_points([runs[method, CHOSEN, keep]['box'][f'less {PAPER}'] for keep in KEEPS])}"
        for method in METHODS
    ]
    worst = sorted(
        (pair[kind][f"less {PAPER}"][0], kind, pair["method"], pair["keep"])
        for pair in pairs
        for kind in KINDS
        if kind != "box"
    )
    difference, kind, method, keep = worst[0]
    box, removed = counts["box", PAPER], counts["box", REMOVE]
    ranking = LastQuery(rotary=choice["rotary"])
    what = repr(Remembered(ranking, choice["decay"]) if choice["decay"] else ranking)
    others = [
        [
            kind,
            *(_counted(counts[kind, other]) for other in (PAPER, REMOVE)),
            _points([pair[kind][f"less {PAPER}"] for pair in pairs]),
        ]
        for kind in KINDS
    ]
    return [
        f"Rerouting with `{what}`. A memory adds `decay` times what the decisions before found to the shares of "
        f"attention that a decision measures. Of {len(pairs)} pairs of a published method and a budget, boxes are "
        f"found more often than by the paper's rerouting in {box[0]}, less often in {box[1]}, and in {box[2]} the 95% "
        f"interval of the paired difference holds 0; against removing, {_counted(removed)}. In points of ACC@0.5, mean "
        f"over the budgets, the gain over the paper's rerouting is: {', '.join(gains)}.",
        "",
        "Pairs in which the recommended policy is better, worse, undecided:",
        "",
        *table(
            ["question", "against the paper's rerouting", "against removing", "mean difference to rerouting"], others
        ),
        "",
        f"Where it is worst among the other questions: {kind}, {method} at {results['budgets'][str(keep)]:.1f} visual "
        f"tokens per layer, {100 * difference:+.1f} points.",
        "",
    ]


def _by_budget(results: dict) -> list[str]:
    runs = _runs(results)
    rows = [
        [method, other, *(signed(runs[method, CHOSEN, keep]["box"][f"less {other}"]) for keep in KEEPS)]
        for method in METHODS
        for other in (PAPER, REMOVE)
    ]
    return [
        "Boxes found (ACC@0.5, %), by visual tokens per layer. `resize` is a control without any routing: image "
        "features are averaged over neighbours until no more are left than the budget has.",
        "",
        *recommended_table(results),
        "",
        "The same, recommended less the others, paired, in points:",
        "",
        *table(["method", "less", *_budgets(results)], rows),
        "",
    ]


def _by_addition(results: dict) -> list[str]:
    runs = _runs(results)
    rows = []
    for addition in (*ADDITIONS, CHOSEN):
        for method in METHODS:
            apart = {kind: [runs[method, addition, keep][kind][f"less {PAPER}"] for keep in KEEPS] for kind in KINDS}
            cells = [f"{_points(apart[kind])} ({_short(_verdict(apart[kind]))})" for kind in KINDS]
            rows.append([addition, method, *cells])
    return [
        "### Each addition alone",
        "",
        "What each adds to the paper's rerouting at the same budget: the mean difference over the five budgets, in "
        "points, and in how many of them it is better/worse/undecided. `memory 0.3` is `Remembered(ranking, 0.3)`, "
        "`no position` is `LastQuery(rotary=False)`, `mixed 0.2` is `Mixed(ranking, 0.2)`, "
        '`align` is `align="stage"`. The additions, the budgets and the questions were fixed in '
        "`bench/grounding/additions.py` before the held-out scenes were asked: "
        f"{len(METHODS) * len(KEEPS) * (len(ADDITIONS) + 1) * len(KINDS)} comparisons, of which one in twenty would "
        "look decided by chance.",
        "",
        *table(["addition", "method", *KINDS], rows),
        "",
    ]


def _choice(results: dict) -> list[str]:
    tried = results["tried"]
    rows = [
        [f"{each['decay']:g}", "yes" if each["rotary"] else "no", *(f"{100 * each[kind]:.1f}" for kind in KINDS)]
        for each in tried["means"]
    ]
    return [
        "### How it was chosen",
        "",
        f"On {tried['scenes']:,} scenes of their own (seed {tried['seed']}): what finds most boxes, mean over the "
        "three methods and five budgets, of what costs no other kind of question more than "
        f"{100 * TOLERANCE:.0f} point against the paper's rerouting (no decay, with position). A longer memory keeps "
        "what was found; questions that need two looks want something else the second time.",
        "",
        *table(["decay", "position", *(f"{kind}, {measures(kind)[0]}, %" for kind in KINDS)], rows),
        "",
    ]


def _runs(results: dict) -> dict[tuple[str, str, float], dict]:
    return {(run["method"], run["addition"], run["keep"]): run for run in results["runs"]}


def _budgets(results: dict) -> list[str]:
    return [f"{results['budgets'][str(keep)]:.1f}" for keep in KEEPS]


def _verdict(apart: list[list[float]]) -> tuple[int, int, int]:
    """How many differences are above 0, below, and undecided."""
    better, worse = sum(low > 0 for _, low, _ in apart), sum(high < 0 for _, _, high in apart)
    return better, worse, len(apart) - better - worse


def _counted(verdict: tuple[int, int, int]) -> str:
    return f"{verdict[0]} better, {verdict[1]} worse, {verdict[2]} undecided"


def _short(verdict: tuple[int, int, int]) -> str:
    return "/".join(map(str, verdict))


def _points(apart: list[list[float]]) -> str:
    return f"{100 * sum(mean for mean, _, _ in apart) / len(apart):+.1f}"
