"""docs/kernels.md: registers, spills and memory of every kernel, from bench/results/compile."""

from __future__ import annotations

from bench.pages.markdown import table


def compile_tables(records: list[dict]) -> str:
    """Registers by Triton, worst case and totals of every kernel and target."""
    versions = [record["triton"] for record in records]
    by_kernel: dict[tuple[str, str], dict[str, list[dict]]] = {}
    for record in records:
        for row in record["kernels"]:
            by_kernel.setdefault((row["kernel"], row["target"]), {}).setdefault(record["triton"], []).append(row)
    rows = []
    for (kernel, target), compiled in sorted(by_kernel.items()):
        every = [row for version in versions for row in compiled.get(version, [])]
        registers = (str(max(row["registers"] for row in compiled[version])) for version in versions)
        spilled = sum(row["spills"] + row["stack"] for row in every)
        shared = max(row["shared"] for row in every)
        wide = [row["wide_loads"] > row["other_loads"] for row in every]
        share = "all" if all(wide) else "none" if not any(wide) else f"{sum(wide) / len(wide):.0%}"
        rows.append([f"`{kernel}`", target, *registers, spilled, f"{shared / 1024:.0f} KiB", share])
    cases = len({(row["kernel"], row["case"]) for record in records for row in record["kernels"]})
    return "\n".join(
        [
            f"{cases} pairs of kernel and shape on each target, compiled by `make compile-matrix` with Triton "
            f"{', '.join(versions)}; the records are in `bench/results/compile/`. Registers of a thread and shared "
            "memory are those of the worst shape; spills add registers and stack bytes of all of them. The last column "
            "says for how many shapes most load instructions are 128 bits wide (odd shapes are among them).",
            "",
            *table(
                [
                    "kernel",
                    "target",
                    *(f"registers, {version}" for version in versions),
                    "spills",
                    "shared",
                    "128-bit loads",
                ],
                rows,
            ),
        ]
    )
