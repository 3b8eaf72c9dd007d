"""The part of docs/grounding.md on what goes beyond the paper's rerouting, from additions.json."""

from __future__ import annotations

from bench.pages.markdown import table
from reroute_kernels.rankings import LastQuery, Remembered

from .additions import ADDITIONS, AS_PUBLISHED, CHOSEN, METHODS, PAPER, REMOVE, RESIZE, TOLERANCE, Choice
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


def shown(results: dict) -> str:
    """The addition that the page sets against the paper's rerouting: what was chosen, or else what finds most boxes."""
    if Choice(**results["choice"]) != AS_PUBLISHED:
        return CHOSEN
    runs = _runs(results)
    return max(ADDITIONS, key=lambda addition: sum(_gains(runs, addition, method, "box") for method in METHODS))


def verdict(apart: list[list[float]]) -> tuple[int, int, int]:
    """How many differences are above 0, below, and undecided."""
    better, worse = sum(low > 0 for _, low, _ in apart), sum(high < 0 for _, _, high in apart)
    return better, worse, len(apart) - better - worse


def short(verdict: tuple[int, int, int]) -> str:
    """Differences that are above 0, below, and undecided, as a cell."""
    return "/".join(map(str, verdict))


def points(apart: list[list[float]]) -> str:
    """The mean of differences, in points."""
    return f"{100 * sum(mean for mean, _, _ in apart) / len(apart):+.1f}"


def _answer(results: dict) -> list[str]:
    runs, addition = _runs(results), shown(results)
    pairs = [runs[method, addition, keep] for method in METHODS for keep in KEEPS]
    verdicts = {
        (kind, other): _counted(verdict([pair[kind][f"less {other}"] for pair in pairs]))
        for kind in KINDS
        for other in (PAPER, REMOVE)
    }
    gains = ", ".join(f"{method} {100 * _gains(runs, addition, method, 'box'):+.1f}" for method in METHODS)
    rows = [
        [
            kind,
            *(verdicts[kind, other] for other in (PAPER, REMOVE)),
            points([pair[kind][f"less {PAPER}"] for pair in pairs]),
        ]
        for kind in KINDS
    ]
    if addition == CHOSEN:
        answer = f"Rerouting with `{_ranking(Choice(**results['choice']))}`."
    else:
        answer = (
            "The paper's rerouting as it is, for questions of all kinds: of the rankings that were tried, none finds "
            f"more boxes and costs no other kind of question more than {100 * TOLERANCE:.0f} point. What adds most "
            f"boxes is `{addition}`; what it costs is in the table."
        )
    return [
        f"{answer} In points of ACC@0.5, mean over the budgets, `{addition}` adds to the paper's rerouting: {gains}. "
        "A memory adds `decay` times what the decisions before found to the shares of attention that a decision "
        "measures. What freezing adds, in place of deferring, and what it costs, is under "
        "[Tokens that wait](#tokens-that-wait).",
        "",
        f"Of {len(pairs)} pairs of a published method and a budget, those in which `{addition}` is better, worse, or "
        "undecided (the 95% interval of the paired difference holds 0):",
        "",
        *table(["question", "against the paper's rerouting", "against removing", "mean difference to rerouting"], rows),
        "",
    ]


def _by_budget(results: dict) -> list[str]:
    runs, addition = _runs(results), shown(results)
    scores = [
        [method, each, *(cell(runs[method, each, keep]["box"]["score"]) for keep in KEEPS)]
        for method in METHODS
        for each in (REMOVE, PAPER, addition)
    ]
    scores.append([RESIZE, "", *(cell(runs[RESIZE, RESIZE, keep]["box"]["score"]) for keep in KEEPS)])
    apart = [
        [method, other, *(signed(runs[method, addition, keep]["box"][f"less {other}"]) for keep in KEEPS)]
        for method in METHODS
        for other in (PAPER, REMOVE)
    ]
    return [
        "Boxes found (ACC@0.5, %), by visual tokens per layer. `resize` is a control without any routing: image "
        "features are averaged over neighbours until no more are left than the budget has. The model was not trained "
        "on such features.",
        "",
        *table(["method", "", *_budgets(results)], scores),
        "",
        f"The same, `{addition}` less the others, paired, in points:",
        "",
        *table(["method", "less", *_budgets(results)], apart),
        "",
    ]


def _by_addition(results: dict) -> list[str]:
    runs = _runs(results)
    rows = []
    for addition in (*ADDITIONS, *([CHOSEN] if shown(results) == CHOSEN else [])):
        for method in METHODS:
            apart = {kind: [runs[method, addition, keep][kind][f"less {PAPER}"] for keep in KEEPS] for kind in KINDS}
            cells = [f"{points(apart[kind])} ({short(verdict(apart[kind]))})" for kind in KINDS]
            rows.append([addition, method, *cells])
    return [
        "### Each addition alone",
        "",
        "What each adds to the paper's rerouting at the same budget: the mean difference over the five budgets, in "
        "points, and in how many of them it is better/worse/undecided. `memory 0.3` is `Remembered(ranking, 0.3)`, "
        "`no position` is `LastQuery(rotary=False)`, `mixed 0.2` is `Mixed(ranking, 0.2)`, "
        '`align` is `align="stage"`. The additions, the budgets and the questions were fixed in '
        "`bench/grounding/additions.py` before the held-out scenes were asked: "
        f"{len(METHODS) * len(KEEPS) * len(ADDITIONS) * len(KINDS)} comparisons, of which one in twenty would "
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


def _ranking(choice: Choice) -> object:
    ranking = LastQuery(rotary=choice.rotary)
    return Remembered(ranking, choice.decay) if choice.decay else ranking


def _gains(runs: dict[tuple[str, str, float], dict], addition: str, method: str, kind: str) -> float:
    """Mean difference to the paper's rerouting over the budgets."""
    return sum(runs[method, addition, keep][kind][f"less {PAPER}"][0] for keep in KEEPS) / len(KEEPS)


def _runs(results: dict) -> dict[tuple[str, str, float], dict]:
    return {(run["method"], run["addition"], run["keep"]): run for run in results["runs"]}


def _budgets(results: dict) -> list[str]:
    return [f"{results['budgets'][str(keep)]:.1f}" for keep in KEEPS]


def _counted(verdict: tuple[int, int, int]) -> str:
    return f"{verdict[0]} better, {verdict[1]} worse, {verdict[2]} undecided"
