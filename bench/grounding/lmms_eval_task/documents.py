"""Functions that the task's YAML names: pictures, measures and means."""

from __future__ import annotations

from bench.grounding.metrics import score
from bench.grounding.scenes import Object, Question


def pictures(document: dict) -> list:
    return [document["image"].convert("RGB")]


def results(document: dict, answers: list[str]) -> dict[str, float]:
    """The measures of the benchmark: four for a box, and one for the other kinds of answers."""
    # Only the box of the object asked for counts here.
    target = Object("", "", "", tuple(document["box"])) if document["box"] else None
    return score(Question(document["kind"], document["question"], document["answer"], target), answers[0])


def mean(values: list[float]) -> float:
    return sum(values) / len(values)
