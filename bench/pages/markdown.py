"""Pieces of Markdown, and their place in a page."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


def table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> list[str]:
    """Lines of a table."""
    header = list(header)
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    return lines + [f"| {' | '.join(map(str, row))} |" for row in rows]


def replace_between(path: Path, name: str, content: str) -> None:
    """Put generated text between a file's markers."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, found, rest = path.read_text().partition(begin)
    _, found_end, after = rest.partition(end)
    if not found or not found_end:
        raise ValueError(f"{path} must hold {begin} and {end}")
    path.write_text(f"{before}{begin}\n{content}\n{end}{after}")
