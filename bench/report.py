"""Write every table of figures: `python -m bench.report`.

README.md has a summary of each. docs/kernels.md has what compilers made of the kernels (bench/results/compile),
docs/refusals.md what is not routed (models/refusals.py), docs/models.md what tests found models to do
(bench/results/models), docs/methods.md what the published methods cost, counted, docs/performance.md the figures of
every GPU that has results and of a CPU, and docs/grounding.md what routing does to answers (bench/results/grounding).
"""

from __future__ import annotations

import json
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from textwrap import wrap

from bench.grounding.report import grounding_page, model_card, summary_table
from bench.markdown import table
from reroute_kernels.budget import solve_like
from reroute_kernels.cost import Cost, cost
from reroute_kernels.models import refusals
from reroute_kernels.presets import METHODS, MODELS, ORIGINALS, TIERS, VISUAL_TOKENS, preset, tiers

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
SERVING = RESULTS / "cpu" / "serving.json"
DECODERS = ("llava", "qwen2_5_vl")
NAMES = (
    *(f"{kind}-{name}" for kind in ("prefill", "decision") for name in DECODERS),
    "decode-llava",
    *("floors", "operations", "copies", "eager", "tests", "sanitizer"),
    *(f"prefill-more-{name}" for name in DECODERS),
)
"""The sections of the GPU report, those first that matter most."""
METHOD_TEXT = 64  # text tokens of the prompt that methods are costed for
SIGNS = {"works": "works", "refused": "refused", "not offered": "--"}


def main() -> None:
    replace_between(ROOT / "README.md", "gpus", gpu_summary(gpu_folders()))
    compiled = [_read(path) for path in sorted((RESULTS / "compile").glob("triton-*.json"))]
    replace_between(ROOT / "docs" / "kernels.md", "compiled", compile_tables(compiled))
    supported = [_read(path) for path in (RESULTS / "models").glob("transformers-*.json")]
    replace_between(ROOT / "docs" / "models.md", "support", support_tables(supported))
    replace_between(ROOT / "docs" / "methods.md", "methods", methods_tables())
    replace_between(ROOT / "docs" / "refusals.md", "refusals", refusals_list())
    performance_page(gpu_folders(), ROOT / "docs")
    grounded, model = _read(RESULTS / "grounding" / "results.json"), ROOT / "models" / "tiny_grounding"
    grounding_page(grounded, ROOT / "docs")
    replace_between(ROOT / "README.md", "grounding", summary_table(grounded))
    log = [json.loads(line) for line in (model / "training.jsonl").read_text().splitlines()]
    (model / "README.md").write_text(model_card(grounded, log))


def refusals_list() -> str:
    """Everything that is refused, and what cannot be noticed, from the tables of models/refusals.py."""
    lines = []
    for title, rules in refusals.PAGE.items():
        lines += [f"## {title}", ""]
        lines += [f"- {rule.summary}: `{rule.error.__name__}`" for rule in rules] + [""]
    lines += ["## Not noticed", "", "Nothing in the call tells these, so that they are not refused:", ""]
    return "\n".join(lines + [f"- {limit}" for limit in refusals.SILENT])


def gpu_folders() -> list[Path]:
    """Folders of devices on which `make gpu-report` ran."""
    return sorted(path.parent for path in RESULTS.glob("*/floors.json"))


def _read(path: Path) -> dict:
    return json.loads(path.read_text())


def replace_between(path: Path, name: str, content: str) -> None:
    """Put generated text between a file's markers."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, found, rest = path.read_text().partition(begin)
    _, found_end, after = rest.partition(end)
    if not found or not found_end:
        raise ValueError(f"{path} must hold {begin} and {end}")
    path.write_text(f"{before}{begin}\n{content}\n{end}{after}")


def gpu_summary(folders: list[Path]) -> str:
    """A sentence about every GPU: what a decision takes there."""
    sentences = []
    for folder in folders:
        against = _read(folder / "eager.json") if (folder / "eager.json").exists() else {"result": None}
        found = [
            f"{row['fused_in_graph']['median']:.1f} us for {row['shape']} with {row['length']:,} tokens"
            + (f" ({row['eager']['median']:,.0f} us by eager code)" if row["eager"] else "")
            for row in against["result"] or ()
        ]
        if found:
            sentences.append(
                f"On an {against['device']} a decision of one sample takes, in a CUDA graph and beyond the key "
                f"projection, {', '.join(found)}; the record is `bench/results/{folder.name}/eager.json`. Eager code "
                "cannot be captured in a graph."
            )
    return "\n".join(wrap(" ".join(sentences), 120, break_on_hyphens=False))


def cpu_section(results: dict) -> list[str]:
    """Tables of the microbenchmarks on a CPU, and what they compare."""
    return [
        "## A CPU",
        "",
        "Plain `pytest` runs no benchmark, `pytest --benchmark` runs them all. The prefill is that of a decoder",
        "with random weights. The oracle is its lower bound: the same layers on the selected tokens only, with",
        "every index known in advance, and the one key projection of all tokens that each decision needs. Eager is",
        "the usual way to write each operation, with whole attention matrices, masks and `nonzero`. On a CPU the",
        "PyTorch reference runs, which is written to be read, so single operations can be slower than eager; the",
        "ranking and the whole prefill are what gets faster. What the hooks cost in Python is measured on 32 layers",
        "too small to count. The towers that stage 1 of Nüwa is set beside have random weights too.",
        "",
        cpu_tables(results),
    ]


def cpu_tables(results: dict) -> str:
    machine, entries = results["machine_info"], results["benchmarks"]
    prefills = [entry["extra_info"] for entry in entries if entry["group"] == "prefill"]
    lines = [
        f"Measured by `make bench` on {machine['gpu'] or 'a CPU'} ({machine['cpu']}, {machine['torch_threads']} "
        f"threads, torch {machine['torch']}, transformers {machine['transformers']}); the record is "
        "`bench/results/cpu/benchmarks.json`. Medians, in milliseconds.",
        "",
        *table(
            [
                "prefill, 16 layers, d = 512, keep 8.35% at layers 3, 7, 11, 14",
                "unrouted",
                "routed",
                "oracle",
                "unrouted / routed",
                "routed / oracle",
            ],
            (
                [
                    f"{prefill['visual_tokens']:,} visual tokens",
                    *(f"{prefill['milliseconds'][name]['median']:.0f}" for name in ("unrouted", "routed", "oracle")),
                    f"{prefill['unrouted_over_routed']:.2f}",
                    f"{prefill['routed_over_oracle']:.3f}",
                ]
                for prefill in prefills
            ),
        ),
        "",
    ]
    operations = [entry for entry in entries if "operation" in entry["extra_info"]]
    backends = list(dict.fromkeys(entry["extra_info"]["backend"] for entry in operations))
    rows: dict[tuple[str, str], dict[str, float]] = {}
    for entry in operations:
        info = entry["extra_info"]
        rows.setdefault((info["operation"], info["shape"]), {})[info["backend"]] = entry["stats"]["median"] * 1e3
    lines += table(
        ["operation", "shape", *backends],
        (
            [f"`{operation}`", shape, *(f"{medians[name]:.3f}" if name in medians else "" for name in backends)]
            for (operation, shape), medians in rows.items()
        ),
    )
    return "\n".join([*lines, *hooks_table(entries), *reducers_table(entries)])


def hooks_table(entries: list[dict]) -> list[str]:
    """Table of the time that hooks add to a forward; empty if it was not measured."""
    infos = [entry["extra_info"] for entry in entries if entry["group"] == "hooks"]
    calls = {info["call"]: info for info in infos if "call" in info}
    rows = []
    for call, info in calls.items():
        times, added = info["microseconds"], info["added_microseconds"]["routed"]
        rows.append([call, *(f"{value:,.0f}" for value in (times["unrouted"], times["routed"], added))])
        if "microseconds_of_a_decision" in info:
            rows.append(["of it, one decision", "", "", f"{info['microseconds_of_a_decision']:,.0f}"])
    if not rows:
        return []
    layers = next(iter(calls.values()))["layers"]
    return ["", *table([f"hooks on {layers} layers of width 32, microseconds", "unrouted", "routed", "added"], rows)]


def reducers_table(entries: list[dict]) -> list[str]:
    """Table of a reducer's cost beside the vision tower; empty if it was not measured."""
    infos = [entry["extra_info"] for entry in entries if entry["group"] == "reducers"]
    rows = (
        [
            info["description"],
            f"{info['tower_milliseconds']['median']:,.0f} ({info['measured']})",
            f"{info['stage_1_milliseconds']['median']:,.1f}",
            f"{info['stage_1_over_tower']:.1%}",
        ]
        for info in infos
    )
    header = ["one image through a vision tower", "tower, milliseconds", "stage 1 of Nüwa", "stage 1 / tower"]
    return ["", *table(header, rows)] if infos else []


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


def methods_cell(model: str, method: str, tier: int, unrouted: Cost) -> str:
    """Costs of a method at a budget, published or solved."""
    mark = "" if tier in tiers(model, method) else "\\*"
    like = preset(model, method, tier if not mark else tiers(model, method)[-1])
    try:
        policy = solve_like(model, like, avg_tokens=tier) if mark else like
    except ValueError:
        return "--"
    if mark and policy.budget.under > 1:
        return "--"  # all that the reducer leaves is less
    counted = cost(model, policy, METHOD_TEXT, VISUAL_TOKENS)
    flops, cached = (getattr(counted, name) / getattr(unrouted, name) for name in ("prefill_flops", "kv_bytes"))
    return f"{counted.average_visual_tokens:.1f}{mark}; {flops:.1%}; {cached:.1%}"


# docs/performance.md


def support_tables(records: list[dict]) -> str:
    """A table of models and ways of calling, with a note for every cell that is not the same everywhere or refused."""
    records = sorted(records, key=lambda record: [int(part) for part in record["versions"]["transformers"].split(".")])
    newest, versions = records[-1], [record["versions"]["transformers"] for record in records]
    models, ways = list(newest["cells"]), newest["ways"]
    notes: list[str] = []

    def cell(model: str, way: str) -> str:
        outcomes = [record["cells"][model][way] for record in records]
        marks = []
        for outcome in dict.fromkeys(reversed(outcomes)):
            word, _, reason = outcome.partition(": ")
            reason, *_ = reason.split(". ")  # where transformers goes on to what one could do instead
            if reason and reason not in notes:
                notes.append(reason)
            note = f" [{notes.index(reason) + 1}]" if reason else ""
            same = [each == outcome for each in outcomes]
            where = "" if all(same) else f" ({runs_of(versions, same)})"
            marks.append(f"{SIGNS[word]}{note}{where}")
        return "<br>".join(marks)

    software = {name: version for name, version in newest["versions"].items() if name != "transformers"}
    lines = [
        f"Written by `make test-matrix` from the tests that ran under transformers {', '.join(versions)} "
        f"({', '.join(f'{name} {version}' for name, version in software.items())}).",
        "",
        *table(["way of calling", *models], ([f"**{way}**", *(cell(model, way) for model in models)] for way in ways)),
        "",
        "Notes:",
        "",
        *(f"{number}. {_escaped(note)}" for number, note in enumerate(notes, start=1)),
        "",
        "What each row calls:",
        "",
        *table(["way of calling", "call"], ways.items()),
    ]
    return "\n".join(lines)


def runs_of(versions: list[str], chosen: list[bool]) -> str:
    """The chosen ones of versions in order: those that follow on each other as first and last."""
    runs = []
    for is_chosen, run in groupby(zip(chosen, versions, strict=True), key=itemgetter(0)):
        if is_chosen:
            names = [version for _, version in run]
            runs.append(names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}")
    return ", ".join(runs)


def _escaped(note: str) -> str:
    return note.replace("|", "\\|").replace("<", "&lt;").replace("_", "\\_")


def performance_page(folders: list[Path], target: Path) -> None:
    """Write performance.md, and a plot of each device's prefills beside it where matplotlib is installed."""
    lines = [
        "# Performance",
        "",
        "Written by `python -m bench.report` from the records in `bench/results/`; no figure here is typed by hand.",
        "What runs in a decision: [kernels.md](kernels.md).",
        "",
    ]
    if not folders:
        lines += [
            "**No GPU has been measured yet.** The kernels are checked in Triton's interpreter and by compilation for",
            "sm_80, sm_90, sm_100 and gfx942; none of their speed is known, and no target of the project",
            "has been shown on a device. `make gpu-report` measures a GPU and fills this page.",
            "",
        ]
    for folder in folders:
        lines += device_section(folder, target)
    lines += serving_section(_read(SERVING))
    lines += ["", *cpu_section(_read(RESULTS / "cpu" / "benchmarks.json"))]
    target.mkdir(parents=True, exist_ok=True)
    (target / "performance.md").write_text("\n".join(lines).rstrip() + "\n")


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


def device_section(folder: Path, target: Path) -> list[str]:
    """Tables of one device's records."""
    records = {name: _read(folder / f"{name}.json") for name in NAMES if (folder / f"{name}.json").exists()}
    about = next(iter(records.values()))
    title = about["device"] + (" (dry run: the times mean nothing)" if about["dry_run"] else "")
    lines = [f"## {title}", ""]
    details = (
        f"{name} {about[name]}" for name in ("driver", "cuda", "torch", "triton", "transformers") if about.get(name)
    )
    lines += [", ".join(details) + ".", ""]
    lines += [f"- `{name}` failed: {record['error']}" for name, record in records.items() if record.get("error")]
    results = {name: record["result"] for name, record in records.items() if record["result"] is not None}
    if missing := [name for name in NAMES if name not in records]:
        lines.append(f"- not measured: {', '.join(f'`{name}`' for name in missing)}")
    if tests := results.get("tests"):
        lines.append("- tests: " + ", ".join(f"{count} {name}" for name, count in tests.items()))
    lines += [f"- {name}: {found}" for name, found in results.get("sanitizer", {}).items()]
    if floors := results.get("floors"):
        lines += [
            f"- floors: {floors['empty_launch_in_graph_us']:.2f} us an empty launch in a graph, "
            f"{floors['empty_launch_us']:.2f} us outside; {floors['copy_gb_per_s']:,.0f} GB/s a copy",
        ]
    lines.append("")
    for name in DECODERS:
        if rows := [row for kind in ("prefill", "prefill-more") for row in results.get(f"{kind}-{name}", [])]:
            lines += prefill_section(rows, folder.name, target)
    for name in DECODERS:
        if rows := results.get(f"decision-{name}"):
            lines += decision_section(rows)
    if decode := results.get("decode-llava"):
        lines += decode_section(decode)
    lines += [*targets(results), ""]
    lines += operations_section(results)
    return lines


def operations_section(results: dict) -> list[str]:
    """Tables of single operations."""
    lines: list[str] = []
    if operations := results.get("operations"):
        lines += [
            "### Operations",
            "",
            "Medians in us; the floor is bytes over copy bandwidth or launches, in a graph.",
            "",
        ]
        lines += table(
            ["operation", "shape", "L", "B", "launches", "eager", "graph", "GB/s", "over floor"],
            (
                [
                    f"`{row['operation']}`",
                    row["shape"],
                    row["length"],
                    row["batch"],
                    row["launches"],
                    f"{row['eager']['median']:.1f}",
                    f"{row['graph']['median']:.1f}",
                    f"{row['graph']['gb_per_s']:,.0f}",
                    f"{row['graph']['over_floor']:.1f}",
                ]
                for row in operations
            ),
        )
        lines.append("")
    if against := results.get("eager"):
        lines += [
            "### Against the usual eager code",
            "",
            "One sample; medians in us. The eager code cannot be captured.",
            "",
        ]
        lines += table(
            ["shape", "L", "eager", "fused", "fused in a graph", "eager / fused", "eager / fused in a graph"],
            (
                [
                    row["shape"],
                    row["length"],
                    f"{row['eager']['median']:,.0f}" if row["eager"] else "out of memory",
                    f"{row['fused']['median']:,.0f}",
                    f"{row['fused_in_graph']['median']:,.0f}",
                    *(
                        f"{row[f'eager_over_{name}']:.1f}" if row["eager"] else ""
                        for name in ("fused", "fused_in_graph")
                    ),
                ]
                for row in against
            ),
        )
        lines.append("")
    return lines


def targets(results: dict) -> list[str]:
    """Table of the targets, and of the figures that this device reached."""
    rows = []
    for row in results.get("operations", []):
        if (row["operation"], row["shape"], row["batch"]) == ("decision", "LLaVA-1.5-7B", 1):
            rows.append(["a decision in a graph, LLaVA-1.5-7B, us", "at most 15", row["graph"]["median"]])
    floors = results.get("floors")
    for row in results.get("copies", []) if floors else []:
        share = row["gb_per_s"] / floors["copy_gb_per_s"]
        rows.append([f"`{row['operation']}`, share of copy bandwidth", "at least 0.85", share])
    for row in results.get("eager", []):
        if row["eager"]:
            what = f"eager / fused in a graph, {row['shape']}, L = {row['length']}"
            rows.append([what, "at least 20", row["eager_over_fused_in_graph"]])
    rows += [row for name in DECODERS for row in prefill_targets(results, name)]
    if not rows:
        return []
    return ["### Targets", "", *table(["what", "target", "measured", ""], (_judged(*row) for row in rows))]


def prefill_targets(results: dict, name: str) -> list[list]:
    """Rows of the targets of a decoder's prefills."""
    rows: list[list] = []
    for row in (row for kind in ("prefill", "prefill-more") for row in results.get(f"{kind}-{name}", [])):
        case = f"{row['decoder']}, {row['tokens']:,} tokens, B = {row['batch']}, tier {row['tier']}"
        rows.append([f"reroute / oracle in a graph, {case}", "at most 1.03", row["reroute_over_oracle"]])
        if (row["batch"], row["tier"], row["decoder"]) == (1, 192, "LLaVA-1.5-7B"):
            rows.append([f"unrouted / reroute in a graph, {case}", "at least 1.9", row["unrouted_over_reroute"]])
        if row["batch"] == 8 and row["tier"] == 64:
            share = row["share_of_flops_speed_up"]
            rows.append([f"share of the speed-up that FLOPs predict, {case}", "at least 0.9", share])
    return rows


def _judged(what: str, target: str, measured: float) -> list[str]:
    limit = float(target.split()[-1])
    met = measured <= limit if target.startswith("at most") else measured >= limit
    return [what, target, f"{measured:.4g}", "met" if met else "**missed**"]


def prefill_section(rows: list[dict], device: str, target: Path) -> list[str]:
    decoder = rows[0]["decoder"]
    lines = [f"### Prefill, {decoder}", ""]
    text = (
        "Medians in ms, of a decoder with random weights. In a CUDA graph: the layers alone, every count known before; "
        "the oracle knows the indices of the tokens that run, too. Eager: the whole model through `rk.apply`; host: "
        "until the call returns."
    )
    lines += [*wrap(text, 120, break_on_hyphens=False), ""]
    graph, eager = ("unrouted", "remove", "reroute", "oracle"), ("unrouted", "reroute")
    header = ["tokens", "B", "tier", *(f"graph: {name}" for name in graph), "unrouted / reroute", "reroute / oracle"]
    header += [*(f"eager: {name}" for name in eager), *(f"host: {name}" for name in eager), "peak, MiB", "reroute"]
    cells = []
    for row in rows:
        ratios = (f"{row[name]:.3f}" for name in ("unrouted_over_reroute", "reroute_over_oracle"))
        cells.append([f"{row['tokens']:,}", row["batch"], row["tier"]])
        cells[-1] += [*(f"{row['graph'][name]['median']:.2f}" for name in graph), *ratios]
        # A run that was cut off may have known the graphs only.
        cells[-1] += [f"{row['eager'][name]['median']:.2f}" if "eager" in row else "" for name in eager]
        cells[-1] += [f"{row['host_ms'][name]:.2f}" if "host_ms" in row else "" for name in eager]
        peaks = row.get("peak_bytes") or {}
        cells[-1] += [f"{peaks[name] / 2**20:,.0f}" if peaks.get(name) else "" for name in eager]
    lines += table(header, cells)
    if image := plot(rows, device, target):
        lines += ["", f"![Prefill of {decoder}]({image})"]
    return [*lines, ""]


def decision_section(rows: list[dict]) -> list[str]:
    """Table of the parts of a decision."""
    parts = list(rows[0]["microseconds"])
    lines = [f"### A whole decision, {rows[0]['decoder']}", "", "Medians in us, each part alone in a CUDA graph.", ""]
    cells = (
        [
            f"{row['visual_tokens']:,}",
            row["batch"],
            row["tier"],
            *(f"{row['microseconds'][part]['median']:.1f}" for part in parts),
        ]
        for row in rows
    )
    return [*lines, *table(["visual tokens", "B", "tier", *parts], cells), ""]


def decode_section(decode: dict) -> list[str]:
    """Table of a decode step."""
    lines = [f"### A decode step, {decode['decoder']}, {decode['visual_tokens']:,} visual tokens", ""]
    text = (
        f"{decode['batch']} samples, tier {decode['tier']}, in a CUDA graph, on caches of a fixed size in each layer: "
        f"unrouted / reroute = {decode['unrouted_over_reroute']:.2f}."
    )
    cells = (
        [name, f"{timing['median']:.2f}", f"{decode['cache_bytes'][name] / 2**20:,.0f}"]
        for name, timing in decode["milliseconds"].items()
    )
    return [*lines, text, "", *table(["", "ms a token", "cache, MiB"], cells), ""]


def plot(rows: list[dict], device: str, target: Path) -> str | None:
    """Draw a decoder's prefills; returns the name of the file, or None where there is none and nothing to draw it."""
    file = f"prefill-{rows[0]['decoder'].lower().replace(' ', '-')}-{device}.svg"
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return file if (target / file).exists() else None
    names = ("unrouted", "remove", "reroute", "oracle")
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    batches = sorted({row["batch"] for row in rows})
    for batch, axes in zip(batches, figure.subplots(1, len(batches), squeeze=False)[0], strict=True):
        chosen = [row for row in rows if row["batch"] == batch]
        for offset, name in enumerate(names):
            places = [place + 0.2 * offset for place in range(len(chosen))]
            axes.bar(places, [row["graph"][name]["median"] for row in chosen], 0.2, label=name)
        labels = [f"{row['tokens']:,}, tier {row['tier']}" for row in chosen]
        axes.set_xticks([place + 0.3 for place in range(len(chosen))], labels)
        axes.set_title(f"batch {batch}")
    figure.axes[0].set_ylabel("prefill in a CUDA graph, ms")
    figure.axes[-1].legend()
    figure.suptitle(f"{rows[0]['decoder']}, {device}")
    target.mkdir(parents=True, exist_ok=True)
    figure.savefig(target / file, metadata={"Date": None})
    return file


if __name__ == "__main__":
    main()
