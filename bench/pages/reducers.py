"""Reducers and greedy selections on a CPU, in docs/performance.md: beside loops written from the papers' formulas."""

from __future__ import annotations

from textwrap import wrap

from bench.pages.markdown import table


def reducers_section(record: dict) -> list[str]:
    """Tables of greedy selections and of whole reducers."""
    text = (
        "Measured by `OMP_NUM_THREADS=1 python -m bench.speed.reducers` "
        f"on a CPU ({record['cpu']}, {record['threads']} thread, torch {record['torch']}), in float32; the record is "
        "`bench/results/cpu/reducers.json`. "
        f"Medians of {record['rounds']} rounds in which both run in turn, in milliseconds of the processor. "
        "Eager is a plain version by the formulas of each paper, in loops over images, frames and picks; like the "
        "published codes it holds the cosines of all pairs. What the vision tower gives is there beforehand. On a CPU "
        "the PyTorch reference runs, and time goes into products of matrices, as in the loops, so that no way to pick "
        "is many times faster: `select_diverse` multiplies each pair once instead of twice, since its first pick needs "
        "all pairs, and `select_dpp` compares the picked tokens with all, and not all with all. A ratio below 1 says "
        "that the loops are faster here: they go frame by frame, in the caches of the processor, where the reducers "
        "work on all frames at once, for a GPU. What launches cost there, several for each step of a loop, is not in "
        "these figures."
    )
    selections = (
        [
            f"`{row['operation']}`",
            row["name"],
            f"{row['rows']} x {row['tokens']:,} x {row['width']:,}",
            row["keep"],
            *_times(row["microseconds"]["eager"], row["microseconds"]["operation"]),
        ]
        for row in record["selections"]
    )
    reducers = (
        [
            row["name"],
            f"{row['rows']} x {row['tokens']:,} x {row['width']:,}",
            *_times(row["microseconds"]["eager"], row["microseconds"]["reducer"]),
        ]
        for row in record["reducers"]
    )
    return [
        "## Reducers, on a CPU",
        "",
        *wrap(text, 120, break_on_hyphens=False),
        "",
        *table(["operation", "of", "features", "picks", "eager", "operation", "eager / operation"], selections),
        "",
        *table(["reducer", "features", "eager", "reducer", "eager / reducer"], reducers),
        "",
    ]


def _times(eager: dict, own: dict) -> list[str]:
    return [*(f"{each['median'] / 1e3:,.1f}" for each in (eager, own)), f"{eager['median'] / own['median']:.2f}"]
