"""The part of docs/grounding.md on the choice of decision layers, from calibration.json."""

from __future__ import annotations

from bench.pages.markdown import table

from .calibration import AGREEMENT, CHOICES, LABELS, PUBLISHED, PUBLISHED_LAYERS, SEARCH
from .policies import KEEPS
from .scenes import KINDS

NAMES = {
    PUBLISHED: "published",
    AGREEMENT: "calibrated without labels",
    LABELS: "calibrated with labels",
    SEARCH: "best of the search",
}


def calibration_section(results: dict) -> list[str]:
    """The comparison by budget, the layers chosen, and the qualities that chose them.

    Args:
        results: the results of `bench.grounding.calibration`.
    """
    return [
        "## Which layers decide",
        "",
        *_answer(results),
        *_by_budget(results),
        *_by_kind(results),
        *_search(results),
        *_qualities(results),
    ]


def _answer(results: dict) -> list[str]:
    runs, decisions, calibrated = _runs(results), results["decisions"], results["calibration"]
    verdicts = [
        f"{NAMES[choice]}, {_counted([runs[choice, keep]['all']['less published'] for keep in KEEPS])}"
        for choice in CHOICES
        if choice != PUBLISHED
    ]
    return [
        f"`rk.calibrate` chooses {decisions} decision layers by the quality of each "
        "([policies.md](policies.md#decision-layers-by-calibration)), here on "
        f"{calibrated['scenes']:,} scenes of their own (seed {calibrated['seed']}): once without labels, by the "
        "agreement with the unrouted model, and once with labels, by the share of right answers. The published layers "
        f"are {_layers(PUBLISHED_LAYERS)}, those of 32 layers at the same depth. All reroute with as many tokens at "
        "each decision, and none is above the budget. Against the published layers, over the "
        f"{len(KEEPS)} budgets, all kinds of questions together (held-out scenes, 95% intervals of paired "
        f"differences): {'; '.join(verdicts)}.",
        "",
    ]


def _by_budget(results: dict) -> list[str]:
    runs = _runs(results)
    right = [[NAMES[choice], *(_cell(runs[choice, keep]["all"]["score"]) for keep in KEEPS)] for choice in CHOICES]
    chosen = [[NAMES[choice], *(_layers(runs[choice, keep]["layers"]) for keep in KEEPS)] for choice in CHOICES]
    scenes = sum(results["items"].values())
    return [
        f"Right answers of all kinds (%, {scenes:,} held-out scenes), by visual tokens per layer:",
        "",
        *table(["layers", *_budgets(results)], right),
        "",
        "The layers:",
        "",
        *table(["layers", *_budgets(results)], chosen),
        "",
    ]


def _by_kind(results: dict) -> list[str]:
    runs = _runs(results)
    rows = []
    for choice in CHOICES:
        for kind in ("all", *KINDS) if choice != PUBLISHED else ():
            if kind in runs[choice, KEEPS[0]]:
                apart = [runs[choice, keep][kind]["less published"] for keep in KEEPS]
                rows.append([NAMES[choice], kind, *map(_signed, apart)])
    return [
        "Less the published layers, paired, in points:",
        "",
        *table(["layers", "question", *_budgets(results)], rows),
        "",
    ]


def _search(results: dict) -> list[str]:
    search, correlations = results["search"], results["correlations"]
    rows = []
    for keep in KEEPS:
        tried = [run for run in search["runs"] if run["keep"] == keep]
        shares = sorted((run["right"] for run in tried), reverse=True)
        published = next(run["right"] for run in tried if run["layers"] == list(PUBLISHED_LAYERS))
        rows.append(
            [
                f"{results['budgets'][str(keep)]:.1f}",
                len(tried),
                f"{100 * shares[0]:.1f}",
                f"{100 * shares[len(shares) // 2]:.1f}",
                f"{100 * shares[-1]:.1f}",
                f"{100 * published:.1f}",
                *(_correlation(correlations[choice][str(keep)]) for choice in (AGREEMENT, LABELS)),
            ]
        )
    header = ["visual tokens per layer", "choices", "best", "median", "worst", "published"]
    return [
        f"The search tries every choice of {results['decisions']} of the layers {_layers(results['grid'])} that a "
        f"budget admits, on {search['scenes']:,} other scenes (seed {search['seed']}). Calibration may take any layer. "
        "Right answers there in %, and the rank correlation of what calibration maximises (quality x length, summed "
        "over the stages) with them over these choices:",
        "",
        *table([*header, "correlation, without labels", "with labels"], rows),
        "",
    ]


def _qualities(results: dict) -> list[str]:
    found = results["calibrations"]
    rows = [
        [
            without["layer"],
            *(f"{each['mean']:.3f} [{each['low']:.3f}, {each['high']:.3f}]" for each in (without, labels)),
        ]
        for without, labels in zip(found[AGREEMENT]["qualities"], found[LABELS]["qualities"], strict=True)
    ]
    how = found[AGREEMENT]
    return [
        f"The quality of each layer: what is left when only the {how['share']:.0%} of the visual tokens that it ranks "
        f"highest runs from layer {how['early']} on. Without labels that is exp(-KL) of the next token; with labels "
        f"the share of right answers, {found[LABELS]['unrouted']:.3f} without routing.",
        "",
        *table(["layer", "without labels", "with labels"], rows),
        "",
    ]


def _runs(results: dict) -> dict[tuple[str, float], dict]:
    return {(run["choice"], run["keep"]): run for run in results["runs"]}


def _budgets(results: dict) -> list[str]:
    return [f"{results['budgets'][str(keep)]:.1f}" for keep in KEEPS]


def _layers(layers) -> str:
    return ", ".join(map(str, layers))


def _counted(apart: list[list[float]]) -> str:
    better, worse = sum(low > 0 for _, low, _ in apart), sum(high < 0 for _, _, high in apart)
    mean = 100 * sum(mean for mean, _, _ in apart) / len(apart)
    return f"{better} better, {worse} worse, {len(apart) - better - worse} undecided, {mean:+.1f} points on average"


def _correlation(value: float | None) -> str:
    return "none" if value is None else f"{value:.2f}"


def _cell(value: list[float]) -> str:
    mean, low, high = (100 * each for each in value)
    return f"{mean:.1f} [{low:.1f}, {high:.1f}]"


def _signed(value: list[float]) -> str:
    mean, low, high = (100 * each for each in value)
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"
