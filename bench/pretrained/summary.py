"""Scores, paired differences and resemblance, from the rows of a measurement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

import reroute_kernels as rk
from bench.grounding.metrics import Interval, interval

from .passages import KINDS, TOKENS
from .runs import PAPER, QUESTION_TOKENS, UNROUTED, Run

MEASURES = ("choice", "exact", "same", "divergence")
DECIDING = ("choice", "divergence")
"""The measures that decide a comparison."""


def other_of(run: Run) -> Run | None:
    """The run that a run is compared with: rerouting with removing, an addition with rerouting; None for others."""
    if run.way in ("-", "remove"):
        return None
    return run._replace(way="remove" if run.way == PAPER else PAPER)


def values_of(rows: Mapping[str, Mapping[str, Any]], runs: Sequence[Run]) -> dict[Run, dict[str, dict[str, list]]]:
    """By run, measure and kind the values of all items of the batches that every run has answered.

    Args:
        rows: by key, as `measure.Rows` keeps them: `"KIND FIRST RUN"`.
        runs: the runs that are compared.

    Raises:
        ValueError: no batch was answered under all runs.
    """
    begun = [key.removesuffix(f" {UNROUTED.name}") for key in rows if key.endswith(f" {UNROUTED.name}")]
    whole = [batch for batch in begun if all(f"{batch} {run.name}" in rows for run in runs)]
    if not whole:
        raise ValueError(f"rows must hold a batch that all {len(runs)} runs have answered, got {len(rows)} rows")
    found: dict[Run, dict[str, dict[str, list]]] = {}
    for run in runs:
        found[run] = {measure: {kind: [] for kind in KINDS} for measure in MEASURES}
        for batch in whole:
            row = rows[f"{batch} {run.name}"]
            for measure in MEASURES:
                found[run][measure][row["kind"]] += row[measure]
    return found


def pooled(by_kind: Mapping[str, Sequence[float]]) -> np.ndarray:
    """Values of all kinds, one kind after the other."""
    return np.concatenate([np.asarray(by_kind[kind], dtype=np.float64) for kind in KINDS])


def apart(mine: Mapping[str, Sequence[float]], other: Mapping[str, Sequence[float]]) -> Interval:
    """The paired difference of two runs over all kinds together."""
    return interval(pooled(mine) - pooled(other))


def _kinds(by_kind: Mapping[str, Sequence[float]]) -> dict[str, Interval]:
    return {kind: interval(values) for kind, values in by_kind.items() if values}


def summarize(
    rows: Mapping[str, Mapping[str, Any]], policies: Mapping[Run, rk.Policy | None], config: object
) -> dict[str, Any]:
    """The figures of docs/pretrained.md, as JSON has them.

    Args:
        rows: as in `values_of`, and those of the resemblance.
        policies: by run.
        config: of the model, to be costed.
    """
    values = values_of(rows, list(policies))
    runs = []
    for run, policy in policies.items():
        cost = rk.cost(config, policy, QUESTION_TOKENS, TOKENS)
        told = run._asdict() | {
            "policy": None if policy is None else repr(policy),
            "average_visual_tokens": cost.average_visual_tokens,
            "prefill_flops": cost.prefill_flops,
            "kv_bytes": cost.kv_bytes,
            **{measure: interval(pooled(values[run][measure])) for measure in MEASURES},
            "kinds": {measure: _kinds(values[run][measure]) for measure in MEASURES},
        }
        other = other_of(run)
        if other is not None:
            told["less"] = other.way
            told["differences"] = {measure: apart(values[run][measure], values[other][measure]) for measure in MEASURES}
        runs.append(told)
    return {
        "items": {kind: len(values[UNROUTED]["choice"][kind]) for kind in KINDS},
        "runs": runs,
    }


def resemblance(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Ranks and coverage by layer for each kind, and the measures without single layers."""
    places = [row for key, row in rows.items() if key.endswith(" places")]
    found: dict[str, Any] = {
        name: {
            kind: [interval(of_layer) for of_layer in np.concatenate(of_kind).T]
            for kind in KINDS
            if (of_kind := [np.asarray(row[name], dtype=np.float64) for row in places if row["kind"] == kind])
        }
        for name in ("rank", "coverage")
    }
    found["without layers"] = _without_layers([row for row in rows.values() if "without" in row])
    return found


def _without_layers(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The measures without each layer, over the kinds that were asked without all of them."""
    layers = sorted({row["without"] for row in rows})
    whole = [kind for kind in KINDS if {row["without"] for row in rows if row["kind"] == kind} == set(layers)]
    told, items = {}, 0
    for layer in layers if whole else ():
        of_layer = [row for row in rows if row["without"] == layer and row["kind"] in whole]
        values = {measure: [each for row in of_layer for each in row[measure]] for measure in MEASURES}
        told[str(layer)] = {measure: interval(values[measure]) for measure in MEASURES}
        items = len(values["choice"])
    return {"kinds": whole, "items": items, "layers": told}
