"""docs/methods.md: costs of the published methods, counted."""

from __future__ import annotations

from bench.pages.markdown import table
from reroute_kernels.budget import solve_like
from reroute_kernels.cost import Cost, cost
from reroute_kernels.presets import METHODS, MODELS, ORIGINALS, TIERS, VISUAL_TOKENS, preset, tiers
from reroute_kernels.reduced import IMAGE_METHODS, PERCENTAGES, VIDEO_METHODS

METHOD_TEXT = 64  # text tokens of the prompt that methods are costed for
IMAGE_MODEL, VIDEO_MODEL = MODELS
CLIPS = ((32, 196), (64, 169))
"""Frames and tokens of each: those of LLaVA-OneVision and LLaVA-Video in FlashVID's paper."""


def methods_tables() -> str:
    """Tables of every method's cost at three budgets, and at those published for it alone."""
    lines = [
        f"Of {VISUAL_TOKENS} visual and {METHOD_TEXT} text tokens, as `reroute_kernels.cost` counts. Each cell: visual "
        "tokens per layer on average; prefill FLOPs (with the ranking) and KV cache as shares of the unrouted model's. "
        "\\*: no schedule was published for this budget; this one is solved from the published keep ratios (under Nüwa "
        "with the reducer of its smallest budget). --: cannot be reached with these decision layers (and, under Nüwa, "
        "this reducer), whatever the decisions keep. Empty: not published for this method.",
    ]
    for model in MODELS:
        unrouted = cost(model, None, METHOD_TEXT, VISUAL_TOKENS)
        published = {method: tiers(model, method) for method in (*METHODS, *ORIGINALS)}
        others = sorted({tier for each in published.values() for tier in each} - set(TIERS), reverse=True)
        rows = []
        for method in published:
            if method.endswith("-stagewise"):
                continue
            cells = [methods_cell(model, method, tier, unrouted) for tier in TIERS]
            cells += [
                methods_cell(model, method, tier, unrouted) if tier in published[method] else "" for tier in others
            ]
            rows.append([f"`{method}`", *cells])
        lines += ["", f"**{model}**", "", *table(["method", *(f"tier {tier}" for tier in (*TIERS, *others))], rows)]
    return "\n".join(lines)


def images_table() -> str:
    """Table of the costs of methods that reduce images; in each action all cost the same."""
    unrouted = cost(IMAGE_MODEL, None, METHOD_TEXT, VISUAL_TOKENS)
    plain, divprune = next(iter(IMAGE_METHODS)), "divprune"
    rows = []
    for prefix in ("", "reroute-"):
        names = ", ".join(f"`{prefix}{method}`" for method in IMAGE_METHODS)
        cells = [methods_cell(IMAGE_MODEL, f"{prefix}{plain}", tier, unrouted) for tier in TIERS]
        alone = tiers(IMAGE_MODEL, divprune)[-1]
        rows.append([names, *cells, methods_cell(IMAGE_MODEL, f"{prefix}{divprune}", alone, unrouted)])
    header = ["method", *(f"tier {tier}" for tier in TIERS), f"tier {alone}, DivPrune's own"]
    return "\n".join(
        [
            f"{IMAGE_MODEL}, {VISUAL_TOKENS} visual and {METHOD_TEXT} text tokens; each cell as in the tables above:",
            "",
            *table(header, rows),
        ]
    )


def videos_table() -> str:
    """Table of the costs of methods that reduce videos."""
    rows = []
    for frames, tokens in CLIPS:
        clip = (METHOD_TEXT, frames * tokens)
        unrouted = cost(VIDEO_MODEL, None, *clip)
        for method in (f"{prefix}{method}" for method in VIDEO_METHODS for prefix in ("", "reroute-")):
            cells = []
            for amount in PERCENTAGES:
                counted = cost(VIDEO_MODEL, preset(VIDEO_MODEL, method, amount), *clip, images=frames)
                entering, last = counted.stages[0].visual_tokens, counted.stages[-1].visual_tokens
                share = counted.average_visual_tokens / clip[1]
                flops, cached = (
                    getattr(counted, name) / getattr(unrouted, name) for name in ("prefill_flops", "kv_bytes")
                )
                cells.append(f"{entering:,} to {last:,}; {share:.1%}; {flops:.1%}; {cached:.1%}")
            rows.append([f"{frames} x {tokens}", f"`{method}`", *cells])
    return "\n".join(
        [
            f"{VIDEO_MODEL} and {METHOD_TEXT} text tokens. Each cell: visual tokens that enter the decoder, and that "
            "run in its last layers; visual tokens per layer on average as a share of all; prefill FLOPs and KV cache "
            "as shares of the unrouted model's.",
            "",
            *table(["frames x tokens", "method", *PERCENTAGES], rows),
        ]
    )


def methods_cell(model: str, method: str, tier: int, unrouted: Cost) -> str:
    """Costs of a method at a budget, published or solved."""
    mark = "" if tier in tiers(model, method) else "\\*"
    like = preset(model, method, tier if not mark else tiers(model, method)[-1])
    try:
        policy = solve_like(model, like, avg_tokens=tier) if mark else like
    except ValueError:
        return "--"
    if mark and policy.budget.under > 1:
        return "--"  # even all tokens that the reducer leaves are too few
    counted = cost(model, policy, METHOD_TEXT, VISUAL_TOKENS)
    flops, cached = (getattr(counted, name) / getattr(unrouted, name) for name in ("prefill_flops", "kv_bytes"))
    return f"{counted.average_visual_tokens:.1f}{mark}; {flops:.1%}; {cached:.1%}"
