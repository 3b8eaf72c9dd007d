"""The targets of the project, in docs/performance.md, and whether a GPU reached them."""

from __future__ import annotations

from bench.pages.markdown import table
from bench.pages.records import DECODERS


def targets(results: dict) -> list[str]:
    """Table of the targets, and of the figures that this device reached."""
    rows = []
    for row in results.get("operations", []):
        if (row["operation"], row["shape"], row["batch"]) == ("decision", "LLaVA-1.5-7B", 1):
            rows.append(["a decision in a graph, LLaVA-1.5-7B, us", "at most 15", row["graph"]["median"]])
    floors = results.get("floors")
    for row in results.get("copies", []) if floors else []:
        share = row["gb_per_s"] / floors["copy_gb_per_s"]
        rows.append([f"`{row['operation']}`, share of copy bandwidth", "at least 0.85", share])
    for row in results.get("eager", []):
        if row["eager"]:
            what = f"eager / fused in a graph, {row['shape']}, L = {row['length']}"
            rows.append([what, "at least 20", row["eager_over_fused_in_graph"]])
    rows += [row for name in DECODERS for row in prefill_targets(results, name)]
    if not rows:
        return []
    return ["### Targets", "", *table(["what", "target", "measured", ""], (_judged(*row) for row in rows))]


def prefill_targets(results: dict, name: str) -> list[list]:
    """Rows of the targets of a decoder's prefills."""
    rows: list[list] = []
    for row in (row for kind in ("prefill", "prefill-more") for row in results.get(f"{kind}-{name}", [])):
        case = f"{row['decoder']}, {row['tokens']:,} tokens, B = {row['batch']}, tier {row['tier']}"
        rows.append([f"reroute / oracle in a graph, {case}", "at most 1.03", row["reroute_over_oracle"]])
        if (row["batch"], row["tier"], row["decoder"]) == (1, 192, "LLaVA-1.5-7B"):
            rows.append([f"unrouted / reroute in a graph, {case}", "at least 1.9", row["unrouted_over_reroute"]])
        if row["batch"] == 8 and row["tier"] == 64:
            share = row["share_of_flops_speed_up"]
            rows.append([f"share of the speed-up that FLOPs predict, {case}", "at least 0.9", share])
    return rows


def _judged(what: str, target: str, measured: float) -> list[str]:
    limit = float(target.split()[-1])
    met = measured <= limit if target.startswith("at most") else measured >= limit
    return [what, target, f"{measured:.4g}", "met" if met else "**missed**"]
