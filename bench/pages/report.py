"""Every page and table of figures, the records it is made from, and the function that makes it."""

from __future__ import annotations

import json

from bench.grounding.report import grounding_page, model_card, summary_table
from bench.pages.gpu import gpu_summary
from bench.pages.kernels import compile_tables
from bench.pages.markdown import replace_between
from bench.pages.methods import images_table, methods_tables, videos_table
from bench.pages.models import support_tables, types_table
from bench.pages.performance import performance_page
from bench.pages.records import RESULTS, ROOT, gpu_folders, read, read_all
from bench.pages.refusals import refusals_list
from bench.pretrained.connector_report import connector_card
from bench.pretrained.report import pretrained_page

GROUNDING = {
    name: path
    for name in ("results", "additions", "waiting", "calibration", "reducers")
    if (path := RESULTS / "grounding" / f"{name}.json").exists()
}
"""The records of docs/grounding.md."""
PRETRAINED = RESULTS / "pretrained" / "results.json"
"""The record of docs/pretrained.md."""

CONNECTOR = RESULTS / "pretrained" / "connector"
"""The adapter that was trained."""


def pretrained_record() -> dict | None:
    """The record of docs/pretrained.md, with that of `make pretrained` from nothing."""
    if not PRETRAINED.exists():
        return None
    made = PRETRAINED.with_name("make.json")
    return read(PRETRAINED) | ({"from_nothing": read(made)} if made.exists() else {})


def connector_record() -> tuple[dict, list[dict]] | None:
    """The record of the trained connector and the log of its training, if there was one."""
    path = CONNECTOR.with_suffix(".json")
    if not path.exists():
        return None
    return read(path), [json.loads(line) for line in path.with_suffix(".jsonl").read_text().splitlines()]


def reducers_record() -> dict | None:
    """The record of methods that reduce, if they were measured."""
    return read(GROUNDING["reducers"]) if "reducers" in GROUNDING else None


TABLES = (
    ("README.md", "gpus", lambda: gpu_summary(gpu_folders())),
    ("README.md", "grounding", lambda: summary_table(read(GROUNDING["results"]), reducers_record())),
    ("docs/kernels.md", "compiled", lambda: compile_tables(read_all("compile/triton-*.json"))),
    ("docs/models.md", "support", lambda: support_tables(read_all("models/transformers-*.json"))),
    ("docs/models.md", "types", types_table),
    ("docs/methods.md", "methods", methods_tables),
    ("docs/methods.md", "images", images_table),
    ("docs/methods.md", "videos", videos_table),
    ("docs/refusals.md", "refusals", refusals_list),
)
"""Pages that are written by hand but for what lies between two markers: the page, the marker, the text."""


def write_pages() -> None:
    """Write the tables, and the pages that hold nothing else."""
    for page, marker, text in TABLES:
        replace_between(ROOT / page, marker, text())
    performance_page(gpu_folders(), ROOT / "docs")
    grounding_page({name: read(path) for name, path in GROUNDING.items()}, ROOT / "docs")
    pretrained_page(pretrained_record(), ROOT / "docs", connector_record())
    if (connector := connector_record()) is not None and CONNECTOR.exists():
        (CONNECTOR / "README.md").write_text(connector_card(*connector))
    model = ROOT / "models" / "tiny_grounding"
    log = [json.loads(line) for line in (model / "training.jsonl").read_text().splitlines()]
    (model / "README.md").write_text(model_card(read(GROUNDING["results"]), log))
