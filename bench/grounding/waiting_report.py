"""The part of docs/grounding.md on waiting tokens, from waiting.json."""

from __future__ import annotations

from dataclasses import replace

import reroute_kernels as rk
from bench.pages.markdown import table

from .additions_report import points, short, verdict
from .policies import KEEPS
from .scenes import KINDS
from .waiting import METHODS, PAPER, VARIANTS


def waiting_section(results: dict) -> list[str]:
    """The fate of waiting tokens, against the paper's rerouting, with what it costs.

    Args:
        results: the results of `bench.grounding.waiting`.
    """
    runs = {(run["method"], run["waiting"], run["keep"]): run for run in results["runs"]}
    rows = []
    for waiting in VARIANTS:
        for method in METHODS:
            found = [runs[key] for keep in KEEPS if (key := (method, waiting, keep)) in runs]
            if found:
                paper = [runs[method, PAPER, run["keep"]] for run in found]
                flops = _ratio(found, paper, "prefill_flops")
                rows.append([waiting, method, len(found), flops, _ratio(found, paper, "kv_bytes"), *_cells(found)])
    return [
        "## Tokens that wait",
        "",
        "Under the paper's rerouting a deferred token waits as it was. An alignment changes what it is when it comes "
        "back; a frozen token is read meanwhile by text and by the tokens that run, which costs its keys and values in "
        "every layer. So `freeze` is compared twice: with the same tokens at each decision, at more FLOPs, and with "
        "fewer, at the same FLOPs of the prefill; at the smaller budgets, and behind a reducer, freezing alone costs "
        "more than those.",
        "",
        "In a decoder with grouped queries and wide MLPs freezing costs a smaller share than in this one. By `rk.cost` "
        f"`freeze` in place of `reroute`, with the same tokens, multiplies the FLOPs of the prefill {_published()}. "
        "The cache stays as large as without routing.",
        "",
        "The mean difference to the paper's rerouting over the budgets, in points, in how many of them the variant is "
        "better/worse/undecided (95% intervals of paired differences), and the mean ratios of FLOPs of the prefill and "
        "of bytes of the cache. This model was trained with layers left out, so its waiting tokens may be less stale "
        "than those of a pretrained one.",
        "",
        *table(["waiting tokens", "method", "budgets", "FLOPs", "cache", *KINDS], rows),
        "",
    ]


def _published() -> str:
    """How many times as much the prefill of published models costs if tokens are frozen."""
    texts = []
    for model, tier, tokens in (("llava-1.5-7b", 192, 576), ("qwen2.5-vl-7b", 128, 1296)):
        policy = rk.preset(model, "reroute-fastv", tier)
        waits, frozen = (rk.cost(model, replace(policy, action=action), 64, tokens) for action in ("reroute", "freeze"))
        ratio = frozen.prefill_flops / waits.prefill_flops
        texts.append(f"by {ratio:.2f} on {model} (reroute-fastv/{tier}, {tokens:,} visual tokens)")
    return " and ".join(texts)


def _cells(runs: list[dict]) -> list[str]:
    apart = {kind: [run[kind]["less reroute"] for run in runs] for kind in KINDS}
    return [f"{points(apart[kind])} ({short(verdict(apart[kind]))})" for kind in KINDS]


def _ratio(runs: list[dict], paper: list[dict], name: str) -> str:
    ratios = [run[name] / other[name] for run, other in zip(runs, paper, strict=True)]
    return f"{sum(ratios) / len(ratios):.2f}"
