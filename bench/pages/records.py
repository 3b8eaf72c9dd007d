"""Records under bench/results: where they are, and those that a GPU has."""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results"
DECODERS = ("llava", "qwen2_5_vl")
SECTIONS = (
    *(f"{kind}-{name}" for kind in ("prefill", "decision") for name in DECODERS),
    "decode-llava",
    *("floors", "operations", "copies", "greedy", "reducers", "eager", "tests", "sanitizer"),
    *(f"prefill-more-{name}" for name in DECODERS),
)
"""The sections of the GPU report, a record each, those first that matter most."""


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def read_all(pattern: str) -> list[dict]:
    """The records whose paths under bench/results match, by name."""
    return [read(path) for path in sorted(RESULTS.glob(pattern))]


def gpu_folders() -> list[Path]:
    """Folders of devices on which `make gpu-report` ran."""
    return sorted(path.parent for path in RESULTS.glob("*/floors.json"))
