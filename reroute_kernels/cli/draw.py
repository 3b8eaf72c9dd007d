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
    from matplotlib.patches import Patch, Rectangle

    patches, frame = subject.grid, {"fill": False, "edgecolor": RETURNED, "linewidth": 1.1}
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
            for places, style in ((share.deferred, DEFERRED), (share.removed, REMOVED), (share.returned, frame)):
                for place in sorted(places):
                    corner = (place % patches[1] * width, place // patches[1] * height)
                    axis.add_patch(Rectangle(corner, width, height, **style))
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
        (any(row.box for row in rows), Patch(fill=False, label="box in the answer", **READ_BOX)),
        (truth is not None, Patch(fill=False, label="true box", **TRUE_BOX)),
    ]
    handles = [handle for is_there, handle in legend if is_there]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    if question is not None:
        figure.suptitle("\n".join(wrap(question, 100)), parse_math=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _rectangle(box: Box, shape: tuple[int, ...], **style):
    from matplotlib.patches import Rectangle

    left, top, right, bottom = box
    corner = (left * shape[1], top * shape[0])
    return Rectangle(corner, (right - left) * shape[1], (bottom - top) * shape[0], fill=False, **style)
