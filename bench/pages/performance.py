"""docs/performance.md: every GPU that has results, vLLM, and a CPU."""

from __future__ import annotations

from pathlib import Path

from bench.pages.cpu import cpu_section
from bench.pages.gpu import device_section
from bench.pages.records import RESULTS, read
from bench.pages.reducers import reducers_section
from bench.pages.serving import serving_section


def performance_page(folders: list[Path], target: Path) -> None:
    """Write performance.md, and a plot of each device's prefills beside it if matplotlib is installed."""
    lines = [
        "# Performance",
        "",
        "Written by `python -m bench.pages` from the records in `bench/results/`; no figure here is typed by hand.",
        "What runs in a decision: [kernels.md](kernels.md).",
        "",
    ]
    if not folders:
        lines += [
            "**No GPU has been measured yet.** The kernels are checked in Triton's interpreter and by compilation for",
            "sm_80, sm_90, sm_100 and gfx942; none of their speed is known, and no target of the project",
            "has been shown on a device. `make gpu-report` measures a GPU and fills this page.",
            "",
        ]
    for folder in folders:
        lines += device_section(folder, target)
    lines += serving_section(read(RESULTS / "cpu" / "serving.json"))
    lines += ["", *reducers_section(read(RESULTS / "cpu" / "reducers.json"))]
    lines += ["", *cpu_section(read(RESULTS / "cpu" / "benchmarks.json"))]
    target.mkdir(parents=True, exist_ok=True)
    (target / "performance.md").write_text("\n".join(lines).rstrip() + "\n")
