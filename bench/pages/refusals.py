"""docs/refusals.md: everything that is refused, from models/refusals.py."""

from __future__ import annotations

from reroute_kernels.models import refusals


def refusals_list() -> str:
    """All refusals, and the limits that cannot be noticed, from the tables of models/refusals.py."""
    lines = []
    for title, rules in refusals.PAGE.items():
        lines += [f"## {title}", ""]
        lines += [f"- {rule.summary}: `{rule.error.__name__}`" for rule in rules] + [""]
    lines += ["## Not noticed", "", "Nothing in the call tells these, so that they are not refused:", ""]
    return "\n".join(lines + [f"- {limit}" for limit in refusals.SILENT])
