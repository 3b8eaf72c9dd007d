"""Whole prefills on a GPU, in docs/performance.md: a table of each decoder, and its plot."""

from __future__ import annotations

from pathlib import Path
from textwrap import wrap

from bench.pages.markdown import table


def prefill_section(rows: list[dict], device: str, target: Path) -> list[str]:
    decoder = rows[0]["decoder"]
    lines = [f"### Prefill, {decoder}", ""]
    text = (
        "Medians in ms, of a decoder with random weights. In a CUDA graph: the layers alone, every count known before; "
        "the oracle knows the indices of the tokens that run, too. Eager: the whole model through `rk.apply`; host: "
        "until the call returns."
    )
    lines += [*wrap(text, 120, break_on_hyphens=False), ""]
    graph, eager = ("unrouted", "remove", "reroute", "oracle"), ("unrouted", "reroute")
    header = ["tokens", "B", "tier", *(f"graph: {name}" for name in graph), "unrouted / reroute", "reroute / oracle"]
    header += [*(f"eager: {name}" for name in eager), *(f"host: {name}" for name in eager), "peak, MiB", "reroute"]
    cells = []
    for row in rows:
        ratios = (f"{row[name]:.3f}" for name in ("unrouted_over_reroute", "reroute_over_oracle"))
        cells.append([f"{row['tokens']:,}", row["batch"], row["tier"]])
        cells[-1] += [*(f"{row['graph'][name]['median']:.2f}" for name in graph), *ratios]
        # A run that was cut off may have timed the graphs only.
        cells[-1] += [f"{row['eager'][name]['median']:.2f}" if "eager" in row else "" for name in eager]
        cells[-1] += [f"{row['host_ms'][name]:.2f}" if "host_ms" in row else "" for name in eager]
        peaks = row.get("peak_bytes") or {}
        cells[-1] += [f"{peaks[name] / 2**20:,.0f}" if peaks.get(name) else "" for name in eager]
    lines += table(header, cells)
    if image := plot(rows, device, target):
        lines += ["", f"![Prefill of {decoder}]({image})"]
    return [*lines, ""]


def plot(rows: list[dict], device: str, target: Path) -> str | None:
    """Draw a decoder's prefills; returns the file's name, or None if there is no file and no matplotlib to draw it."""
    file = f"prefill-{rows[0]['decoder'].lower().replace(' ', '-')}-{device}.svg"
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return file if (target / file).exists() else None
    names = ("unrouted", "remove", "reroute", "oracle")
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    batches = sorted({row["batch"] for row in rows})
    for batch, axes in zip(batches, figure.subplots(1, len(batches), squeeze=False)[0], strict=True):
        chosen = [row for row in rows if row["batch"] == batch]
        for offset, name in enumerate(names):
            places = [place + 0.2 * offset for place in range(len(chosen))]
            axes.bar(places, [row["graph"][name]["median"] for row in chosen], 0.2, label=name)
        labels = [f"{row['tokens']:,}, tier {row['tier']}" for row in chosen]
        axes.set_xticks([place + 0.3 for place in range(len(chosen))], labels)
        axes.set_title(f"batch {batch}")
    figure.axes[0].set_ylabel("prefill in a CUDA graph, ms")
    figure.axes[-1].legend()
    figure.suptitle(f"{rows[0]['decoder']}, {device}")
    target.mkdir(parents=True, exist_ok=True)
    figure.savefig(target / file, metadata={"Date": None})
    return file
