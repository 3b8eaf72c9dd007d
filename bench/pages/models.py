"""docs/models.md: every model called in every way, as tests found it, from bench/results/models."""

from __future__ import annotations

from itertools import groupby
from operator import itemgetter

from bench.pages.markdown import table

SIGNS = {"works": "works", "refused": "refused", "not offered": "--"}


def support_tables(records: list[dict]) -> str:
    """A table of models and ways of calling, with a note for every cell that is refused or differs between versions."""
    records = sorted(records, key=lambda record: [int(part) for part in record["versions"]["transformers"].split(".")])
    newest, versions = records[-1], [record["versions"]["transformers"] for record in records]
    models, ways = list(newest["cells"]), newest["ways"]
    notes: list[str] = []

    def cell(model: str, way: str) -> str:
        outcomes = [record["cells"][model][way] for record in records]
        marks = []
        for outcome in dict.fromkeys(reversed(outcomes)):
            word, _, reason = outcome.partition(": ")
            reason, *_ = reason.split(". ")  # without transformers' advice after the first sentence
            if reason and reason not in notes:
                notes.append(reason)
            note = f" [{notes.index(reason) + 1}]" if reason else ""
            same = [each == outcome for each in outcomes]
            where = "" if all(same) else f" ({runs_of(versions, same)})"
            marks.append(f"{SIGNS[word]}{note}{where}")
        return "<br>".join(marks)

    software = {name: version for name, version in newest["versions"].items() if name != "transformers"}
    lines = [
        f"Written by `make test-matrix` from the tests that ran under transformers {', '.join(versions)} "
        f"({', '.join(f'{name} {version}' for name, version in software.items())}).",
        "",
        *table(["way of calling", *models], ([f"**{way}**", *(cell(model, way) for model in models)] for way in ways)),
        "",
        "Notes:",
        "",
        *(f"{number}. {_escaped(note)}" for number, note in enumerate(notes, start=1)),
        "",
        "What each row calls:",
        "",
        *table(["way of calling", "call"], ways.items()),
    ]
    return "\n".join(lines)


def types_table() -> str:
    """Every type of the newest transformers: its adapter and text models, or the reason for which it is refused."""
    from transformers import __version__
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as CLASSES

    from reroute_kernels.models import ADAPTERS
    from reroute_kernels.models.refused import REFUSED

    def row(name: str) -> list[str]:
        if name in ADAPTERS:
            adapter = ADAPTERS[name]
            return [f"`{name}`", CLASSES[name], "routed", f"`{adapter.__name__}`"]
        return [f"`{name}`", CLASSES[name], "refused", _escaped(REFUSED[name])]

    routed = sum(name in ADAPTERS for name in CLASSES)
    return "\n".join(
        [
            f"transformers {__version__} has {len(CLASSES)} types; {routed} are routed.",
            "",
            *table(["type", "class", "", "adapter, or reason"], map(row, sorted(CLASSES))),
        ]
    )


def runs_of(versions: list[str], chosen: list[bool]) -> str:
    """The chosen ones of versions in order; a run of consecutive ones is given by its first and last."""
    runs = []
    for is_chosen, run in groupby(zip(chosen, versions, strict=True), key=itemgetter(0)):
        if is_chosen:
            names = [version for _, version in run]
            runs.append(names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}")
    return ", ".join(runs)


def _escaped(note: str) -> str:
    return note.replace("|", "\\|").replace("<", "&lt;").replace("_", "\\_")
