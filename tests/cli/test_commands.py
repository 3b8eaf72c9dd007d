"""The command line, but for `demo`, `view`, `calibrate` and `loyalty`, which have files of their own."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
import typer
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

import reroute_kernels as rk
from reroute_kernels import notation
from reroute_kernels.cli import environment, plot
from reroute_kernels.cli.commands import app
from reroute_kernels.cli.demo import TINY_CHECKPOINT
from reroute_kernels.cost import Decoder, visual_tokens_per_layer
from reroute_kernels.presets import MODELS, ORIGINALS
from reroute_kernels.roofline import GPUS, decode_seconds, prefill_seconds
from reroute_kernels.versions import SUPPORTED
from reroute_kernels.vllm import Settings, engine_arguments, serve_arguments
from tests.cli.photos import make_photos

ROOT = Path(__file__).parents[2]
COMMANDS = typer.main.get_command(app).commands
LLAVA = "llava-1.5-7b"
POLICIES = {
    "fastv/192": rk.preset(LLAVA, "fastv", 192),
    "llava-1.5-7b/reroute-nuwa/64": rk.preset(LLAVA, "reroute-nuwa", 64),
    "3:0.5,16:0.1": rk.Policy([rk.Stage(3, 0.5), rk.Stage(16, 0.1)]),
    "remove:3:.5": rk.Policy([rk.Stage(3, 0.5)], "remove"),
}
CHECKPOINT = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 100,
}


def run(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


def answer(*arguments):
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def rows(output):
    return [[cell.strip() for cell in re.split("[│┃]", line)[1:-1]] for line in output.splitlines() if line[:1] in "│┃"]


@pytest.mark.parametrize("name", COMMANDS)
def test_the_example_in_the_help_runs(name, tmp_path, monkeypatch):
    (example,) = re.findall(r"Example: reroute-kernels (.*)", COMMANDS[name].help)
    assert f"Example: reroute-kernels {example}" in " ".join(run(name, "--help").output.split())
    monkeypatch.chdir(tmp_path)
    no_program(monkeypatch, "/programs/vllm")
    Image.new("RGB", (64, 48), "red").save("photo.jpg")
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (64, 48), "blue").save("photos/photo.jpg")
    arguments = shlex.split(example) + (["--repeats", "1", "--max-new-tokens", "1"] if name == "demo" else [])
    arguments = [argument.replace("llava-hf/llava-1.5-7b-hf", str(TINY_CHECKPOINT)) for argument in arguments]
    assert arguments[0] == name
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    shown = {"vllm-args": "--hf-overrides", "serve": "--additional-config"}
    assert {**shown, "env": "This installation routes"}.get(name, "┃") in result.output


def test_the_examples_of_the_pages_run(tmp_path, monkeypatch):
    pages = [(ROOT / name).read_text() for name in ("README.md", "docs/commands.md")]
    found = (re.findall(r"^reroute-kernels (.*?)(?: +#.*)?$", page, flags=re.MULTILINE) for page in pages)
    commands = [command for of_page in found for command in of_page]
    assert {command.split()[0] for command in commands} == set(COMMANDS) - {"demo", "view", "calibrate", "serve"}
    monkeypatch.chdir(tmp_path)
    photos = tmp_path / "photos"
    photos.mkdir()
    make_photos(photos, 1)
    for command in commands:
        result = run(*shlex.split(command.replace(" MODEL ", f" {TINY_CHECKPOINT} ")))
        assert result.exit_code == 0, result.output
    assert list(tmp_path.iterdir()) == [photos]


@pytest.mark.parametrize("originals", [False, True])
def test_presets(originals):
    names = rk.presets(originals=originals)
    listed = answer("presets", *(["--all"] if originals else []))
    assert [(each["model"], each["method"], each["avg_tokens"]) for each in listed] == names
    for name, each in zip(names, listed, strict=True):
        policy = rk.preset(*name)
        assert each["average_visual_tokens"] == rk.cost.average_visual_tokens(
            policy, MODELS[name.model].decoder.layers, 576
        )
        assert each["policy"] == json.loads(json.dumps(policy.to_dict()))
        assert rebuilt(each["policy"]) == policy


def rebuilt(policy):
    rules = {name: policy[name] and dict(policy[name]) for name in ("ranking", "reducer")}
    ranking = getattr(rk.rankings, rules["ranking"].pop("name"))(**rules["ranking"])
    reducer = rules["reducer"] and getattr(rk.reducers, rules["reducer"].pop("name"))(**rules["reducer"])
    schedule = [rk.Stage(**stage) for stage in policy["schedule"]]
    return rk.Policy(schedule, policy["action"], ranking, policy["positions"], reducer, recycle=policy["recycle"])


@pytest.mark.parametrize("columns", [80, 140])
def test_the_tables_of_all_presets_show_every_rule(columns, monkeypatch):
    monkeypatch.setattr("reroute_kernels.cli.commands._console", lambda: Console(width=columns))
    output = run("presets", "--all").output
    assert "…" not in output
    assert len(output.splitlines()) < 4 * len(rk.presets(originals=True))
    assert {row[0].split("/")[1] for row in rows(output) if "/" in row[0]} >= set(ORIGINALS)
    text = "".join("".join(row[1] for row in rows(output)).split())
    assert "LastQuery(layer=previous,queries=3,head_reduction=max)" in text
    assert "contiguouspositions" in text
    assert "keeps_own=False" in text
    for name in rk.presets(originals=True):
        assert notation.policy_text(rk.preset(*name)) in text


def test_cost_as_json_is_what_cost_counts():
    options = {"text_tokens": 10, "visual_tokens": 400, "batch": 3, "dtype": "float32", "images": 4}
    arguments = [text for name, value in options.items() for text in (f"--{name.replace('_', '-')}", value)]
    counted = answer("cost", LLAVA, *POLICIES, *arguments)
    assert [each["name"] for each in counted] == ["unrouted", *POLICIES]
    for each, policy in zip(counted, [None, *POLICIES.values()], strict=True):
        expected = rk.cost(LLAVA, policy, **options)
        assert each["cost"] == json.loads(json.dumps(expected.as_dict()))
        assert each["next_token_flops"] == expected.decode_flops(410)
        assert (each["policy"] and rebuilt(each["policy"])) == policy


def figures(output):
    """By label the cells of the first table, values and shares apart."""
    found, label = {}, None
    for row in rows(output):
        label = row[0] or label
        found.setdefault(label, []).append(row[1:])
    return found


@pytest.mark.parametrize("columns", [80, 140])
def test_cost_table(columns, monkeypatch):
    monkeypatch.setattr("reroute_kernels.cli.commands._console", lambda: Console(width=columns))
    output = run("cost", LLAVA, "reroute-fastv/192").output
    assert "…" not in output
    costs, stages = re.split(r"\n(?=┏)", output)[:2]
    found = figures(costs)
    unrouted, routed = (rk.cost(LLAVA, policy) for policy in (None, rk.preset(LLAVA, "reroute-fastv", 192)))
    assert found["visual tokens per layer"] == [["576", "191.8"], ["", "33.3%"]]
    names = {"prefill, TFLOPs": "prefill_flops"} | {
        part: part for part in ("projections", "attention", "mlp", "ranking")
    }
    for label, name in names.items():
        whole, value = getattr(unrouted, name), getattr(routed, name)
        assert found[label] == [
            [f"{whole / 1e12:.4g}", f"{value / 1e12:.4g}"],
            ["", f"{value / (whole or unrouted.prefill_flops):.1%}"],
        ]
    assert found["decode step, GFLOPs"][0][1] == f"{routed.decode_flops(640) / 1e9:.4g}"
    assert found["KV cache, MiB"] == [["320", f"{routed.kv_bytes / 2**20:.4g}"], ["", "40.0%"]]
    found = figures(stages)
    assert found["visual tokens"][0] == ["576", "152", "152", "152", "152"]
    assert found["with text"][0][:2] == ["640", "216"]
    assert found["prefill, TFLOPs"][0] == [f"{stage.flops / 1e12:.4g}" for stage in routed.stages]
    assert "no vision tower, no LM head" in output
    assert "with text" not in run("cost", LLAVA, "fastv/192", "fastv/64").output


def test_cost_tables_of_many_policies_fit(monkeypatch):
    monkeypatch.setattr("reroute_kernels.cli.commands._console", lambda: Console(width=80))
    names = [f"{method}/{tier}" for method in ("fastv", "pdrop", "reroute-fastv") for tier in (192, 64)]
    output = run("cost", LLAVA, *names).output
    assert max(map(len, output.splitlines()[:-3])) <= 80
    assert "…" not in output
    assert output.count("unrouted") > 2
    text = "".join(cell for row in rows(output) for cell in row)
    assert all(name in "".join(text.split()) or name.split("/")[0] in text for name in names)


@pytest.mark.parametrize("gpu", GPUS)
def test_estimates_of_time(gpu):
    output = run("cost", LLAVA, "reroute-fastv/192", "--gpu", gpu).output
    unrouted, routed = (rk.cost(LLAVA, policy) for policy in (None, rk.preset(LLAVA, "reroute-fastv", 192)))
    for label, seconds in (("prefill", prefill_seconds), ("decode step", decode_seconds)):
        cells = figures(output)[f"{label} on {gpu}, ms, estimate"][0]
        assert cells == [f"{seconds(cost, gpu) * 1e3:,.4g}" for cost in (unrouted, routed)]
        assert seconds(routed, gpu) < seconds(unrouted, gpu)
    assert "not a measurement" in output
    estimates = [each["estimate"] for each in answer("cost", LLAVA, "reroute-fastv/192", "--gpu", gpu.upper())]
    assert estimates[1] == {
        "gpu": gpu,
        "prefill_seconds": prefill_seconds(routed, gpu),
        "decode_seconds": decode_seconds(routed, gpu),
    }
    assert "estimate" not in answer("cost", LLAVA)[0]


def test_estimates_by_hand():
    """A stage is bound by arithmetic or by the weights that it reads."""
    decoder, gpu = Decoder(4, 2, 1, 1, 4, 10, mlp_weights=(48, 48)), GPUS["h100"]
    short, long = (rk.cost(decoder, None, text_tokens=count, visual_tokens=1) for count in (1, 10**6))
    read = 2 * (2 * (2 * 4 * 2 * 4) + 96)
    assert prefill_seconds(short, "h100") == pytest.approx((read + short.kv_bytes) / gpu.bandwidth)
    assert prefill_seconds(long, "h100") == pytest.approx(long.prefill_flops / gpu.flops)
    assert decode_seconds(short, "h100") == pytest.approx((read + 2 * 4 * 10 + short.kv_bytes) / gpu.bandwidth)


def test_version():
    assert run("--version").output == f"reroute-kernels {rk.__version__}\n"
    assert "Usage" in run("-h").output
    assert "Usage" in run("cost", "-h").output


def test_cost_of_a_checkpoint(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CHECKPOINT))
    unrouted, routed = answer("cost", tmp_path, "2:0.25")
    decoder = unrouted["cost"]["decoder"]
    assert (decoder["hidden_size"], decoder["layers"], decoder["kv_heads"]) == (64, 6, 2)
    expected = rk.cost(Decoder(**decoder), rk.Policy([rk.Stage(2, 0.25)]), 64, 576)
    assert routed["cost"] == json.loads(json.dumps(expected.as_dict()))


def test_visual_tokens_are_those_of_an_image(tmp_path):
    """PaliGemma at 448 pixels has 32 x 32 of them."""
    text = CHECKPOINT | {"model_type": "gemma"}
    config = {"model_type": "paligemma", "text_config": text, "vision_config": {"image_size": 448, "patch_size": 14}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    _, own = answer("cost", tmp_path, "reroute-fastv/320")
    assert own["cost"]["visual_tokens"] == 1024
    assert 319 < own["cost"]["average_visual_tokens"] <= 320
    assert answer("cost", tmp_path, "2:0.25", "--visual-tokens", "300")[1]["cost"]["visual_tokens"] == 300
    solved = rk.Policy.from_dict(answer("solve", tmp_path, "1,3", "--avg-tokens", "320")["policy"])
    assert 319 < rk.cost.average_visual_tokens(solved, 6, 1024) <= 320


WITHOUT = "import sys; sys.modules[{!r}] = None; from reroute_kernels.cli import main; sys.argv[1:] = {!r}; main()"


@pytest.mark.parametrize(
    ("missing", "arguments", "code"),
    [
        ("transformers", ["cost", LLAVA, "fastv/192"], 0),
        ("transformers", ["solve", LLAVA, "3", "--avg-tokens", "64"], 0),
        ("transformers", ["cost", str(ROOT)], 2),
        ("matplotlib", ["cost", LLAVA, "fastv/192"], 0),
        ("matplotlib", ["cost", LLAVA, "--plot", "cost.png"], 2),
        ("typer", ["cost", LLAVA, "fastv/192"], 2),
    ],
    ids=lambda value: "-".join(value[:1] + value[2:3]) if isinstance(value, list) else str(value),
)
def test_missing_modules_are_named_where_they_are_needed(missing, arguments, code, tmp_path):
    command = [sys.executable, "-c", WITHOUT.format(missing, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == code, result.stderr
    if code:
        assert re.fullmatch(rf"reroute-kernels: .* needs {missing}.*: pip install {missing}\n", result.stderr)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "keywords"),
    [
        (["--avg-tokens", "96"], {"avg_tokens": 96}),
        (["--avg-tokens", "96", "--shape", "pyramid", "--action", "remove"], {"shape": "pyramid", "action": "remove"}),
        (["--flops", "3e12", "--shape", "1,.5,.25"], {"flops": 3e12, "shape": [1, 0.5, 0.25]}),
        (["--kv-bytes", "9e7", "--visual-tokens", "300", "--text-tokens", "5"], {"kv_bytes": 9e7}),
    ],
    ids=["avg-tokens", "remove", "flops", "kv-bytes"],
)
def test_solve(options, keywords):
    if "kv_bytes" in keywords:
        keywords = keywords | {"visual_tokens": 300, "text_tokens": 5}
    if not {"flops", "kv_bytes"} & set(keywords):
        keywords = keywords | {"avg_tokens": 96}
    expected = rk.solve(LLAVA, [3, 7, 15], **keywords)
    solved = answer("solve", LLAVA, "3,7,15", *options)
    assert rebuilt(solved["policy"]) == expected
    assert solved["budget"] == expected.budget._asdict() | {"under": expected.budget.under}
    assert notation.parse_policy(solved["text"]) == expected
    names = {"rk": rk}
    exec(solved["python"], names)
    assert names["policy"] == expected
    output = run("solve", LLAVA, "3,7,15", *options).output
    counts = expected.selected_counts(keywords.get("visual_tokens", 576))
    assert [int(row[2]) for row in rows(output)[1:]] == list(counts)
    assert f"In Python: {solved['python']}\n" in output
    assert f"In the command cost: {solved['text']}\n" in output
    assert f"which is {expected.budget.under:,.12g} under" in output


def test_policies_in_files(tmp_path, monkeypatch):
    """One is saved by `solve`, and all commands that take a policy take it."""
    monkeypatch.chdir(tmp_path)
    result = run("solve", LLAVA, "3,7,15", "--avg-tokens", "96", "--output", "solved.json")
    assert result.output.endswith("Policy: solved.json\n")
    solved = rk.Policy.load("solved.json")
    expected = rk.solve(LLAVA, [3, 7, 15], avg_tokens=96)
    assert (solved, solved.budget) == (expected, expected.budget)
    told = answer("solve", LLAVA, "3,7,15", "--avg-tokens", "96")["policy"]
    assert rk.Policy.from_dict(told).budget == solved.budget
    own = rk.Policy([rk.Stage(3, 0.5), rk.Stage(7, 0.2, rk.rankings.LastQuery(queries=2))], "remove")
    own.save("own.json")
    _, first, second = answer("cost", LLAVA, "solved.json", "own.json")
    assert [first["name"], second["name"]] == ["solved.json", "own.json"]
    assert second["policy"] == own.to_dict()
    assert second["cost"] == rk.cost(LLAVA, own).as_dict()
    assert answer("vllm-args", LLAVA, "own.json")["additional_config"] == {"reroute": {"policy": own.to_dict()}}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("cost llava-1.5-7b none.json", r"\[Errno 2\] No such file or directory: 'none.json'"),
        ("cost llava-1.5-7b wrong.json", "'wrong.json' must hold a policy as JSON: Extra data"),
        ("vllm-args llava-1.5-7b old.json", "'old.json' must hold a policy: version must be 1, .*, got 0"),
        ("demo --policy old.json", "'old.json' must hold a policy: version must be 1, .*, got 0"),
        ("demo --policy none.json", r"\[Errno 2\] No such file or directory: 'none.json'"),
        (
            "solve llava-1.5-7b 3 --avg-tokens 64 --output none/policy.json",
            r"\[Errno 2\] No such file or directory: 'none/policy.json'",
        ),
    ],
)
def test_files_that_are_refused(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("wrong.json").write_text("3:0.25")
    Path("old.json").write_text('{"version": 0}')
    result = run(*arguments.split())
    assert result.exit_code == 2
    assert re.fullmatch(f"reroute-kernels: {message}.*\n", result.stderr)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("cost llava", "model must be llava-1.5-7b, qwen2.5-vl-7b, or .*, got 'llava'"),
        ("cost ./missing", "model must be .*, got './missing': "),
        ("cost {gemma}", "model must have full attention .*, got '.*' with .*'sliding_attention' at layer 0"),
        (
            "cost llava-1.5-7b nonsense",
            "policy must be a preset like reroute-fastv/192, .*, got 'nonsense': a preset is method/avg_tokens or ",
        ),
        (
            "cost {llama} nuwa/192",
            "policy must be a preset like .*, got 'nuwa/192': method must be one of 'fastv', ",
        ),
        ("cost {llama} 3:0.5,6:0.5", "schedule must stay below layer 6 of this model, got layer 6"),
        ("cost llava-1.5-7b fastv/100", "got 'fastv/100': avg_tokens must be one of 192, 128, 64, got 100"),
        ("cost llava-1.5-7b --gpu tpu", "gpu must be one of 'a100', .*, got 'tpu'"),
        ("cost llava-1.5-7b qwen2.5-vl-7b/fastv/192", "presets of qwen2.5-vl-7b are for 28 decoder layers"),
        ("cost llava-1.5-7b drop:3:0.5", "policy must be .* got 'drop:3:0.5'"),
        ("cost llava-1.5-7b 3:1.5", r"got '3:1.5': keep must be in \(0, 1\], got 1.5 at layer 3"),
        ("cost llava-1.5-7b --visual-tokens 0", "--visual-tokens.*1.*--visual-tokens 0"),
        ("cost llava-1.5-7b --batch x", "--batch.*integer.*--batch x"),
        ("cost llava-1.5-7b --dtype half16", "dtype must be a torch.dtype or the name of one, got 'half16'"),
        ("cost llava-1.5-7b --plot x.txt", "plot must end in one of .png, .jpg, .pdf, .svg, got x.txt"),
        ("cost llava-1.5-7b --plot missing/x.png", "plot must be a file that can be written, got missing/x.png"),
        ("cost --unknown", "--unknown"),
        ("unknown", "unknown"),
        ("solve llava-1.5-7b 3", "exactly one of avg_tokens, flops, kv_bytes must be given, got none"),
        ("solve llava-1.5-7b 3,x --flops 1", "layers must be integers such as 3,7,15, got '3,x'"),
        ("solve llava-1.5-7b 3,40 --flops 1", r"decision_layers must hold .* from 0 to 31, got \[3, 40\]"),
        ("solve llava-1.5-7b 3 --avg-tokens 5", "avg_tokens must be 54.90625 or more, .* got 5.0"),
        ("solve llava-1.5-7b 3 --flops 9e12 --shape cone", "shape must be uniform, pyramid or numbers .* got 'cone'"),
        ("cost llava-1.5-7bb/x/y 3:0.5", "model must be .*, got 'llava-1.5-7bb/x/y': no such folder"),
        ("vllm-args llava-1.5-7b 99:0.5", "schedule must stay below layer 32 of this model, got layer 99"),
        ("solve llava-1.5-7b 3 --avg-tokens inf", "avg_tokens must be finite, got inf"),
        (
            "solve llava-1.5-7b 3 --flops 9e12 --action drop",
            "action must be one of 'reroute', 'remove', 'freeze', got 'drop'",
        ),
    ],
    ids=lambda value: value.replace("llava-1.5-7b ", "").replace(" ", "_"),
)
def test_one_clear_line_and_exit_code_2(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sliding = {"model_type": "gemma3_text", "layer_types": ["sliding_attention"] * 6}
    for name, config in (("llama", CHECKPOINT), ("gemma", CHECKPOINT | sliding)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    result = run(*arguments.format(llama=tmp_path / "llama", gemma=tmp_path / "gemma").split())
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("reroute-kernels: ")
    assert re.search(message, line), line
    assert not result.stdout


def costed(policies):
    named = [("unrouted", None), *policies.items()]
    return [(name, policy, rk.cost(LLAVA, policy, 64, 576)) for name, policy in named]


@pytest.mark.parametrize("count", range(len(POLICIES) + 1))
def test_steps_of_the_picture_are_the_tokens_that_run(count):
    policies = dict(list(POLICIES.items())[:count])
    shown = costed(policies)[1:] or costed({})
    figure = plot.draw_schedules(costed(policies))
    assert len(figure.axes) == len(shown)
    for axis, (name, policy, cost) in zip(figure.axes, shown, strict=True):
        everything, candidates, running = (step.get_data() for step in axis.patches)
        expected = [576] * 32 if policy is None else visual_tokens_per_layer(policy, 32, 576)
        assert running.values.tolist() == expected
        assert running.edges.tolist() == [layer - 0.5 for layer in range(33)]
        assert everything.values.tolist() == [576] * 32
        pool = 576 if policy is None or policy.reducer is None else policy.reducer.survivors(576)
        is_removed = policy is not None and policy.action == "remove"
        assert candidates.values.tolist() == (expected if is_removed else [pool] * 32)
        title, unrouted = axis.get_title().splitlines(), rk.cost(LLAVA, None, 64, 576)
        assert title[:2] == [name.replace(",", ", "), f"{sum(expected) / 32:.1f} visual tokens per layer"]
        assert title[2].startswith(f"{cost.prefill_flops / unrouted.prefill_flops:.1%} of unrouted prefill FLOPs, ")
        assert title[2].endswith(f", {cost.kv_bytes / unrouted.kv_bytes:.1%} of its KV bytes")
        assert axis.get_ylim() == figure.axes[0].get_ylim()
        assert [int(text.get_text()) for text in axis.texts] == [stage.visual_tokens for stage in cost.stages]


def test_titles_stay_beside_each_other():
    solved = rk.solve(LLAVA, [3, 7, 15, 23, 27], avg_tokens=100)
    figure = plot.draw_schedules(costed(POLICIES | {notation.policy_text(solved): solved, "3:0.1": solved}))
    figure.draw_without_rendering()
    boxes = [axis.title.get_window_extent() for axis in figure.axes]
    assert not [(one, other) for one in boxes for other in boxes if one is not other and one.overlaps(other)]
    assert all(figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 for box in boxes)


@pytest.mark.parametrize("suffix", plot.PICTURE_FORMATS)
def test_picture_is_written(suffix, tmp_path):
    picture = tmp_path / f"cost{suffix}"
    result = run("cost", LLAVA, "fastv/192", "--plot", picture)
    assert result.exit_code == 0, result.output
    assert str(picture) in result.output
    assert picture.read_bytes()[:4] in (b"\x89PNG", b"\xff\xd8\xff\xe0", b"%PDF", b"<?xm")
    assert answer("cost", LLAVA, "fastv/192", "--plot", picture)


EXTRAS = ("typer", "rich", "PIL", "matplotlib", "sklearn", "accelerate")
WITHOUT_ANY = (
    "import sys; sys.modules.update(dict.fromkeys({!r})); sys.argv[1:] = {!r};"
    "from reroute_kernels.cli import main; main()"
)


@pytest.mark.parametrize("with_transformers", [True, False], ids=["transformers", "no-transformers"])
@pytest.mark.parametrize("options", [[], ["--json"]], ids=["table", "json"])
def test_env_needs_no_extra(options, with_transformers, tmp_path):
    missing = EXTRAS if with_transformers else (*EXTRAS, "transformers")
    code = WITHOUT_ANY.format(missing, ["env", *options])
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    without = "reroute-kernels: routing a model needs transformers: pip install transformers\n"
    assert (result.returncode, result.stderr) == ((0, "") if with_transformers else (1, without))
    if options:
        told = json.loads(result.stdout)
        assert told["supported"] == {name: str(supported) for name, supported in SUPPORTED.items()}
        assert len(told["problems"]) == (not with_transformers)
    else:
        table = [re.split("  +", line) for line in result.stdout.splitlines()]
        for name, supported in SUPPORTED.items():
            (row,) = (row for row in table if row[0] == name)
            assert row[2] == str(supported)
        assert f"This installation {'routes' if with_transformers else 'cannot route'}" in result.stdout


def test_help_of_env_needs_no_extra(tmp_path):
    code = WITHOUT_ANY.format(EXTRAS, ["env", "--help"])
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert (result.returncode, result.stdout.split()[:3]) == (0, ["usage:", "reroute-kernels", "env"])


def test_env_tells_what_was_tried():
    told = answer("env")
    assert told["versions"]["torch"] == torch.__version__
    assert told["problems"] == []
    assert told["versions"]["reroute-kernels"] == rk.__version__
    cpu, *others = told["devices"]
    assert len(others) == torch.cuda.device_count()
    assert (cpu["device"], cpu["tried"], cpu["error"]) == ("cpu", not others, None)
    for device in others:
        assert (device["backend"], device["tried"], device["error"]) == ("triton", True, None)


def test_env_really_calls_the_operation(monkeypatch):
    calls, route_tokens = [], rk.ops.route_tokens
    monkeypatch.setattr(
        rk.ops, "route_tokens", lambda *args, **kwargs: calls.append(1) or route_tokens(*args, **kwargs)
    )
    monkeypatch.setattr(environment, "check_model", lambda device: None)
    assert run("env").exit_code == 0
    assert len(calls) == max(1, torch.cuda.device_count())


def wrong_index(*arguments, tensors, **keywords):
    index, rows = rk.ref.route_tokens(*arguments, tensors=tensors, **keywords)
    return index + 1, rows


def wrong_rows(*arguments, tensors, **keywords):
    index, rows = rk.ref.route_tokens(*arguments, tensors=tensors, **keywords)
    return index, tuple(table.neg() for table in rows)


def broken(*arguments, **keywords):
    raise RuntimeError("no kernel image\nlong explanation")


@pytest.mark.parametrize(
    ("route_tokens", "message"),
    [
        (wrong_index, r"route_tokens must keep \[.*\], as the reference, got \[.*\]"),
        (wrong_rows, "route_tokens must copy the rows that it keeps, as the reference, got others"),
        (broken, "no kernel image"),
    ],
    ids=["index", "rows", "error"],
)
def test_env_fails_where_the_operation_does(route_tokens, message, monkeypatch):
    monkeypatch.setattr(environment.ops, "route_tokens", route_tokens)
    result = run("env", "--json")
    assert result.exit_code == 1
    assert re.fullmatch(rf"reroute-kernels: \w+(:0)?: {message}\n", result.stderr), result.stderr
    tried = [device for device in json.loads(result.stdout)["devices"] if device["tried"]]
    assert re.fullmatch(message, tried[0]["error"])
    assert run("env").exit_code == 1
    assert "equals the reference" not in run("env").output


def test_env_where_the_forced_backend_cannot_run(monkeypatch):
    monkeypatch.setenv("REROUTE_BACKEND", "cuda")
    result = run("env", "--json")
    assert result.exit_code == 1
    assert "REROUTE_BACKEND must be one of 'ref', 'triton', got 'cuda'" in result.stderr
    told = json.loads(result.stdout)
    assert told["REROUTE_BACKEND"] == "cuda"
    assert {device["backend"] for device in told["devices"]} == {None}


@pytest.mark.parametrize(("package", "version"), [("transformers", "4.57.6"), ("torch", "2.9.1"), ("python", "3.9.2")])
def test_env_where_something_is_too_old(package, version, monkeypatch):
    found = environment.versions() | {package: version}
    monkeypatch.setattr(environment, "versions", lambda: found)
    result = run("env")
    assert result.exit_code == 1
    assert result.stderr == (
        f"reroute-kernels: {package} must be {SUPPORTED[package].oldest} or later, got {version}\n"
    )
    assert re.search(rf"^{package} .*too old$", result.stdout, flags=re.MULTILINE)


@pytest.mark.parametrize(("backend", "code"), [("triton", 1), ("ref", 0)])
def test_env_where_triton_is_too_old(backend, code, monkeypatch):
    """An old Triton matters only if it would run."""
    found = environment.versions() | {"triton": "3.2.0"}
    monkeypatch.setattr(environment, "versions", lambda: found)
    monkeypatch.setattr(environment, "active_backend", lambda device: backend)
    result = run("env")
    assert result.exit_code == code
    assert ("triton must be 3.6 or later, got 3.2.0" in result.stderr) == bool(code)


def test_env_where_a_version_is_newer_than_the_tested_ones(monkeypatch):
    found = environment.versions() | {"transformers": "7.0.0"}
    monkeypatch.setattr(environment, "versions", lambda: found)
    monkeypatch.setattr("transformers.__version__", "7.0.0")
    result = run("env")
    assert (result.exit_code, result.stderr) == (0, "")
    assert re.search(r"^transformers +7\.0\.0 .*newer than tested$", result.stdout, flags=re.MULTILINE)


def no_argument(self, hidden_states, position_embeddings, renamed=None, **others):
    raise AssertionError("not called")


def broken_module(self, *arguments, **keywords):
    raise RuntimeError("Could not import module\nlong explanation")


@pytest.mark.parametrize(
    ("target", "value", "message"),
    [
        ("models.llama.modeling_llama.LlamaDecoderLayer.forward", no_argument, "LlamaDecoderLayer.forward has no argu"),
        ("LlavaForConditionalGeneration.__init__", broken_module, "Could not import module$"),
    ],
    ids=["built-differently", "broken"],
)
def test_env_where_a_model_cannot_be_routed(target, value, message, monkeypatch):
    monkeypatch.setattr(f"transformers.{target}", value)
    result = run("env", "--json")
    assert result.exit_code == 1
    (problem,) = json.loads(result.stdout)["problems"]
    assert result.stderr == f"reroute-kernels: {problem}\n"
    assert re.search(message, problem)
    assert transformers.__version__ in problem


@pytest.mark.parametrize("fault", ["unrouted", "wrong"])
def test_env_where_routing_does_not_do_what_it_should(fault, monkeypatch):
    """Hooks that are never called, and a layer that is handed another input."""
    from reroute_kernels.models.hooks import Routing

    if fault == "unrouted":

        def install(self):
            self._handles.append(self._adapter.core.register_forward_hook(lambda *_: None))

        monkeypatch.setattr(Routing, "_install", install)
        expected = "a decision must keep 36 of 144 visual tokens, got None"
    else:
        decide = Routing._decide
        monkeypatch.setattr(Routing, "_decide", lambda *arguments: decide(*arguments) * 1.1)
        expected = "logits at keep 1.0 must be those of the unrouted model, got a difference of "
    result = run("env")
    assert result.exit_code == 1
    assert expected in result.stderr


@pytest.mark.parametrize(
    ("model", "architecture"),
    [
        ("llava-1.5-7b", "LlavaForConditionalGeneration"),
        ("qwen2.5-vl-7b", "Qwen2_5_VLForConditionalGeneration"),
        (str(ROOT / "models" / "tiny_grounding"), "LlavaForConditionalGeneration"),
    ],
)
def test_vllm_arguments(model, architecture):
    given = (model, "remove:3:0.25,7:0.1", "--own-groups", "--max-model-len", "2048")
    settings = Settings(notation.parse_policy("remove:3:0.25,7:0.1"), own_groups=True)
    assert shlex.split(run("vllm-args", *given).stdout) == serve_arguments(architecture, settings, 2048)
    assert answer("vllm-args", *given) == engine_arguments(architecture, settings, 2048)


def no_program(monkeypatch, vllm):
    """Print what would be started in place of this process; `vllm` is where vLLM's command is found, or None."""
    monkeypatch.setattr(sys, "executable", "/no/python")
    monkeypatch.setattr("shutil.which", {"vllm": vllm}.get)
    monkeypatch.setattr("os.execv", lambda program, arguments: print(shlex.join([program, *arguments])))


def test_serve(monkeypatch):
    no_program(monkeypatch, "/programs/vllm")
    model = str(ROOT / "models" / "tiny_grounding")
    result = run("serve", model, "--policy", "2:0.5", "--own-groups", "--port", "8000", "--no-enable-log-requests")
    program, *arguments = shlex.split(result.stdout)
    assert (program, arguments[:3]) == ("/programs/vllm", ["/programs/vllm", "serve", model])
    assert arguments[3:7] == ["--port", "8000", "--no-enable-log-requests", "--additional-config"]
    (given,) = arguments[7:]
    assert Settings.of(json.loads(given)["reroute"]) == Settings(rk.Policy([rk.Stage(2, 0.5)]), own_groups=True)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("llava-1.5-7b", "--policy", "3:0.25"), "model must be a checkpoint folder or hub id, got 'llava-1.5-7b'"),
        ((str(TINY_CHECKPOINT), "--policy", "99:0.5"), "schedule must stay below layer"),
        ((str(TINY_CHECKPOINT), "--policy", "freeze:2:0.5"), "action must be 'reroute' or 'remove' inside vLLM"),
        ((str(TINY_CHECKPOINT), "--policy", "2:0.5", "--additional_config={}"), "additional-config must not be given"),
        ((str(TINY_CHECKPOINT), "--policy", "2:0.5", "--additional-conf", "{}"), "additional-config must not be given"),
        ((str(TINY_CHECKPOINT), "--policy", "2:0.5", "--additional-config.a", "1"), "additional-config must not be"),
        (("--port", "8000", str(TINY_CHECKPOINT), "--policy", "2:0.5"), "model must stand before the options"),
        ((str(TINY_CHECKPOINT), "--policy", "2:0.5"), "the command needs vllm: pip install"),
        ((str(TINY_CHECKPOINT),), "Missing option '--policy'"),
    ],
)
def test_serve_refuses(monkeypatch, given, message):
    no_program(monkeypatch, None)
    result = run("serve", *given)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(f"reroute-kernels: {message}")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("llava", "3:0.25"), "model must be llava-1.5-7b, qwen2.5-vl-7b, or the folder or hub id"),
        (("llava-1.5-7b", "fastv"), "policy must be a preset like reroute-fastv/192, a schedule"),
        (("llava-1.5-7b", "nuwa/64"), "reducer must be None inside vLLM, got Nuwa"),
        ((str(ROOT / "tests" / "golden" / "no_such_folder"), "3:0.25"), "model must be"),
    ],
)
def test_vllm_arguments_that_are_refused(given, message):
    result = run("vllm-args", *given)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"reroute-kernels: {message}")
    assert result.stderr.count("\n") == 1
