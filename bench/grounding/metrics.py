"""Measures of answers, and their confidence intervals."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from reroute_kernels.boxes import overlap
from reroute_kernels.intervals import Interval

from .scenes import Question, read_box

MEASURES = {
    "acc@0.5": "share of boxes that overlap the true one by an IoU of 0.5 or more",
    "acc@0.3": "by 0.3 or more",
    "iou": "mean IoU, 0 for an answer that is no box",
    "centre": "share of boxes whose centre lies in the true one",
    "exact": "share of answers that are exactly right",
}
BOX_MEASURES, TEXT_MEASURES = ("acc@0.5", "acc@0.3", "iou", "centre"), ("exact",)
RESAMPLES = 1000


def measures(kind: str) -> tuple[str, ...]:
    """Measures of the answers to one kind of question."""
    return BOX_MEASURES if kind == "box" else TEXT_MEASURES


def score(question: Question, answer: str) -> dict[str, float]:
    """Each measure of one answer, 0 to 1."""
    if question.kind != "box":
        return {"exact": float(answer == question.answer)}
    box, true = read_box(answer), question.target.box
    if box is None:
        return dict.fromkeys(BOX_MEASURES, 0.0)
    shared = overlap(box, true)
    x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    inside = true[0] <= x <= true[2] and true[1] <= y <= true[3]
    return {"acc@0.5": float(shared >= 0.5), "acc@0.3": float(shared >= 0.3), "iou": shared, "centre": float(inside)}


def interval(values: Sequence[float]) -> Interval:
    """The mean of values and its 95% bootstrap interval (percentiles)."""
    from scipy.stats import bootstrap

    values = np.asarray(values, dtype=np.float64)
    mean = float(values.mean())
    if (values == values[0]).all():
        return Interval(mean, mean, mean)
    found = bootstrap(
        (values,), np.mean, n_resamples=RESAMPLES, method="percentile", rng=np.random.default_rng(0), vectorized=True
    ).confidence_interval
    return Interval(mean, float(found.low), float(found.high))


def pc(value: float) -> str:
    return f"{100 * value:.1f}%"


def cell(value: list[float]) -> str:
    mean, low, high = (100 * each for each in value)
    return f"{mean:.1f} [{low:.1f}, {high:.1f}]"


def signed(value: list[float]) -> str:
    mean, low, high = (100 * each for each in value)
    text = f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"
    return f"**{text}**" if low > 0 or high < 0 else text
