"""Pictures of schedules. They need matplotlib, which is imported when one is drawn."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING

from ..cost import Cost, surviving_tokens
from ..policy import Policy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ..calibration import Calibration
    from ..loyalty import Loyalty, PolicyLoyalty
    from ..trace import Trace

PICTURE_FORMATS = (".png", ".jpg", ".pdf", ".svg")

_MOST_COLUMNS = 3
_COLORS = {"removed": "#e4e7ec", "deferred": "#b9d2ee", "run": "#2563a8"}


def check_picture(path: Path, name: str, formats: Sequence[str] = PICTURE_FORMATS) -> None:
    """Refuse, before anything runs, a picture or page that could not be saved.

    Args:
        path: of the picture.
        name: of the argument, for the message.
        formats: accepted endings.

    Raises:
        ValueError: the path cannot be written, or has another ending.
    """
    if path.is_dir() or not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        raise ValueError(f"{name} must be a file that can be written, got {path}")
    if path.suffix.lower() not in formats:
        raise ValueError(f"{name} must end in {'one of ' if len(formats) > 1 else ''}{', '.join(formats)}, got {path}")


def draw_schedules(costed: Sequence[tuple[str, Policy | None, Cost]]) -> Figure:
    """The visual tokens that run in each layer, one panel for each policy, all on the same scale.

    Args:
        costed: names, policies and their costs on one model with one prompt; the first is the model without routing,
            which is drawn if there is nothing else.

    Returns:
        A figure, to be saved by its method `savefig`.
    """
    from matplotlib.figure import Figure

    unrouted, shown = costed[0][2], costed[1:] or costed
    columns = min(_MOST_COLUMNS, len(shown))
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(4.4 * columns + 0.4, 3.4 * rows + 0.8), layout="constrained")
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for axis, panel in zip_longest(panels.flat, shown):
        if panel is None:
            axis.remove()
        else:
            _draw_schedule(axis, *panel, unrouted)
    for axis in panels[:, 0]:
        axis.set_ylabel("visual tokens")
    _add_legend(figure, any(policy is not None and policy.action == "freeze" for _, policy, _ in shown))
    return figure


def _draw_schedule(axis: Axes, name: str, policy: Policy | None, cost: Cost, unrouted: Cost) -> None:
    from matplotlib.patheffects import withStroke

    removed, deferred, run = _COLORS.values()
    candidates, running = [], []
    pool = surviving_tokens(None if policy is None else policy.reducer, cost.visual_tokens)
    for stage in cost.stages:
        if policy is not None and policy.action == "remove":
            pool = stage.visual_tokens
        candidates += [pool] * stage.layers
        running += [stage.visual_tokens] * stage.layers
    layers = len(running)
    edges = [layer - 0.5 for layer in range(layers + 1)]
    for heights, color in (([cost.visual_tokens] * layers, removed), (candidates, deferred), (running, run)):
        axis.stairs(heights, edges, fill=True, color=color)
    for stage in cost.stages:
        if stage.first_layer:
            axis.axvline(stage.first_layer - 0.5, color="white", linewidth=1)
        axis.annotate(
            str(stage.visual_tokens),
            (stage.first_layer + (stage.layers - 1) / 2, stage.visual_tokens),
            (0, 2),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            path_effects=[withStroke(linewidth=2, foreground="white")],
        )
    axis.set_xlim(edges[0], edges[-1])
    axis.set_ylim(0, 1.1 * cost.visual_tokens)
    axis.set_xticks(range(0, layers, 4 * math.ceil(layers / 40)))
    axis.set_xlabel("layer")
    axis.spines[["top", "right"]].set_visible(False)
    title = [
        *wrap(name.replace(",", ", "), 48),
        f"{cost.average_visual_tokens:.1f} visual tokens per layer",
        f"{cost.prefill_flops / unrouted.prefill_flops:.1%} of unrouted prefill FLOPs, "
        f"{cost.kv_bytes / unrouted.kv_bytes:.1%} of its KV bytes",
    ]
    axis.set_title("\n".join(title), fontsize=10, parse_math=False)


def draw_trace(trace: Trace, sample: int) -> Figure:
    """A row for each stage of a routed prefill, a column for each visual token: run, deferred or removed."""
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure

    removed, deferred, run = range(3)
    places = trace.visual_positions[sample].tolist()
    left = set(places if trace.reduction is None else trace.reduction.selected[sample].tolist())
    stages = [(stage.layer, set(stage.selected[sample].tolist())) for stage in trace.stages]
    if not stages or stages[0][0] > 0:
        stages.insert(0, (0, left))
    back = left if trace.policy.action != "remove" else set()  # may run in a later stage
    states = [[run if each in ran else deferred if each in back else removed for each in places] for _, ran in stages]
    figure = Figure(figsize=(8, 0.5 * len(states) + 1.2), layout="constrained")
    axis = figure.subplots()
    colors = ListedColormap(list(_COLORS.values()))
    if places:
        axis.imshow(states, aspect="auto", cmap=colors, vmin=0, vmax=2, interpolation="nearest")
    axis.set_yticks(range(len(stages)), [f"layer {layer}" for layer, _ in stages])
    axis.set_xlabel("visual token")
    _add_legend(figure, trace.policy.action == "freeze")
    return figure


def draw_qualities(calibration: Calibration, policy: Policy | None = None) -> Figure:
    """The quality of each layer with its interval, and lines at the decision layers of a policy."""
    from matplotlib.figure import Figure

    layers, means, lows, highs = zip(*calibration.qualities, strict=True)
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axis = figure.subplots()
    color = _COLORS["run"]
    axis.fill_between(layers, lows, highs, color=_COLORS["deferred"], alpha=0.6, linewidth=0, label="95% interval")
    axis.plot(layers, means, marker="o", markersize=3, color=color, label="quality")
    axis.axhline(calibration.unrouted, color="grey", linewidth=1, linestyle=":", label="all tokens")
    for number, stage in enumerate(() if policy is None else policy.schedule):
        label = None if number else "decides"
        axis.axvline(stage.layer, color="black", linewidth=1, linestyle="--", label=label)
    axis.set_xlim(-0.5, calibration.num_layers - 0.5)
    axis.set_ylim(0, 1.05 * max(*highs, calibration.unrouted) or 1)
    axis.set_xlabel("layer that ranks")
    axis.set_ylabel(calibration.measure)
    title = (
        f"{calibration.samples:,} samples, the layer's top {calibration.share:.0%} from layer {calibration.early} on"
    )
    axis.set_title(title, fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8, loc="best")
    return figure


_LOYALTY_PANELS = {
    "divergence": "divergence of the next token, nats",
    "same_token": "same next token",
    "same_answer": "same greedy answer",
}


def draw_loyalty(found: Loyalty) -> Figure:
    """Agreement by the visual tokens that run, with intervals: a line for each method or schedule over its budgets."""
    from matplotlib.figure import Figure

    methods: dict[str, list[PolicyLoyalty]] = {}
    for each in found.policies:
        methods.setdefault(each.method, []).append(each)
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    panels = figure.subplots(1, len(_LOYALTY_PANELS))
    for axis, (measure, title) in zip(panels, _LOYALTY_PANELS.items(), strict=True):
        for name, policies in methods.items():
            _draw_agreement(axis, name, policies, measure)
        axis.set_xlabel(f"visual tokens per layer, of {found.visual_tokens:,}")
        axis.set_title(title, fontsize=10)
        axis.set_ylim(0, None if measure == "divergence" else 1.05)
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(handles)), frameon=False, fontsize=8)
    return figure


def _draw_agreement(axis: Axes, name: str, policies: Sequence[PolicyLoyalty], measure: str) -> None:
    """The line of a method; dashed if it removes."""
    ordered = sorted(policies, key=lambda each: each.average_visual_tokens)
    places = [each.average_visual_tokens for each in ordered]
    means, lows, highs = zip(*(each.intervals[measure] for each in ordered), strict=True)
    below = [mean - low for mean, low in zip(means, lows, strict=True)]
    above = [high - mean for mean, high in zip(means, highs, strict=True)]
    style = "--" if ordered[0].policy.action == "remove" else "-"
    axis.errorbar(places, means, [below, above], label=name, linestyle=style, marker="o", markersize=4, capsize=2)


def _add_legend(figure: Figure, freezes: bool) -> None:
    from matplotlib.patches import Patch

    labels = {"deferred": "deferred or frozen"} if freezes else {}
    handles = [Patch(color=color, label=labels.get(label, label)) for label, color in _COLORS.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
