"""Pictures of the photo under a policy, stage by stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import wrap

from ..boxes import Box
from .demo import StageShare, Subject

# How patches and boxes are drawn.
RETURNED = "#ff2bd6"
DEFERRED = {"facecolor": (0.725, 0.824, 0.933, 0.55), "edgecolor": "#2563a8", "hatch": "...", "linewidth": 0}
REMOVED = {"facecolor": "#c9cbd1", "edgecolor": "#5c5f68", "hatch": "/////", "linewidth": 0}
MERGED = {"facecolor": "#ff8c1a", "edgecolor": "black", "linewidth": 0.8}
READ_BOX = {"edgecolor": "#ffd60a", "linewidth": 2.4}
TRUE_BOX = {"edgecolor": "#00b4f0", "linewidth": 2.4, "linestyle": "--"}


@dataclass
class Row:
    """Part of a picture for one policy."""

    name: str
    shares: Sequence[StageShare]
    box: Box | None = None
    """The box found in the answer."""


def draw(
    subject: Subject, rows: Sequence[Row], path: Path, truth: Box | None = None, question: str | None = None
) -> None:
    """Save the photo once per stage, a row for each policy: patches that ran, that were deferred and that are gone.

    Args:
        subject: whose picture it is.
        rows: the policies to draw, one row each.
        path: of the picture.
        truth: the box that was asked for.
        question: the prompt, above everything.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    patches = subject.grid
    photo = np.asarray(subject.picture)
    height, width = photo.shape[0] / patches[0], photo.shape[1] / patches[1]
    columns = 1 + max(len(row.shares) for row in rows)
    size = (3.2 * columns, 0.6 + 3.6 * len(rows))
    figure, axes = plt.subplots(len(rows), columns, figsize=size, squeeze=False, layout="constrained")
    for row, line in zip(rows, axes, strict=True):
        for axis in line:
            axis.set_axis_off()
        for axis, share in zip(line, [None, *row.shares], strict=False):
            axis.imshow(photo)
            if share is None:
                name = "\n".join(wrap(row.name.replace(",", ", "), 38)) or "what the model sees"
                axis.set_title(name, fontsize=10, parse_math=False)
                for box, style in ((truth, TRUE_BOX), (row.box, READ_BOX)):
                    if box is not None:
                        axis.add_patch(_rectangle(box, photo.shape, **style))
                continue
            _mark(axis, share, patches[1], (width, height))
            title = f"from layer {share.layer}: {len(share.ran)} ran,\n{len(share.returned) or 'none'} came back"
            axis.set_title(title, fontsize=10)
    shares = [share for row in rows for share in row.shares]
    waiting = " or ".join(sorted({"frozen" if share.freezes else "deferred" for share in shares if share.deferred}))
    legend = [
        (True, Patch(facecolor="white", edgecolor="black", label="ran")),
        (any(share.deferred for share in shares), Patch(**DEFERRED, label=waiting)),
        (any(share.removed for share in shares), Patch(**REMOVED, label="removed for good")),
        (
            any(share.deferred for share in shares),
            Patch(facecolor="white", edgecolor=RETURNED, label=f"came back after being {waiting}"),
        ),
        (
            any(share.merged for share in shares),
            Line2D([], [], linestyle="", marker="o", color=MERGED["facecolor"], label="mean of several", mec="black"),
        ),
        (any(row.box for row in rows), Patch(fill=False, label="box in the answer", **READ_BOX)),
        (truth is not None, Patch(fill=False, label="true box", **TRUE_BOX)),
    ]
    handles = [handle for is_there, handle in legend if is_there]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    if question is not None:
        figure.suptitle("\n".join(wrap(question, 100)), parse_math=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _mark(axis, share: StageShare, columns: int, size: tuple[float, float]) -> None:
    """Draw over the patches of a stage what became of them."""
    from matplotlib.patches import Circle, Rectangle

    width, height = size
    frame = {"fill": False, "edgecolor": RETURNED, "linewidth": 1.1}
    for places, style in ((share.deferred, DEFERRED), (share.removed, REMOVED), (share.returned, frame)):
        for place in sorted(places):
            axis.add_patch(Rectangle((place % columns * width, place // columns * height), width, height, **style))
    for place in sorted(share.merged):
        centre = (place % columns + 0.5) * width, (place // columns + 0.5) * height
        axis.add_patch(Circle(centre, 0.16 * min(size), **MERGED))


def _rectangle(box: Box, shape: tuple[int, ...], **style):
    from matplotlib.patches import Rectangle

    left, top, right, bottom = box
    corner = (left * shape[1], top * shape[0])
    return Rectangle(corner, (right - left) * shape[1], (bottom - top) * shape[0], fill=False, **style)
