"""The scene that the demo shows, picked by a rule."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from reroute_kernels.notation import policy_text

from .answers import Item
from .metrics import score
from .policies import UNROUTED, Way, policy_of
from .scenes import SIDE

REMOVE = Way("fastv", "remove", 0.25)
REROUTE = Way("fastv", "reroute", 0.25)
"""The policies that the demo compares."""
MEASURE = "acc@0.5"
BRIGHTNESS = (96, 160)
"""Least and most of a scene's mean, of 255: over darker and lighter ones a veil is hardly seen."""


def pick(items: Sequence[Item], answers: dict[Way, list[str]], better: Way, worse: Way) -> int:
    """The place of the first item whose scene shows the difference that holds on average.

    Its scene is neither dark nor nearly white, and it asks for a box. Without routing and under the policy that is
    better on average the box is found (IoU of 0.5 or more), and under the other one it is not.
    """
    for place, item in enumerate(items):
        if item.question.kind == "box" and BRIGHTNESS[0] <= item.scene.image.mean() <= BRIGHTNESS[1]:
            found = [score(item.question, answers[way][place])[MEASURE] for way in (UNROUTED, better, worse)]
            if found == [1, 1, 0]:
                return place
    raise ValueError(f"no scene shows that {better.name} is better than {worse.name}")


def write_example(items: Sequence[Item], answers: dict[Way, list[str]], results: dict, folder: Path) -> None:
    """Write the picked scene, its question and truth, and the rates over all scenes beside the model."""
    rates = {Way(way["method"], way["action"], way["keep"]): way["scores"]["box"][MEASURE] for way in results["ways"]}
    worse, better = sorted((REMOVE, REROUTE), key=lambda way: rates[way][0])
    item = items[pick(items, answers, better, worse)]
    example = {
        "prompt": item.question.text,
        "truth": [edge / SIDE for edge in item.question.target.box],
        "scene": item.number,
        "scenes": results["items"]["box"],
        "measure": MEASURE,
        "rates": {
            name: list(rates[way]) for name, way in (("unrouted", UNROUTED), ("remove", REMOVE), ("reroute", REROUTE))
        },
        "policies": {way.action: policy_text(policy_of(way)) for way in (REMOVE, REROUTE)},
    }
    Image.fromarray(item.scene.image).save(folder / "example.png", optimize=True)
    (folder / "example.json").write_text(json.dumps(example, indent=2) + "\n")
