"""One GPU in docs/performance.md: its floors, decisions, decode step and operations; its sentence in README.md."""

from __future__ import annotations

from pathlib import Path
from textwrap import wrap

from bench.pages.markdown import table
from bench.pages.prefills import prefill_section
from bench.pages.records import DECODERS, SECTIONS, read
from bench.pages.targets import targets
from bench.speed.device import kernel_digest


def gpu_summary(folders: list[Path]) -> str:
    """A sentence about every GPU: the times of decisions."""
    sentences = []
    for folder in folders:
        against = read(folder / "eager.json") if (folder / "eager.json").exists() else {"result": None}
        found = [
            f"{row['fused_in_graph']['median']:.1f} us for {row['shape']} with {row['length']:,} tokens"
            + (f" ({row['eager']['median']:,.0f} us by eager code)" if row["eager"] else "")
            for row in against["result"] or ()
        ]
        if found:
            sentences.append(
                f"On an {against['device']} a decision of one sample takes, in a CUDA graph and beyond the key "
                f"projection, {', '.join(found)}; the record is `bench/results/{folder.name}/eager.json`. Eager code "
                "cannot be captured in a graph."
                + ("" if has_these_kernels(against) else " The kernels have changed since, and wait for a GPU.")
            )
    return "\n".join(wrap(" ".join(sentences), 120, break_on_hyphens=False))


def has_these_kernels(record: dict) -> bool:
    """Whether a record is of the kernels as they are now."""
    return record.get("kernels") == kernel_digest()


def device_section(folder: Path, target: Path) -> list[str]:
    """Tables of one device's records."""
    records = {name: read(folder / f"{name}.json") for name in SECTIONS if (folder / f"{name}.json").exists()}
    about = next(iter(records.values()))
    title = about["device"] + (" (dry run: the times mean nothing)" if about["dry_run"] else "")
    lines = [f"## {title}", ""]
    details = (
        f"{name} {about[name]}" for name in ("driver", "cuda", "torch", "triton", "transformers") if about.get(name)
    )
    lines += [", ".join(details) + ".", ""]
    if not has_these_kernels(about):
        lines += [
            "**Measured before the latest change of the kernels.** None of these figures are claimed for them.",
            "",
        ]
    lines += [f"- `{name}` failed: {record['error']}" for name, record in records.items() if record.get("error")]
    results = {name: record["result"] for name, record in records.items() if record["result"] is not None}
    if missing := [name for name in SECTIONS if name not in records]:
        lines.append(f"- not measured: {', '.join(f'`{name}`' for name in missing)}")
    if tests := results.get("tests"):
        lines.append("- tests: " + ", ".join(f"{count} {name}" for name, count in tests.items()))
    lines += [f"- {name}: {found}" for name, found in results.get("sanitizer", {}).items()]
    if floors := results.get("floors"):
        lines += [
            f"- floors: {floors['empty_launch_in_graph_us']:.2f} us an empty launch in a graph, "
            f"{floors['empty_launch_us']:.2f} us outside; {floors['copy_gb_per_s']:,.0f} GB/s a copy",
        ]
    lines.append("")
    for name in DECODERS:
        if rows := [row for kind in ("prefill", "prefill-more") for row in results.get(f"{kind}-{name}", [])]:
            lines += prefill_section(rows, folder.name, target)
    for name in DECODERS:
        if rows := results.get(f"decision-{name}"):
            lines += decision_section(rows)
    if decode := results.get("decode-llava"):
        lines += decode_section(decode)
    lines += [*targets(results), ""]
    lines += operations_section(results)
    return lines


def decision_section(rows: list[dict]) -> list[str]:
    """Table of the parts of a decision."""
    parts = list(rows[0]["microseconds"])
    about = "Medians in us, each part alone in a CUDA graph."
    if "scatter and norm" in parts:
        about += " One launch does the scatter and the norm together, as the whole takes them."
    lines = [f"### A whole decision, {rows[0]['decoder']}", "", about, ""]
    cells = (
        [
            f"{row['visual_tokens']:,}",
            row["batch"],
            row["tier"],
            *(f"{row['microseconds'][part]['median']:.1f}" for part in parts),
        ]
        for row in rows
    )
    return [*lines, *table(["visual tokens", "B", "tier", *parts], cells), ""]


def decode_section(decode: dict) -> list[str]:
    """Table of a decode step."""
    lines = [f"### A decode step, {decode['decoder']}, {decode['visual_tokens']:,} visual tokens", ""]
    text = (
        f"{decode['batch']} samples, tier {decode['tier']}, in a CUDA graph, on caches of a fixed size in each layer: "
        f"unrouted / reroute = {decode['unrouted_over_reroute']:.2f}."
    )
    cells = (
        [name, f"{timing['median']:.2f}", f"{decode['cache_bytes'][name] / 2**20:,.0f}"]
        for name, timing in decode["milliseconds"].items()
    )
    return [*lines, text, "", *table(["", "ms a token", "cache, MiB"], cells), ""]


def operations_section(results: dict) -> list[str]:
    """Tables of single operations."""
    lines: list[str] = []
    if operations := results.get("operations"):
        lines += [
            "### Operations",
            "",
            "Medians in us; the floor is bytes over copy bandwidth or launches, in a graph.",
            "",
        ]
        lines += table(
            ["operation", "shape", "L", "B", "launches", "eager", "graph", "GB/s", "over floor"],
            (
                [
                    f"`{row['operation']}`",
                    row["shape"],
                    row["length"],
                    row["batch"],
                    row["launches"],
                    f"{row['eager']['median']:.1f}",
                    f"{row['graph']['median']:.1f}",
                    f"{row['graph']['gb_per_s']:,.0f}",
                    f"{row['graph']['over_floor']:.1f}",
                ]
                for row in operations
            ),
        )
        lines.append("")
    lines += greedy_rows(results.get("greedy", []))
    lines += reducer_rows(results.get("reducers", []))
    if against := results.get("eager"):
        lines += [
            "### Against the usual eager code",
            "",
            "One sample; medians in us. The eager code cannot be captured.",
            "",
        ]
        lines += table(
            ["shape", "L", "eager", "fused", "fused in a graph", "eager / fused", "eager / fused in a graph"],
            (
                [
                    row["shape"],
                    row["length"],
                    f"{row['eager']['median']:,.0f}" if row["eager"] else "out of memory",
                    f"{row['fused']['median']:,.0f}",
                    f"{row['fused_in_graph']['median']:,.0f}",
                    *(
                        f"{row[f'eager_over_{name}']:.1f}" if row["eager"] else ""
                        for name in ("fused", "fused_in_graph")
                    ),
                ]
                for row in against
            ),
        )
        lines.append("")
    return lines


def greedy_rows(rows: list[dict]) -> list[str]:
    """Table of greedy selections."""
    if not rows:
        return []
    about = "Medians in us; the eager code is a loop of torch calls, and cannot be captured."
    cells = (
        [
            f"`{row['operation']}`",
            row["name"],
            f"{row['rows']} x {row['tokens']:,} x {row['width']:,}",
            row["keep"],
            *(f"{timing['median']:,.0f}" for timing in (*row["microseconds"].values(), row["graph"])),
        ]
        for row in rows
    )
    headings = ["operation", "of", "features", "picks", "eager", "operation", "operation in a graph"]
    return ["### Greedy selections", "", about, "", *table(headings, cells), ""]


def reducer_rows(rows: list[dict]) -> list[str]:
    """Table of whole reducers."""
    if not rows:
        return []
    about = "Medians in us, without the vision tower; the eager code goes over images, frames and picks in loops."
    cells = (
        [
            row["name"],
            f"{row['rows']} x {row['tokens']:,} x {row['width']:,}",
            *(f"{timing['median']:,.0f}" for timing in row["microseconds"].values()),
            f"{row['microseconds']['eager']['median'] / row['microseconds']['reducer']['median']:.2f}",
        ]
        for row in rows
    )
    return ["### Reducers", "", about, "", *table(["of", "features", "eager", "reducer", "ratio"], cells), ""]
