"""The tables that the command line prints."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rich.table import Column, Table
from rich.text import Text

from ..cost import Cost
from ..policy import Policy
from ..presets import Preset
from .output import next_token_flops, rule_text

if TYPE_CHECKING:
    from ..boxes import Box
    from .demo import Run, StageShare
    from .view import Pane

_DECIMAL = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_BINARY = ((2**40, "Ti"), (2**30, "Gi"), (2**20, "Mi"), (2**10, "Ki"))


def presets_table(listed: Iterable[tuple[Preset, Policy, float]], *, rules: bool) -> Table:
    """Configurations, their policies and the visual tokens that these average.

    Args:
        listed: name, policy and average of each.
        rules: whether to show ranking, positions and reducer, too.
    """
    columns = [Column("preset", no_wrap=True, min_width=42), "action", "layer: keep", "average of 576 tokens"]
    if rules:
        columns = [
            Column("preset", no_wrap=True),
            *("action", "layer: keep", "average\nof 576 tokens"),
            *(Column(header, overflow="fold") for header in ("ranking", "positions", "reducer")),
        ]
    table = Table(*columns)
    for name, policy, average in listed:
        cells = [
            f"{name.model}/{name.method}/{name.avg_tokens}",
            policy.action,
            "  ".join(f"{stage.layer}: {stage.keep:g}" for stage in policy.schedule),
            f"{average:.1f}",
        ]
        if rules:
            cells += [rule_text(policy.ranking), policy.positions, rule_text(policy.reducer)]
        table.add_row(*cells)
    return table


def costs_table(costed: Sequence[tuple[str, Policy | None, Cost]]) -> Table:
    """Table of policies' costs. Percentages are relative to the first row; for rankings, to the first row's prefill."""
    base = costed[0][2]
    prefill, prefill_unit = _scale(base.prefill_flops, _DECIMAL)
    decode, decode_unit = _scale(next_token_flops(base), _DECIMAL)
    cache, cache_unit = _scale(base.kv_bytes, _BINARY)
    columns = (
        ("visual tokens\nper layer", lambda cost: cost.average_visual_tokens, 1),
        (f"prefill\n{prefill_unit}FLOPs", lambda cost: cost.prefill_flops, prefill),
        ("projec-\ntions", lambda cost: cost.projections, prefill),
        ("atten-\ntion", lambda cost: cost.attention, prefill),
        ("\nMLP", lambda cost: cost.mlp, prefill),
        ("\nranking", lambda cost: cost.ranking, prefill),
        (f"decode step\n{decode_unit}FLOPs", next_token_flops, decode),
        (f"KV cache\n{cache_unit}B", lambda cost: cost.kv_bytes, cache),
    )
    headers = [Column(header, justify="right", no_wrap=True) for header, _, _ in columns]
    table = Table(Column("\npolicy", overflow="fold"), *headers, show_lines=True)
    for name, _, cost in costed:
        cells = []
        for _, figure, scale in columns:
            value, whole = figure(cost), figure(base) or base.prefill_flops
            cells.append(f"{value / scale:,.4g}" + ("" if cost is base else f"\n{value / whole:.1%}"))
        table.add_row(Text(name), *cells)
    return table


def stages_table(cost: Cost) -> Table:
    """Table of one policy's cost, stage by stage."""
    prefill, unit = _scale(cost.prefill_flops, _DECIMAL)
    cache, cache_unit = _scale(cost.kv_bytes, _BINARY)
    headers = (
        "\nlayers",
        "visual tokens\nthat run",
        "with\ntext",
        f"prefill\n{unit}FLOPs",
        "projec-\ntions",
        "atten-\ntion",
        "\nMLP",
        "\nranking",
        f"KV cache\n{cache_unit}B",
    )
    table = Table(*(Column(header, justify="right", no_wrap=True) for header in headers))
    for stage in cost.stages:
        flops = (stage.flops, stage.projections, stage.attention, stage.mlp, stage.ranking)
        table.add_row(
            f"{stage.first_layer} to {stage.first_layer + stage.layers - 1}",
            f"{stage.visual_tokens:,}",
            f"{stage.tokens:,}",
            *(f"{value / prefill:,.4g}" for value in flops),
            f"{stage.kv_bytes / cache:,.4g}",
        )
    return table


def solution_table(policy: Policy, visual_tokens: int) -> Table:
    """The stages of a solved policy."""
    table = Table("from layer", "keep", "visual tokens that run")
    for stage, selected in zip(policy.schedule, policy.selected_counts(visual_tokens), strict=True):
        table.add_row(str(stage.layer), f"{stage.keep:g}", f"{selected:,}")
    return table


def runs_table(runs: Iterable[Run], truth: Box | None, rates: dict[str, tuple[float, float, float]]) -> Table:
    """Table of the demo's runs.

    Args:
        runs: of the demo.
        truth: the box that was asked for, if it is known.
        rates: by the names of runs, the share of boxes found in many scenes and its interval; may be empty.
    """
    table = Table(
        "",
        Column("answer", overflow="fold"),
        *(["IoU"] if truth else []),
        *(["found in\nall scenes"] if rates else []),
        "visual tokens\nper layer",
        "cached tokens\n(all layers)",
        "KV bytes",
        "prefill ms",
    )
    for run in runs:
        cells = [run.name, Text(run.answer)]
        if truth:
            cells.append(f"{run.overlap(truth):.2f}" if run.box else "no box")
        if rates:
            cells.append("{:.1%} [{:.1%}, {:.1%}]".format(*rates[run.name]))
        table.add_row(
            *cells,
            f"{run.average_visual_tokens:.1f}",
            f"{run.cached_tokens:,}",
            f"{run.kv_bytes:,}",
            f"{run.prefill_ms:.1f}",
        )
    return table


def shares_table(shares: Iterable[StageShare]) -> Table:
    """How the demo's tokens were chosen at each decision."""
    table = Table("reroute, from layer", "visual tokens that ran", "deferred", "picked back", "share of those that ran")
    for share in shares:
        table.add_row(
            str(share.layer),
            str(len(share.ran)),
            str(len(share.deferred)),
            str(len(share.returned)),
            f"{len(share.returned) / len(share.ran):.0%}",
        )
    return table


def panes_table(panes: Iterable[Pane]) -> Table:
    """Table of the answers on a page."""
    table = Table(Column("policy", overflow="fold"), "action", Column("answer", overflow="fold"), "box in it")
    for pane in panes:
        box = "-" if pane.box is None else ", ".join(f"{edge:.2f}" for edge in pane.box)
        table.add_row(Text(pane.name), pane.policy.action, Text(pane.answer), box)
    return table


def _scale(value: float, units: tuple[tuple[float, str], ...]) -> tuple[float, str]:
    return next(((size, unit) for size, unit in units if value >= size), (1, ""))
