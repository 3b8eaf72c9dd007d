"""docs/grounding.md with its pictures, and the model's card, from bench/results/grounding and the training log."""

from __future__ import annotations

from pathlib import Path

from bench.pages.markdown import table

from .additions_report import additions_section
from .calibration_report import calibration_section
from .metrics import MEASURES, cell, measures, pc, signed
from .policies import KEEPS, METHODS
from .reducers_report import boxes_by_method, reducers_section
from .resemblance import TOP
from .scenes import KINDS
from .train import EARLY, LATE, LATER
from .waiting_report import waiting_section

ACTIONS = ("remove", "reroute")
PHASES = ("vision", "language")
CARD = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
---

# Tiny grounding model

A LLaVA in miniature that answers where things are: {parameters:.1f} million parameters, a CLIP tower of 4 layers, 144
visual tokens of a 192-pixel image, a Llama decoder of 16 layers of 128 channels, one token a word. It exists to measure
on a laptop what routing visual tokens does to answers, and knows nothing but the scenes below. The weights are float16,
in safetensors.

A prompt is `<image> box of the small red ring`; the answer is left, top, right and bottom as shares of the image's
side, such as `0.24 0.30 0.42 0.50`. The other questions are those of `bench/grounding/scenes.py`, in its words.

## Data

Scenes of 1 to 8 shapes (6 shapes, 6 colours, 2 sizes; most share one or two of these with another one) on crops of the
two sample photos of scikit-learn, by day or by night. Training crops come from the left two thirds of the photos,
held-out ones from the right third.

## Training

From scratch, by `python -m bench.grounding.train`; the log is `training.jsonl`. First the vision tower alone learns to
name the object on every patch, and its class token to tell what is in the scene. Then all of it learns to answer,
beginning with one object in a scene. In this phase every decoder layer is left out of a step with a probability that
falls from {early} in the first layer to {late} from the middle on, and to {later} in the second half of the steps. This
stochastic depth stands in for two things that large decoders have by themselves: they survive layers that are skipped,
and it is not in their first layers that they look at what a question is about.

On {device} ({threads} threads, torch {torch}), seed {seed}: {vision_steps:,} steps of the tower in {vision_minutes:.0f}
minutes, {steps:,} of the whole in {minutes:.0f}.

On 128 held-out scenes of 1 to 8 objects, in the course of training (boxes: ACC@0.5; others: exact answers):

{progress}

## Accuracy

Without routing, on {held_out:,} other held-out scenes, by `make grounding`; brackets hold 95% bootstrap intervals.
[docs/grounding.md](../../docs/grounding.md) has what it is under every policy, where the model looks, and what it can
miss.

{accuracy}
"""
KIND_TITLES = {
    "box": "where something is (`box of the small red ring`)",
    "neighbour": "what is beside something (`what is left of the blue square`)",
    "corner": "what colour something in a diagonal direction has",
    "count": "how many objects there are",
    "light": "whether it is day or night",
}


def grounding_page(measured: dict[str, dict], docs: Path) -> None:
    """Write the page and its pictures.

    Args:
        measured: as in `page`.
        docs: folder to write to.
    """
    draw_resemblance(measured["results"], docs / "grounding-resemblance.svg")
    draw_budgets(measured["results"], docs / "grounding-budgets.svg")
    (docs / "grounding.md").write_text("\n".join(page(measured)) + "\n")


def model_card(results: dict, log: list[dict]) -> str:
    """The card of the tiny grounding model.

    Args:
        results: the results of `bench.grounding.benchmark`.
        log: the lines of the training log.
    """
    start = log[0]
    vision, whole = (
        [line["seconds"] for line in log if line.get("phase") == phase and "seconds" in line][-1] for phase in PHASES
    )
    objects = {line["step"]: line["objects"] for line in log if "objects" in line}
    progress = (
        [line["step"], objects[line["step"]], *(pc(line[kind]) for kind in KINDS)]
        for line in log
        if line.get("event") == "held out"
    )
    accuracy = (
        [
            kind,
            measures(kind)[0],
            results["items"][kind],
            cell(results["ways"][0]["scores"][kind][measures(kind)[0]]),
        ]
        for kind in KINDS
    )
    return CARD.format(
        parameters=start["parameters"] / 1e6,
        device="a CPU" if start["device"] == "cpu" else start["device"],
        vision_minutes=vision / 60,
        minutes=(whole - vision) / 60,
        progress="\n".join(table(["step", "most objects in training", *KINDS], progress)),
        accuracy="\n".join(table(["question", "measure", "scenes", "%"], accuracy)),
        held_out=sum(results["items"].values()),
        early=EARLY,
        late=LATE,
        later=LATER,
        **{name: start[name] for name in ("threads", "torch", "seed", "vision_steps", "steps")},
    )


def summary_table(results: dict, reducers: dict | None = None) -> str:
    """Boxes found by the published methods at every budget.

    Args:
        results: the results of `bench.grounding.benchmark`.
        reducers: those of `bench.grounding.reducers`, if there are any.
    """
    ways = {(way["method"], way["action"], way["keep"]): way for way in results["ways"]}
    budgets = [f"{ways['fastv', 'remove', keep]['average_visual_tokens']:.1f}" for keep in KEEPS]
    rows = [
        [method, action, *(cell(ways[method, action, keep]["scores"]["box"]["acc@0.5"]) for keep in KEEPS)]
        for method in ("fastv", "pdrop", "nuwa")
        for action in ACTIONS
    ]
    about = ""
    if reducers is not None:
        rows += boxes_by_method(reducers)
        about = (
            f" `sparsevlm` and methods that reduce before the decoder (from `{rows[6][0]}` on): "
            f"{reducers['items']['box']:,} of the scenes."
        )
    whole = cell(results["ways"][0]["scores"]["box"]["acc@0.5"])
    return "\n".join(
        [
            f"Boxes found by the tiny model that ships here (ACC@0.5, %; {results['items']['box']:,} held-out scenes; "
            "95% intervals), by visual tokens per layer; run on a CPU. "
            f"Without routing, with all {results['visual_tokens']}: {whole}.{about}",
            "",
            *table(["method", "", *budgets], rows),
        ]
    )


def page(measured: dict[str, dict]) -> list[str]:
    """The lines of the page.

    Args:
        measured: the records by the names of their files: `results` of `bench.grounding.benchmark`, and `additions`,
            `waiting`, `calibration` and `reducers` of the modules of these names.
    """
    results = measured["results"]
    items, machine = results["items"], results["measured_on"]
    return [
        "# Grounding: deferring against deleting",
        "",
        "What routing does to answers, measured on the tiny model that ships in `models/tiny_grounding` "
        "(its card is `models/tiny_grounding/README.md`). It is a LLaVA of 16 decoder layers with "
        f"{results['visual_tokens']} visual tokens, trained from scratch on synthetic scenes: its figures say how the "
        "policies compare on it, not what they cost a model of billions of parameters. "
        "[evaluation.md](evaluation.md) tells how to measure those.",
        "",
        f"`make grounding` makes this page anew; the records are `bench/results/grounding/results.json` and "
        f"`results.csv`. Measured on a CPU ({machine['jobs']} processes of {machine['threads']} thread, torch "
        f"{machine['torch']}, transformers {machine['transformers']}), {sum(items.values()):,} held-out scenes, one "
        f"question each: {', '.join(f'{count:,} {kind}' for kind, count in items.items())}. Brackets hold 95% "
        "bootstrap intervals.",
        "",
        *additions_section(measured["additions"]),
        *calibration_section(measured["calibration"]),
        *waiting_section(measured["waiting"]),
        *reducers_section(measured.get("reducers")),
        *resemblance_section(results),
        *comparison_section(results),
        *budget_section(results),
        *return_section(results),
    ]


def resemblance_section(results: dict) -> list[str]:
    like = results["resemblance"]
    coverage, rank, without = like["coverage"], like["rank"], like["without_layer"]
    half = len(coverage) // 2
    early, late = (sum(each[0] for each in part) / len(part) for part in (coverage[:half], coverage[half:]))
    drops = [like["whole"][0] - each[0] for each in without]
    worst = max(range(len(drops)), key=drops.__getitem__)
    others = sorted(drops)[: len(drops) - 1]
    rows = (
        [layer, cell(coverage[layer]), f"{rank[layer][0]:.2f}", cell(without[layer])] for layer in range(len(coverage))
    )
    return [
        "## Does the model behave like large ones?",
        "",
        "Two things are known of large pretrained models that methods of this kind rest on: their attention finds what "
        "a question is about, better in deeper layers; and they survive layers that are skipped. A model for which "
        f"they did not hold would tell nothing about these methods. Both are measured without routing, on "
        f"{like['items']:,} other held-out scenes that are asked for a box.",
        "",
        f"**Coverage**: of the object's tokens, the share among the {TOP:.0%} of visual tokens that the last prompt "
        f"token attends to most (mean over heads). By chance it is {pc(TOP)}. Here it is {pc(early)} on average in the "
        f"first {half} layers and {pc(late)} in the last {len(coverage) - half}, at most "
        f"{pc(max(each[0] for each in coverage))}.",
        "",
        f"**Skipped layers**: ACC@0.5 is {cell(like['whole'])} with all layers. Without layer {worst} it falls by "
        f"{100 * drops[worst]:.1f} points; without any single other one, by {100 * others[-1]:.1f} at most and "
        f"{100 * sorted(drops)[len(drops) // 2]:.1f} in the median.",
        "",
        "A decoder as small as this one has neither by itself: it looks in its first layers and needs all of them. It "
        "was trained with stochastic depth, which stands in for what large ones have: each layer was left out of a "
        f"training step with a probability that falls from {EARLY} in the first layer to {LATE} from the middle on, "
        f"and to {LATER} in the second half of the training.",
        "",
        "![Coverage and skipped layers](grounding-resemblance.svg)",
        "",
        *table(["layer", "coverage", "mean rank (0 first, 1 last)", "ACC@0.5 without this layer"], rows),
        "",
    ]


def comparison_section(results: dict) -> list[str]:
    lines = [
        "## Comparison",
        "",
        "Every method removes what it does not select, or defers it, at the same number of visual tokens per layer. "
        "`fastv` decides once under `remove`, at layer 2, and at layers 2, 4, 8 and 12 under `reroute`; `pdrop` at "
        "layers 1, 4, 8 and 12; `nuwa` reduces in the vision tower first, and decides at layer 8 (under `reroute` at "
        "12, too). These are the published depths, scaled to 16 layers. The others rank in FastV's place: `all-text` "
        "by the attention of all text tokens, `key-norm` by the norms of keys, `random` and `uniform` without looking "
        "(`uniform` selects the same tokens at every decision, so deferring changes nothing).",
        "",
        "![Accuracy by budget](grounding-budgets.svg)",
        "",
        *verdict(results),
        "",
        *worse(results),
    ]
    for kind in KINDS:
        lines += kind_section(results, kind)
    return lines


def verdict(results: dict) -> list[str]:
    """How often deferring is better, by kind of question, in methods that look."""
    rows = []
    for kind in KINDS:
        apart = [
            each["value"]
            for each in results["differences"]
            if each["kind"] == kind and each["method"] not in ("random", "uniform")
        ]
        better, worse = sum(low > 0 for _, low, _ in apart), sum(high < 0 for _, _, high in apart)
        published = [
            each["value"][0]
            for each in results["differences"]
            if each["kind"] == kind and each["method"] in ("fastv", "pdrop", "nuwa")
        ]
        rows.append([kind, better, worse, len(apart) - better - worse, f"{100 * sum(published) / len(published):+.1f}"])
    return [
        "Of the pairs of one method at one budget (`random` and `uniform` aside), how many are better deferred, worse "
        "deferred, or undecided (the 95% interval of the paired difference holds 0); and the mean difference of the "
        "three published methods over all budgets, in points:",
        "",
        *table(["question", "deferring is better", "worse", "undecided", "fastv, pdrop, nuwa: mean difference"], rows),
    ]


def worse(results: dict) -> list[str]:
    """Which pairs are worse when deferring, and the object's tokens that run in them."""
    ways = {(way["method"], way["action"], way["keep"]): way for way in results["ways"]}
    rows, fewer, followed = [], 0, 0
    for each in results["differences"]:
        if each["value"][2] >= 0 or each["method"] in ("random", "uniform"):
            continue
        removed, deferred = (ways[each["method"], action, each["keep"]] for action in ACTIONS)
        row = [each["kind"], each["method"], f"{removed['average_visual_tokens']:.1f}", signed(each["value"])]
        if each["kind"] == "box":
            ends = [way["stages"][-1] for way in (removed, deferred)]
            row += [pc(end[name]) for name in ("objects", "seen") for end in ends]
            followed, fewer = followed + 1, fewer + (ends[1]["seen"] < ends[0]["seen"])
        rows.append([*row, *["--"] * (8 - len(row))])
    if not rows:
        return ["In none of these pairs is deferring worse.", ""]
    return [
        "Where deferring is worse, and what of the object that is asked for runs from the last decision on: the share "
        f"of its tokens, and in how many scenes at least one does. In {fewer} of {followed} of these pairs the object "
        "is lost in more scenes when deferring: the last decision ranks all tokens anew, by the attention of its own "
        "layer, and misses what an earlier layer had found.",
        "",
        *table(
            [
                *("question", "method", "visual tokens per layer", "difference"),
                *("tokens: remove", "tokens: reroute", "scenes: remove", "scenes: reroute"),
            ],
            rows,
        ),
        "",
    ]


def kind_section(results: dict, kind: str) -> list[str]:
    main = measures(kind)[0]
    unrouted = results["ways"][0]
    ways = {(way["method"], way["action"], way["keep"]): way for way in results["ways"]}
    apart = {(each["method"], each["keep"]): each["value"] for each in results["differences"] if each["kind"] == kind}
    budgets = [f"{ways['fastv', 'remove', keep]['average_visual_tokens']:.1f}" for keep in KEEPS]
    rows = []
    for method in METHODS:
        for action in ACTIONS:
            cells = [cell(ways[method, action, keep]["scores"][kind][main]) for keep in KEEPS]
            rows.append([method, action, *cells])
        rows.append([method, "difference", *(signed(apart[method, keep]) for keep in KEEPS)])
    lines = [
        f"### {kind}: {KIND_TITLES[kind]}",
        "",
        f"{main}, {MEASURES[main]}, in %, by visual tokens per layer. Without routing (144.0): "
        f"{cell(unrouted['scores'][kind][main])}. Differences are paired, in points.",
        "",
        *table(["method", "", *budgets], rows),
        "",
    ]
    if kind == "box":
        others = [measure for measure in measures(kind) if measure != main]
        rows = [["unrouted", "", "144.0", *(cell(unrouted["scores"][kind][measure]) for measure in others)]]
        for method in ("fastv", "pdrop", "nuwa"):
            for keep, budget in zip(KEEPS, budgets, strict=True):
                for action in ACTIONS:
                    scores = ways[method, action, keep]["scores"][kind]
                    rows.append([method, action, budget, *(cell(scores[measure]) for measure in others)])
        lines += [
            "The other measures of boxes: " + "; ".join(f"{name}, {MEASURES[name]}" for name in others) + ".",
            "",
            *table(["method", "", "visual tokens per layer", *others], rows),
            "",
        ]
    return lines


def budget_section(results: dict) -> list[str]:
    rows = (
        [
            way["method"],
            way["action"],
            f"{way['average_visual_tokens']:.1f}",
            " ".join(f"{layer}:{keep:.3g}" for layer, keep in way["schedule"]),
            f"{way['prefill_flops'] / 1e6:,.0f} ({way['prefill_flops_share']:.1%})",
            f"{way['kv_bytes'] / 1024:,.0f} ({way['kv_bytes_share']:.1%})",
        ]
        for way in results["ways"]
        if way["method"] in ("unrouted", "fastv", "pdrop", "nuwa")
    )
    return [
        "## What the policies cost",
        "",
        f"Counted by `reroute_kernels.cost` for a prompt of {results['visual_tokens']} visual and "
        f"{results['text_tokens']} other tokens: FLOPs of the prefill in the decoder layers, and bytes in the KV cache "
        "in float16. Methods that rank in FastV's place cost what it costs, but for the ranking.",
        "",
        *table(
            ["method", "", "visual tokens per layer", "decisions", "prefill MFLOPs", "KV KiB"],
            rows,
        ),
        "",
    ]


def return_section(results: dict) -> list[str]:
    rows = [
        [
            way["method"],
            f"{way['average_visual_tokens']:.1f}",
            way["action"],
            *(stage_cell(way["stages"], number) for number in range(4)),
        ]
        for way in results["ways"]
        if way["method"] in ("fastv", "pdrop", "nuwa", "all-text", "key-norm", "random")
    ]
    return [
        "## Where tokens come back",
        "",
        "For questions that ask for a box, of every decision: the share of the object's tokens that run from there on; "
        "in how many scenes at least one of them does; of those that run, the share that an earlier decision had "
        "deferred; and the overlap of all that is selected with the decision before (tokens in both, of those in "
        "either). What runs from the last decision on is what the answer is read from in the deepest layers.",
        "",
        *table(["method", "visual tokens per layer", "", *(f"decision {number + 1}" for number in range(4))], rows),
        "",
        "How to read it: every patch of an object tells where the object is, so one of them that runs can be enough. "
        "Deferring can only help where a later decision ranks the object's tokens higher than the first one does, and "
        "only as far as a token that skipped layers still serves those that read it. The mean ranks by layer in the "
        "first table say how much better later layers know.",
    ]


def stage_cell(stages: list[dict], number: int) -> str:
    if number >= len(stages):
        return "--"
    stage = stages[number]
    text = f"layer {stage['layer']}: {pc(stage['objects'])}; {pc(stage['seen'])}"
    if stage["overlap"] is None:
        return text
    return f"{text}; {pc(stage['returned'])}; {stage['overlap']:.2f}"


def draw_resemblance(results: dict, path: Path) -> None:
    """Coverage and rank by layer, and the accuracy without each layer."""
    like = results["resemblance"]
    layers = range(len(like["coverage"]))
    figure = new_figure(9, 3)
    left, right = figure.subplots(1, 2)
    plot_intervals(left, layers, like["coverage"], "coverage", "#2563a8")
    left.axhline(100 * TOP, color="#888888", linestyle="--", linewidth=1, label="chance")
    left.set(xlabel="layer", ylabel="%", title=f"object's tokens in the top {TOP:.0%}", ylim=(0, 100))
    plot_intervals(right, layers, like["without_layer"], "without this layer", "#c2410c")
    right.axhline(100 * like["whole"][0], color="#888888", linestyle="--", linewidth=1, label="all layers")
    right.set(xlabel="layer skipped", ylabel="ACC@0.5, %", title="accuracy without one layer", ylim=(0, 100))
    for axis in (left, right):
        axis.legend(frameon=False, fontsize=8)
    save(figure, path)


def draw_budgets(results: dict, path: Path) -> None:
    """The main measure by budget: a panel for each kind of question and published method."""
    shown = ("fastv", "pdrop", "nuwa", "random")
    figure = new_figure(11, 2.3 * len(KINDS))
    panels = figure.subplots(len(KINDS), len(shown), sharex=True, sharey="row")
    for row, kind in zip(panels, KINDS, strict=True):
        measure = measures(kind)[0]
        for axis, method in zip(row, shown, strict=True):
            for action, color in (("remove", "#c2410c"), ("reroute", "#2563a8")):
                ways = [way for way in results["ways"] if (way["method"], way["action"]) == (method, action)]
                budgets = [way["average_visual_tokens"] for way in ways]
                plot_intervals(axis, budgets, [way["scores"][kind][measure] for way in ways], action, color)
            whole = results["ways"][0]["scores"][kind][measure][0]
            axis.axhline(100 * whole, color="#888888", linestyle="--", linewidth=1, label="unrouted")
            axis.set_xscale("log", base=2)
            axis.set_xticks([20, 40, 80], ["20", "40", "80"])
            axis.minorticks_off()
        row[0].set_ylabel(f"{kind}\n{measure}, %")
    for axis, method in zip(panels[0], shown, strict=True):
        axis.set_title(method, fontsize=10)
    for axis in panels[-1]:
        axis.set_xlabel("visual tokens per layer")
    panels[0][0].legend(frameon=False, fontsize=8)
    save(figure, path)


def new_figure(width: float, height: float):
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def plot_intervals(axis, places, values, label: str, color: str) -> None:
    means, lows, highs = ([100 * value[part] for value in values] for part in range(3))
    axis.plot(places, means, marker="o", markersize=3, linewidth=1.5, color=color, label=label)
    axis.fill_between(places, lows, highs, color=color, alpha=0.18, linewidth=0)
    axis.spines[["top", "right"]].set_visible(False)


def save(figure, path: Path) -> None:
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "grounding"}):
        figure.savefig(path, metadata={"Date": None})
