"""How good one answer is."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..metrics import overlap
from ..scenes import read_box


def score(question_kind: str, answer: str, truth: str | Sequence[float]) -> dict[str, float]:
    """Each measure of one answer, 0 to 1.

    Args:
        question_kind: one of `scenes.KINDS`.
        answer: what the model wrote.
        truth: the true box in pixels, left, top, right, bottom, where a box is asked for; else the true answer.
    """
    if question_kind != "box":
        return {"exact": float(answer == truth)}
    box = read_box(answer)
    if box is None:
        return dict.fromkeys(("acc@0.5", "acc@0.3", "iou", "centre"), 0.0)
    shared = float(overlap(torch.tensor(box), torch.tensor(truth)))
    x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    inside = truth[0] <= x <= truth[2] and truth[1] <= y <= truth[3]
    return {"acc@0.5": float(shared >= 0.5), "acc@0.3": float(shared >= 0.3), "iou": shared, "centre": float(inside)}
