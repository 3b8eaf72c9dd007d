"""Microbenchmarks on a CPU, in docs/performance.md: prefill, operations, hooks, the host's part, reducers."""

from __future__ import annotations

from bench.pages.markdown import table


def cpu_section(results: dict) -> list[str]:
    """Tables of the microbenchmarks on a CPU, and a description."""
    return [
        "## A CPU",
        "",
        "Plain `pytest` runs no benchmark, `pytest --benchmark` runs them all. The prefill is that of a decoder",
        "with random weights. The oracle is its lower bound: the same layers on the selected tokens only, with",
        "every index known in advance, and the one key projection of all tokens that each decision needs. Eager is",
        "the usual way to write each operation, with whole attention matrices, masks and `nonzero`. On a CPU the",
        "PyTorch reference runs, which is written to be read, so single operations can be slower than eager; the",
        "ranking and the whole prefill are what gets faster. What the hooks cost in Python is measured on 32 layers",
        "too small to count. The towers that stage 1 of Nüwa is set beside have random weights too.",
        "",
        cpu_tables(results),
    ]


def cpu_tables(results: dict) -> str:
    machine, entries = results["machine_info"], results["benchmarks"]
    prefills = [entry["extra_info"] for entry in entries if entry["group"] == "prefill"]
    lines = [
        f"Measured by `make bench` on {machine['gpu'] or 'a CPU'} ({machine['cpu']}, {machine['torch_threads']} "
        f"threads, torch {machine['torch']}, transformers {machine['transformers']}); the record is "
        "`bench/results/cpu/benchmarks.json`. Medians, in milliseconds.",
        "",
        *table(
            [
                "prefill, 16 layers, d = 512, keep 8.35% at layers 3, 7, 11, 14",
                "unrouted",
                "routed",
                "oracle",
                "unrouted / routed",
                "routed / oracle",
            ],
            (
                [
                    f"{prefill['visual_tokens']:,} visual tokens",
                    *(f"{prefill['milliseconds'][name]['median']:.0f}" for name in ("unrouted", "routed", "oracle")),
                    f"{prefill['unrouted_over_routed']:.2f}",
                    f"{prefill['routed_over_oracle']:.3f}",
                ]
                for prefill in prefills
            ),
        ),
        "",
    ]
    operations = [entry for entry in entries if "operation" in entry["extra_info"]]
    backends = list(dict.fromkeys(entry["extra_info"]["backend"] for entry in operations))
    rows: dict[tuple[str, str], dict[str, float]] = {}
    for entry in operations:
        info = entry["extra_info"]
        rows.setdefault((info["operation"], _shape_of(info)), {})[info["backend"]] = entry["stats"]["median"] * 1e3
    lines += table(
        ["operation", "shape", *backends],
        (
            [f"`{operation}`", shape, *(f"{medians[name]:.3f}" if name in medians else "" for name in backends)]
            for (operation, shape), medians in rows.items()
        ),
    )
    return "\n".join([*lines, *hooks_table(entries), *host_table(entries), *reducers_table(entries)])


def _shape_of(info: dict) -> str:
    """Shape of a measured operation; greedy selections are recorded by their sizes."""
    if "shape" in info:
        return info["shape"]
    return f"{info['name']}: {info['rows']} x {info['tokens']:,} x {info['width']:,}, {info['keep']} picked"


def hooks_table(entries: list[dict]) -> list[str]:
    """Table of the time that hooks add to a forward; empty if it was not measured."""
    infos = [entry["extra_info"] for entry in entries if entry["group"] == "hooks"]
    calls = {info["call"]: info for info in infos if "call" in info}
    rows = []
    for call, info in calls.items():
        times, added = info["microseconds"], info["added_microseconds"]["routed"]
        rows.append([call, *(f"{value:,.0f}" for value in (times["unrouted"], times["routed"], added))])
        if "microseconds_of_a_decision" in info:
            rows.append(["of it, one decision", "", "", f"{info['microseconds_of_a_decision']:,.0f}"])
    if not rows:
        return []
    layers = next(iter(calls.values()))["layers"]
    return ["", *table([f"hooks on {layers} layers of width 32, microseconds", "unrouted", "routed", "added"], rows)]


def host_table(entries: list[dict]) -> list[str]:
    """Table of the host's part of a decision on a GPU; empty if it was not measured."""
    rows: list[list[str]] = []
    for info in (entry["extra_info"] for entry in entries if entry["group"] == "host"):
        for name, row in info["decision"].items():
            title = "`scatter_tokens_` and `route_tokens`" if name == "decision" else f"`{name}`"
            rows.append([title, row["launches"], row["python_calls"], f"{row['microseconds']:.0f}"])
        prompts = info["prompts"]
        shortest, longest = prompts["tokens"]
        after = (
            f"`rk.warm_up` compiled {prompts['kernels_of_warm_up']} kernels for Qwen2.5-VL-7B; {prompts['count']} "
            f"random prompts of {shortest} to {longest:,} tokens then compiled {prompts['kernels']}."
        )
    if not rows:
        return []
    header = ["host's part of operations on a GPU, LLaVA-1.5-7B", "launches", "Python calls", "microseconds"]
    text = "The driver is a library that does nothing (bench/speed/host.py), so no time of a GPU's driver is in it."
    return ["", *table(header, rows), "", f"{text} {after}"]


def reducers_table(entries: list[dict]) -> list[str]:
    """Table of a reducer's cost beside the vision tower; empty if it was not measured."""
    infos = [entry["extra_info"] for entry in entries if entry["group"] == "reducers"]
    rows = (
        [
            info["description"],
            f"{info['tower_milliseconds']['median']:,.0f} ({info['measured']})",
            f"{info['stage_1_milliseconds']['median']:,.1f}",
            f"{info['stage_1_over_tower']:.1%}",
        ]
        for info in infos
    )
    header = ["one image through a vision tower", "tower, milliseconds", "stage 1 of Nüwa", "stage 1 / tower"]
    return ["", *table(header, rows)] if infos else []
