"""The tables that the command line prints."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING

from rich.table import Column, Table
from rich.text import Text

from ..cost import BINARY, DECIMAL, Cost, StageCost, unit_of
from ..notation import is_plain, policy_text
from ..policy import LAST_QUERY, Policy
from ..presets import Preset
from ..roofline import decode_seconds, prefill_seconds
from .output import next_token_flops, rule_text

if TYPE_CHECKING:
    from ..boxes import Box
    from ..calibration import Calibration
    from ..intervals import Interval
    from ..loyalty import Loyalty, PolicyLoyalty
    from .demo import Run, StageShare
    from .view import Pane


def presets_table(listed: Iterable[tuple[Preset, Policy, float]]) -> Table:
    """Configurations, their schedules as the command line takes them, and the visual tokens that they average."""
    table = Table(
        Column("preset", no_wrap=True), Column("schedule", overflow="fold"), Column("average\nof 576", justify="right")
    )
    for name, policy, average in listed:
        table.add_row(str(name), policy_text(policy), f"{average:.1f}")
    return table


def rules_table(listed: Iterable[tuple[Preset, Policy, float]]) -> Table:
    """Rankings, positions and reducers of configurations that are not the default."""
    rules = Column("ranking, positions, reducer and recycling that are not the default", overflow="fold")
    table = Table(Column("preset", overflow="fold"), rules)
    for name, policy, _ in listed:
        if not is_plain(policy):
            rules = [rule_text(policy.ranking)] if policy.ranking != LAST_QUERY else []
            rules += [
                f"{rule_text(each.ranking)} at layer {each.layer}"
                for each in policy.schedule
                if each.ranking is not None
            ]
            rules += [f"{policy.positions} positions"] if policy.positions != "original" else []
            rules += [rule_text(policy.reducer)] if policy.reducer is not None else []
            rules += [f"recycles {policy.recycle:g} of what is removed"] if policy.recycle else []
            table.add_row(str(name), ", ".join(rules))
    return table


def costs_tables(
    costed: Sequence[tuple[str, Policy | None, Cost]], gpu: str | None = None, width: int = 80
) -> list[Table]:
    """Tables of the costs of policies: figures down, policies across, as many as fit into the width.

    Percentages are relative to the first policy; for rankings, to the first policy's prefill.

    Args:
        costed: names, policies and their costs.
        gpu: for estimates of time by the roofline model, or None.
        width: of the terminal.
    """
    base = costed[0][2]
    prefill, prefill_unit = unit_of(base.prefill_flops, DECIMAL)
    decode, decode_unit = unit_of(next_token_flops(base), DECIMAL)
    cache, cache_unit = unit_of(base.kv_bytes, BINARY)
    figures: list[tuple[str, Callable[[Cost], float], float]] = [
        ("visual tokens per layer", attrgetter("average_visual_tokens"), 1),
        (f"prefill, {prefill_unit}FLOPs", attrgetter("prefill_flops"), prefill),
        *((f"  {part}", attrgetter(part), prefill) for part in ("projections", "attention", "mlp", "ranking")),
        (f"decode step, {decode_unit}FLOPs", next_token_flops, decode),
        (f"KV cache, {cache_unit}B", attrgetter("kv_bytes"), cache),
    ]
    if gpu is not None:
        for name, seconds in (("prefill", prefill_seconds), ("decode step", decode_seconds)):
            figures.append((f"{name} on {gpu}, ms, estimate", partial(seconds, gpu=gpu), 1e-3))
    labels = max(len(label) for label, *_ in figures)
    first, *others = costed
    beside = max(1, (width - labels - 4 - _POLICY_WIDTH) // _POLICY_WIDTH)
    groups = [others[start : start + beside] for start in range(0, len(others), beside)] or [[]]
    return [_costs_table([first, *group], figures, base) for group in groups]


_POLICY_WIDTH = 17


def _costs_table(shown: Sequence[tuple[str, Policy | None, Cost]], figures: Sequence[tuple], base: Cost) -> Table:
    headers = [Column(Text(name), justify="right", overflow="fold", max_width=_POLICY_WIDTH - 3) for name, *_ in shown]
    table = Table(Column("", no_wrap=True), *headers)
    for label, figure, scale in figures:
        cells = []
        for _, _, cost in shown:
            whole = figure(base) or base.prefill_flops
            share = "" if cost is base else f"\n{figure(cost) / whole:.1%}"
            cells.append(f"{figure(cost) / scale:,.4g}{share}")
        table.add_row(label, *cells)
    return table


def stages_tables(cost: Cost, width: int = 80) -> list[Table]:
    """Tables of one policy's cost: figures down, stages across, as many as fit into the width."""
    prefill, unit = unit_of(cost.prefill_flops, DECIMAL)
    cache, cache_unit = unit_of(cost.kv_bytes, BINARY)
    figures: list[tuple[str, Callable[[StageCost], str]]] = [
        ("visual tokens", lambda stage: f"{stage.visual_tokens:,}"),
        ("with text", lambda stage: f"{stage.tokens:,}"),
        *([("frozen", lambda stage: f"{stage.frozen:,}")] if any(stage.frozen for stage in cost.stages) else []),
        (f"prefill, {unit}FLOPs", lambda stage: f"{stage.flops / prefill:,.4g}"),
        *(
            (f"  {part}", lambda stage, part=part: f"{getattr(stage, part) / prefill:,.4g}")
            for part in ("projections", "attention", "mlp", "ranking")
        ),
        (f"KV cache, {cache_unit}B", lambda stage: f"{stage.kv_bytes / cache:,.4g}"),
    ]
    beside = max(1, (width - max(len(label) for label, _ in figures) - 4) // _STAGE_WIDTH)
    tables = []
    for start in range(0, len(cost.stages), beside):
        stages = cost.stages[start : start + beside]
        headers = [f"layers\n{stage.first_layer} to {stage.first_layer + stage.layers - 1}" for stage in stages]
        table = Table(Column("", no_wrap=True), *(Column(header, justify="right", no_wrap=True) for header in headers))
        for label, figure in figures:
            table.add_row(label, *map(figure, stages))
        tables.append(table)
    return tables


_STAGE_WIDTH = 11


def solution_table(policy: Policy, visual_tokens: int) -> Table:
    """The stages of a solved policy."""
    table = Table("from layer", "keep", "visual tokens that run")
    for stage, selected in zip(policy.schedule, policy.selected_counts(visual_tokens), strict=True):
        table.add_row(str(stage.layer), f"{stage.keep:g}", f"{selected:,}")
    return table


def qualities_table(calibration: Calibration, policy: Policy | None = None) -> Table:
    """Qualities of the layers that may decide, the decision layers of a policy among them marked."""
    chosen = {stage.layer for stage in policy.schedule} if policy is not None else set()
    best = max(each.mean for each in calibration.qualities)
    table = Table(Column("layer", justify="right"), "quality", "95% interval", Column("", no_wrap=True), "decides")
    for each in calibration.qualities:
        bar = "█" * round(_BAR_WIDTH * each.mean / best) if best else ""
        interval = Text(f"[{each.low:.4g}, {each.high:.4g}]")
        decides = "yes" if each.layer in chosen else ""
        table.add_row(str(each.layer), f"{each.mean:.4g}", interval, bar, decides)
    return table


_BAR_WIDTH = 20


def loyalty_table(found: Loyalty) -> Table:
    """Agreement of a model with itself under each policy, and what the policy costs."""
    table = Table(
        Column("policy", overflow="fold"),
        Column("visual tokens\nper layer", justify="right"),
        Column("prefill\nFLOPs", justify="right"),
        Column("KV\nbytes", justify="right"),
        Column("divergence of the\nnext token, nats"),
        Column("same next\ntoken"),
        Column("same greedy\nanswer"),
    )
    for each in found.policies:
        table.add_row(
            Text(each.name),
            f"{each.average_visual_tokens:,.1f}",
            *_shares(each, found),
            Text(_interval_text(each.intervals["divergence"], ".3f")),
            *(Text(_interval_text(each.intervals[name], ".0%")) for name in ("same_token", "same_answer")),
        )
    return table


def _shares(each: PolicyLoyalty, found: Loyalty) -> tuple[str, str]:
    """FLOPs and bytes relative to the unrouted model, where they can be counted."""
    if each.cost is None or found.unrouted is None:
        return "-", "-"
    flops = each.cost.prefill_flops / found.unrouted.prefill_flops
    return f"{flops:.0%}", f"{each.cost.kv_bytes / found.unrouted.kv_bytes:.0%}"


def _interval_text(value: Interval, form: str) -> str:
    return f"{value.mean:{form}} [{value.low:{form}}, {value.high:{form}}]"


def runs_table(
    runs: Iterable[Run], truth: Box | None, rates: dict[str, tuple[float, float, float]], *, times: bool
) -> Table:
    """Table of the demo's runs.

    Args:
        runs: of the demo.
        truth: the box that was asked for, if it is known.
        rates: by the names of runs, the share of boxes found in many scenes and its interval; may be empty.
        times: whether to show the times of the prefills.
    """
    table = Table(
        "",
        Column("answer", overflow="fold"),
        *(["IoU"] if truth else []),
        *(["found in\nall scenes"] if rates else []),
        "visual tokens\nper layer",
        "cached tokens\n(all layers)",
        "KV bytes",
        *(["prefill ms"] if times else []),
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
            *([f"{run.prefill_ms:.1f}"] if times else []),
        )
    return table


def shares_table(shares: Sequence[StageShare]) -> Table:
    """How the demo's tokens were chosen at each decision."""
    action, waiting = ("freeze", "frozen") if any(share.freezes for share in shares) else ("reroute", "deferred")
    table = Table(f"{action}, from layer", "visual tokens that ran", waiting, "picked back", "share of those that ran")
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
