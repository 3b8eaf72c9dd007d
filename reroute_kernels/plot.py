"""Pictures of schedules. They need matplotlib, which is imported when one is drawn."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

from .cost import Cost
from .policy import Policy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PICTURE_FORMATS = (".png", ".jpg", ".pdf", ".svg")

_MOST_COLUMNS = 3
_COLOR, _IDLE_COLOR = "#2563a8", "#e4e7ec"


def check_picture(path: Path, name: str) -> None:
    """Refuse, before anything runs, a picture that could not be saved.

    Args:
        path: of the picture.
        name: of the argument, for the message.

    Raises:
        ValueError: the path cannot be written, or names no format of a picture.
    """
    if path.is_dir() or not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        raise ValueError(f"{name} must be a file that can be written, got {path}")
    if path.suffix.lower() not in PICTURE_FORMATS:
        raise ValueError(f"{name} must end in one of {', '.join(PICTURE_FORMATS)}, got {path}")


def draw_schedules(costed: Sequence[tuple[str, Policy | None, Cost]]) -> Figure:
    """The visual tokens that run in each layer, one panel for each policy, all on the same scale.

    Args:
        costed: names, policies and their costs on one model with one prompt; the first is the model without routing,
            which is drawn where there is nothing else.

    Returns:
        A figure, to be saved by its method `savefig`.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    unrouted, shown = costed[0][2], costed[1:] or costed
    columns = min(_MOST_COLUMNS, len(shown))
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(4.4 * columns + 0.4, 3.5 * rows + 0.5), layout="constrained")
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for axis, panel in zip_longest(panels.flat, shown):
        if panel is None:
            axis.remove()
            continue
        _draw_schedule(axis, *panel, unrouted)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_xlabel("layer")
    for axis in panels[:, 0]:
        axis.set_ylabel("visual tokens that run")
    return figure


def _draw_schedule(axis: Axes, name: str, policy: Policy | None, cost: Cost, unrouted: Cost) -> None:
    running = [stage.visual_tokens for stage in cost.stages for _ in range(stage.layers)]
    edges = [layer - 0.5 for layer in range(len(running) + 1)]
    idle = "do not run" if policy is None else {"reroute": "deferred", "remove": "removed"}[policy.action]
    axis.stairs([cost.visual_tokens] * len(running), edges, fill=True, color=_IDLE_COLOR, label=idle)
    axis.stairs(running, edges, fill=True, color=_COLOR, label="run")
    for stage in cost.stages:
        middle = stage.first_layer + (stage.layers - 1) / 2
        axis.annotate(
            str(stage.visual_tokens), (middle, stage.visual_tokens), (0, 2), textcoords="offset points", ha="center"
        )
    axis.set_xlim(edges[0], edges[-1])
    axis.set_ylim(0, 1.12 * max(cost.visual_tokens, 1))
    axis.set_title(
        f"{name}\n{cost.average_visual_tokens:.1f} visual tokens per layer\n"
        f"{cost.prefill_flops / unrouted.prefill_flops:.1%} of prefill FLOPs, "
        f"{cost.kv_bytes / unrouted.kv_bytes:.1%} of KV bytes",
        fontsize=10,
    )
    axis.spines[["top", "right"]].set_visible(False)
    if policy is not None:
        axis.legend(loc="upper right", frameon=False, fontsize=9)
