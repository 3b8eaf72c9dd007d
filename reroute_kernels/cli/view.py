"""One prompt under two policies, layer by layer, as one page of HTML that needs nothing else."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..boxes import Box, overlap
from ..policy import Policy
from ..trace import Trace
from .arguments import first_line
from .demo import DemoError, Subject, answer, answered_box, drawn_shares, reduced_share, routed, stage_shares
from .draw import Row, draw

TEMPLATE = Path(__file__).with_name("view.html")
ACTIVE, RETURNED, DEFERRED, REMOVED = "ardx"
"""State of a patch in a layer, as the page's data give it: it runs; it runs, and was deferred in the stage before; it
skips the stage; it is gone for good."""


@dataclass
class Pane:
    """Result of one policy."""

    name: str
    policy: Policy
    answer: str
    box: Box | None
    """The box found in the answer."""
    trace: Trace


def parse_box(text: str) -> Box:
    """A box such as `0.2,0.3,0.5,0.6`: left, top, right and bottom as shares of the picture that the model sees."""
    try:
        left, top, right, bottom = map(float, text.split(","))
        if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
            raise ValueError
    except ValueError:
        raise DemoError(
            f"truth must be left,top,right,bottom, shares from 0 to 1 such as 0.2,0.3,0.5,0.6, got {text!r}"
        ) from None
    return left, top, right, bottom


def unrouted_answer(subject: Subject, *, max_new_tokens: int) -> str:
    """The answer of the model when nothing is routed."""
    with torch.no_grad():
        return answer(subject, max_new_tokens)


def compare(subject: Subject, *, max_new_tokens: int) -> list[Pane]:
    """Answer the prompt under both policies."""
    panes = []
    for name, policy in zip(subject.names, subject.policies, strict=True):
        with routed(subject.model, policy) as routing, torch.no_grad():
            try:
                said = answer(subject, max_new_tokens)
            except (ValueError, NotImplementedError) as error:  # the policy and this prompt
                raise DemoError(first_line(error)) from None
            panes.append(Pane(name, policy, said, answered_box(subject, said), routing.trace))
    return panes


def stages_of(trace: Trace, positions: list[int]) -> list[dict[str, object]]:
    """State of every patch, stage by stage, from layer 0 on.

    Args:
        trace: of a prompt with one image.
        positions: of the image's visual tokens in the prompt.

    Returns:
        For each stage its first layer, whether a decision was made before it, a letter for each patch, and the scores
        of that decision, None at patches that were no candidates.
    """
    stages = []
    shares = stage_shares(trace, positions)
    if not shares or shares[0].layer > 0:
        kept = set(positions if trace.reduction is None else trace.reduction.selected[0].tolist())
        states = "".join(ACTIVE if position in kept else REMOVED for position in positions)
        stages.append({"layer": 0, "decision": False, "states": states, "scores": None})
    for share, stage in zip(shares, trace.stages, strict=True):
        states = [ACTIVE] * len(positions)
        for places, letter in ((share.returned, RETURNED), (share.deferred, DEFERRED), (share.removed, REMOVED)):
            for place in places:
                states[place] = letter
        # Nine digits tell every float32 from its neighbours.
        scores = [None if math.isnan(score) else float(f"{score:.9g}") for score in stage.scores[0].tolist()]
        stages.append({"layer": share.layer, "decision": True, "states": "".join(states), "scores": scores})
    return stages


def merged_of(trace: Trace, positions: list[int]) -> list[int]:
    """The patches that hold the mean of several, by their places, ascending; none without a reducer."""
    reduced = reduced_share(trace, positions)
    return [] if reduced is None else sorted(reduced.merged)


def page_data(
    subject: Subject, panes: Sequence[Pane], question: str, unrouted: str, model: str, truth: Box | None
) -> dict:
    """Data of the page.

    Args:
        subject: the model and the picture that it sees.
        panes: what `compare` found.
        question: the prompt.
        unrouted: the answer of the model when nothing is routed.
        model: its name.
        truth: the box that was asked for.
    """
    png = io.BytesIO()
    subject.picture.save(png, "PNG")
    positions = subject.visual_positions()
    return {
        "question": question,
        "unrouted": unrouted,
        "model": model,
        "image": f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}",
        "size": subject.picture.size,
        "grid": subject.grid,
        "layers": subject.model.config.get_text_config().num_hidden_layers,
        "truth": truth,
        "panes": [
            {
                "name": pane.name,
                "action": pane.policy.action,
                "answer": pane.answer,
                "box": pane.box,
                "overlap": overlap(pane.box, truth) if pane.box and truth else None,
                "stages": stages_of(pane.trace, positions),
                "merged": merged_of(pane.trace, positions),
            }
            for pane in panes
        ],
    }


def page(data: dict) -> str:
    """The page, as HTML."""
    text = json.dumps(data, separators=(",", ":"))  # ASCII; what could end the script or open another is escaped
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return TEMPLATE.read_text(encoding="utf-8").replace("{{data}}", text)


def still(subject: Subject, panes: Sequence[Pane], path: Path, truth: Box | None) -> None:
    """Save a picture of the stages, a row for each policy."""
    positions = subject.visual_positions()
    rows = [
        Row(
            f"{pane.policy.action}: {pane.name.removeprefix(f'{pane.policy.action}:')}",
            drawn_shares(pane.trace, positions),
            pane.box,
        )
        for pane in panes
    ]
    draw(subject, rows, path, truth)
