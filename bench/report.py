"""Write the benchmark tables of README.md from bench/results: `python -m bench.report`."""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results" / "cpu" / "benchmarks.json"
BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"


def tables(results: dict) -> str:
    """The tables as Markdown."""
    machine, entries = results["machine_info"], results["benchmarks"]
    prefills = [entry["extra_info"] for entry in entries if entry["group"] == "prefill"]
    lines = [
        f"Measured by `make bench` on {machine['gpu'] or 'a CPU'} ({machine['cpu']}, {machine['torch_threads']} "
        f"threads, torch {machine['torch']}, transformers {machine['transformers']}); the record is "
        f"`{RESULTS.relative_to(ROOT)}`. Medians, in milliseconds.",
        "",
        "| prefill, 16 layers, d = 512, keep 8.35% at layers 3, 7, 11, 14 | unrouted | routed | oracle "
        "| unrouted / routed | routed / oracle |",
        "|---|---|---|---|---|---|",
    ]
    for prefill in prefills:
        times = (f"{prefill['milliseconds'][name]['median']:.0f}" for name in ("unrouted", "routed", "oracle"))
        lines.append(
            f"| {prefill['visual_tokens']:,} visual tokens | {' | '.join(times)} "
            f"| {prefill['unrouted_over_routed']:.2f} | {prefill['routed_over_oracle']:.3f} |"
        )
    operations = [entry for entry in entries if "operation" in entry["extra_info"]]
    backends = list(dict.fromkeys(entry["extra_info"]["backend"] for entry in operations))
    lines += ["", f"| operation | shape | {' | '.join(backends)} |", "|---|---|" + "---|" * len(backends)]
    rows: dict[tuple[str, str], dict[str, float]] = {}
    for entry in operations:
        info = entry["extra_info"]
        rows.setdefault((info["operation"], info["shape"]), {})[info["backend"]] = entry["stats"]["median"] * 1e3
    for (operation, shape), medians in rows.items():
        lines.append(f"| `{operation}` | {shape} | {' | '.join(f'{medians[name]:.3f}' for name in backends)} |")
    return "\n".join(lines)


def main() -> None:
    readme = ROOT / "README.md"
    before, _, rest = readme.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    content = tables(json.loads(RESULTS.read_text()))
    readme.write_text(f"{before}{BEGIN}\n{content}\n{END}{after}")


if __name__ == "__main__":
    main()
