"""What the task's YAML names: pictures, measures and means."""

from __future__ import annotations

from bench.grounding.lmms_eval_task.scoring import score


def pictures(document: dict) -> list:
    return [document["image"].convert("RGB")]


def results(document: dict, answers: list[str]) -> dict[str, float]:
    """The measures that fit the kind of question: four of a box, one of the others."""
    truth = document["box"] if document["kind"] == "box" else document["answer"]
    return score(document["kind"], answers[0].strip(), truth)


def mean(values: list[float]) -> float:
    return sum(values) / len(values)
