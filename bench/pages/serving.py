"""Routing inside vLLM, in docs/performance.md: blocks, steps and prefills."""

from __future__ import annotations

from textwrap import wrap

from bench.pages.markdown import table


def serving_section(record: dict) -> list[str]:
    """Tables of routing inside vLLM's engine."""
    rows = []
    for way, found in record["ways"].items():
        one, everything, prefill = found["one_prompt"], found["all"], found["prefill_ms"]
        rows.append(
            [
                way,
                one["layer_blocks"],
                one["layer_blocks_by_the_schedule"],
                everything["steps"],
                f"{prefill['median']:.1f} ({prefill['p20']:.1f} to {prefill['p80']:.1f})",
            ]
        )
    (tokens,) = {found["one_prompt"]["prompt_tokens"] for found in record["ways"].values()}
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    header = ["engine", "blocks of one prompt", "by the schedule", "steps for all", "prefill, ms (p20 to p80)"]
    text = (
        f"Measured by `{record['command']}` on a CPU ({record['cpu']}, {record['threads']} thread(s), {versions}), "
        f"with the tiny grounding model (16 layers, 144 visual tokens), deferring by `{record['policy']}`; the record "
        "is `bench/results/cpu/serving.json`. Blocks and steps are counted by vLLM's engine. Blocks are those of one "
        f"layer ({record['block_size']} tokens): what the engine takes for a prompt of {tokens} tokens, and what the "
        f"schedule's own arithmetic asks for. Steps: until {record['requests']} requests of {record['new_tokens']} new "
        f"tokens each, all there at once, are answered with a cache of {record['cache_bytes'] >> 20} MiB. A prefill is "
        "of one request, with its vision tower, one engine after the other, in a model too small for its time to say "
        "anything about a real one. No GPU has run this."
    )
    return ["## Inside vLLM, on a CPU", "", *wrap(text, 120, break_on_hyphens=False), "", *table(header, rows), ""]
