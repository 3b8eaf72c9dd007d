"""The commands and their options."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Annotated

import typer
from rich.console import Console
from typer.core import TyperGroup

from .. import __version__
from ..budget import SHAPES, solve
from ..calibration import SHARE, check_plan, measure_layers
from ..checks import expect_one_of
from ..cost import DECODERS, average_visual_tokens, cost
from ..notation import parse_policy, policy_text
from ..presets import MODELS, VISUAL_TOKENS, preset, presets, visual_tokens_of
from ..roofline import GPUS
from ..versions import install_command
from . import arguments as reading
from . import output as writing
from . import tables

UsageError = typer.BadParameter.__base__


class _Commands(TyperGroup):
    """Commands whose usage errors are one line that tells what came, as all other errors are."""

    def parse_args(self, context, arguments):
        context.obj = shlex.join(arguments)
        return super().parse_args(context, arguments)

    def invoke(self, context):
        try:
            return super().invoke(context)
        except UsageError as error:
            _fail(f"{error.format_message().rstrip('.')}; got {context.obj}")


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ModelArgument = Annotated[
    str, typer.Argument(help=f"{' or '.join(DECODERS)}, or a checkpoint folder or hub id; only its config is read.")
]
TextTokens = Annotated[int, typer.Option(min=0, help="Tokens of the prompt that are no visual ones.")]
VisualTokens = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Visual tokens of the prompt. Default: of one image, if the model's configuration fixes them, else 576.",
        show_default=False,
    ),
]
Batch = Annotated[int, typer.Option(min=1, help="Prompts, all alike.")]
CacheType = Annotated[str, typer.Option(help="Of keys and values in the cache.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def _show_version(asked: bool) -> None:
    if asked:
        print(f"reroute-kernels {__version__}")
        raise typer.Exit


@app.callback()
def _reroute_kernels(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Route visual tokens through vision-language models."""


@app.command("presets")
def list_presets(
    everything: Annotated[
        bool,
        typer.Option(
            "--all", help="List methods as their own authors run them, too: FastV, PyramidDrop, Nüwa and others."
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """List the published configurations with what they really cost.

    Example: reroute-kernels presets --all
    """
    listed = []
    for name in presets(originals=everything):
        policy = preset(*name)
        listed.append((name, policy, average_visual_tokens(policy, MODELS[name.model].decoder.layers, VISUAL_TOKENS)))
    if as_json:
        _print_json([writing.preset_dict(*each) for each in listed])
        return
    console = _console()
    console.print(tables.presets_table(listed))
    if everything:
        console.print(tables.rules_table(listed))
    console.print("A -stagewise configuration is the same policy as the one without.", highlight=False)


@app.command("cost")
def count_cost(
    model: ModelArgument,
    policies: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="POLICY",
            help="Presets (see the command presets), such as reroute-fastv/192, llava-1.5-7b/fastv/192 or "
            "flashvid/10%, schedules, such as 3:0.25,7:0.25, remove:3:0.25, freeze:3:0.25 or "
            "align-stage:3:0.25,7:0.25, or files, such as policy.json.",
        ),
    ] = None,
    text_tokens: TextTokens = 64,
    visual_tokens: VisualTokens = None,
    batch: Batch = 1,
    images: Annotated[
        int, typer.Option(min=1, help="Images or frames that the visual tokens are of; a reducer reduces each.")
    ] = 1,
    dtype: CacheType = "float16",
    as_json: AsJson = False,
    gpu: Annotated[
        str | None, typer.Option(help=f"Estimate times on a GPU by the roofline model: {', '.join(GPUS)}.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Where to save a picture of the schedules.")] = None,
) -> None:
    """Count the FLOPs and cache bytes of policies, beside those of the model without routing.

    Example: reroute-kernels cost llava-1.5-7b fastv/192 reroute-fastv/192 3:0.5,16:0.1
    """
    with _one_line_errors():
        if plot is not None:
            from .plot import check_picture, draw_schedules

            check_picture(plot, "plot")
        if gpu is not None:
            gpu = gpu.lower()
            expect_one_of(gpu=(gpu, tuple(GPUS)))
        parsed = reading.parse_model(model)
        decoder = reading.decoder_of(parsed, model)
        visual_tokens = visual_tokens or visual_tokens_of(parsed)
        given = [("unrouted", None), *((text, parse_policy(text, parsed)) for text in policies or ())]
        costed = [
            (name, policy, cost(decoder, policy, text_tokens, visual_tokens, batch, dtype, images))
            for name, policy in given
        ]
        if plot is not None:
            draw_schedules(costed).savefig(plot, dpi=110)
    if as_json:
        _print_json([writing.cost_dict(*each, gpu) for each in costed])
        return
    console = _console()
    for table in tables.costs_tables(costed, gpu, console.width):
        console.print(table)
    if len(costed) == 2:
        for table in tables.stages_tables(costed[1][2], console.width):
            console.print(table)
    console.print(
        f"{text_tokens:,} text and {visual_tokens:,} visual tokens, batch {batch}, cache in {dtype}. "
        "FLOPs: matrix products of the decoder layers, no vision tower, no LM head. "
        "Percentages: of unrouted; for ranking, of its prefill."
        + ("" if gpu is None else " Estimates: the least time that arithmetic and memory take, not a measurement."),
        highlight=False,
        soft_wrap=True,
    )
    if plot is not None:
        console.print(f"Picture: {plot}", markup=False, highlight=False, soft_wrap=True)


@app.command("solve")
def solve_schedule(
    model: ModelArgument,
    layers: Annotated[str, typer.Argument(help="Decision layers, such as 3,7,15.")],
    avg_tokens: Annotated[float | None, typer.Option(help="Budget of visual tokens per layer on average.")] = None,
    flops: Annotated[float | None, typer.Option(help="Budget of FLOPs of the prefill, such as 2.5e12.")] = None,
    kv_bytes: Annotated[float | None, typer.Option(help="Budget of bytes in the cache, text included.")] = None,
    shape: Annotated[
        str, typer.Option(help=f"How the stages relate: {', '.join(SHAPES)}, or numbers such as 1,.5,.25.")
    ] = "uniform",
    action: Annotated[str, typer.Option(help="reroute, remove or freeze.")] = "reroute",
    text_tokens: TextTokens = 64,
    visual_tokens: VisualTokens = None,
    batch: Batch = 1,
    dtype: CacheType = "float16",
    as_json: AsJson = False,
    output: Annotated[Path | None, typer.Option(help="Where to save the policy, such as policy.json.")] = None,
) -> None:
    """Find a schedule that comes close to a budget and never exceeds it.

    Example: reroute-kernels solve llava-1.5-7b 3,7,15 --avg-tokens 96 --shape pyramid
    """
    with _one_line_errors():
        parsed = reading.parse_model(model)
        visual_tokens = visual_tokens or visual_tokens_of(parsed)
        policy = solve(
            reading.decoder_of(parsed, model),
            reading.parse_layers(layers),
            reading.parse_shape(shape),
            avg_tokens=avg_tokens,
            flops=flops,
            kv_bytes=kv_bytes,
            visual_tokens=visual_tokens,
            text_tokens=text_tokens,
            batch=batch,
            dtype=dtype,
            action=action,
        )
        if output is not None:
            policy.save(output)
    if as_json:
        _print_json(writing.solution_dict(policy))
        return
    console = _console()
    console.print(tables.solution_table(policy, visual_tokens))
    for line in (
        writing.budget_text(policy.budget),
        f"In the command cost: {policy_text(policy)}",
        f"In Python: {writing.policy_python(policy)}",
        *([] if output is None else [f"Policy: {output}"]),
    ):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


Checkpoint = Annotated[
    str | None,
    typer.Option(
        help="Checkpoint folder or hub id of a supported model. Default: a tiny one, trained to find shapes on photos."
    ),
]
Photo = Annotated[
    Path | None,
    typer.Option(help="Photo. Default: a scene that the tiny model has not seen; for others one of scikit-learn's."),
]
RunDevice = Annotated[str, typer.Option(help="Device to run on.")]
RunType = Annotated[str, typer.Option(help="float32, float16 or bfloat16.")]
AnswerLength = Annotated[int, typer.Option(min=1, help="Length of the answers.")]


@app.command()
def demo(
    model: Checkpoint = None,
    image: Photo = None,
    prompt: Annotated[
        str | None, typer.Option(help="Prompt with the model's image token. Default: a question in its chat template.")
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option(
            help="Preset (see the command presets), schedule, such as 3:0.25,7:0.25, or file, such as policy.json. "
            "Default: tier 192, or what fits the model."
        ),
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")] = False,
    output: Annotated[Path, typer.Option(help="Where to save the picture.")] = Path("demo.png"),
    device: RunDevice = "cpu",
    dtype: RunType = "float32",
    max_new_tokens: AnswerLength = 16,
    repeats: Annotated[int, typer.Option(min=1, help="Prefills to time of each kind.")] = 7,
) -> None:
    """Run one prompt unrouted, with tokens removed, and rerouted; print a table and save a picture.

    Example: reroute-kernels demo --image photo.jpg --chat --prompt "Where is the cup?"
    """
    console = _console()
    with _demonstration(device, dtype) as demonstration:
        from .draw import Row, draw

        _check_output(output, "output")
        example = demonstration.example() if model is None and image is None else None
        photo = demonstration.open_image(example.image if example else image)
        truth = example.truth if example and prompt is None else None
        rates = example.rates if truth and policy is None else {}
        if prompt is None:
            chat, prompt = True, example.prompt if example else _question(image)
        policies = [policy] if policy else example.policies if example else ()
        with console.status(f"loading {model or 'the tiny model'}"):
            subject = demonstration.load(model, photo, prompt, policies, chat=chat, device=device, dtype=dtype)
        with console.status("running unrouted, with removal and rerouted"):
            runs = demonstration.compare(subject, max_new_tokens=max_new_tokens, repeats=repeats)
        positions = subject.visual_positions()
        drawn = [[], *(demonstration.drawn_shares(run.trace, positions) for run in runs[1:])]
        rows = [Row(run.told(truth), of_run, run.box) for run, of_run in zip(runs, drawn, strict=True)]
        draw(subject, rows, output, truth, prompt)
        shares = demonstration.stage_shares(runs[-1].trace, positions)

    if truth:
        console.print(f"{prompt} (true box: {' '.join(f'{edge:.2f}' for edge in truth)})", highlight=False)
    console.print(tables.runs_table(runs, truth, rates, times=model is not None))
    if shares:
        console.print(tables.shares_table(shares))
    console.print(
        f"{len(positions)} visual tokens; {device}, {dtype}; "
        + ("" if model is None else f"prefill: median of {repeats}, the three in turn. ")
        + f"Picture: {output}",
        markup=False,
        highlight=False,
    )
    if rates:
        console.print(
            f"Found: {example.measure} on {example.scenes:,} held-out scenes, with its 95% interval; this scene was "
            "picked because it agrees with it (bench/grounding/example.py).",
            soft_wrap=True,
            highlight=False,
        )
    if model is None:
        console.print(_TINY, soft_wrap=True, highlight=False)


SupportedModel = Annotated[str, typer.Argument(help="Checkpoint folder or hub id of a supported model.")]
Images = Annotated[Path, typer.Option(help="Folder of images.")]
Questions = Annotated[
    list[str] | None,
    typer.Option(
        help="Question about an image; put into the model's chat template unless it holds the model's image token. "
        "May be given several times: the images take turns. Default: Describe the image."
    ),
]
Samples = Annotated[int, typer.Option(min=1, help="Images at most; drawn if there are more.")]
_DESCRIBE = ["Describe the image."]


@app.command("calibrate")
def calibrate_layers(
    model: SupportedModel,
    images: Images,
    prompt: Questions = None,
    avg_tokens: Annotated[float | None, typer.Option(help="Budget of visual tokens per layer on average.")] = None,
    flops: Annotated[float | None, typer.Option(help="Budget of FLOPs of the prefill, such as 2.5e12.")] = None,
    kv_bytes: Annotated[float | None, typer.Option(help="Budget of bytes in the cache, text included.")] = None,
    decisions: Annotated[int, typer.Option(min=1, help="Decision layers.")] = 3,
    shape: Annotated[
        str, typer.Option(help=f"How the stages relate: {', '.join(SHAPES)}, or numbers such as 1,.5,.25.")
    ] = "uniform",
    action: Annotated[str, typer.Option(help="reroute or remove.")] = "reroute",
    samples: Samples = 100,
    share: Annotated[float, typer.Option(help="Share of visual tokens that runs while a layer is measured.")] = SHARE,
    early: Annotated[
        int | None, typer.Option(help="Layer from which on it runs. Default: at 3/32 of the depth.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the images that are drawn and of the intervals.")] = 0,
    output: Annotated[Path | None, typer.Option(help="Where to save the policy, such as policy.json.")] = None,
    report: Annotated[
        Path | None, typer.Option(help="Where to save the calibration, to solve for other budgets in Python.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Where to save a picture of the qualities.")] = None,
    resume: Annotated[
        Path | None, typer.Option(help="File that keeps what was measured; a repeated command goes on behind it.")
    ] = None,
    device: RunDevice = "cpu",
    dtype: RunType = "float32",
    as_json: AsJson = False,
) -> None:
    """Choose decision layers by how well each ranks on your images, and solve for a budget; no labels are needed.

    Example: reroute-kernels calibrate llava-hf/llava-1.5-7b-hf --images photos --avg-tokens 64 --output policy.json
    """
    console = _console()
    with _one_line_errors(), _demonstration(device, dtype) as demonstration:
        from . import image_prompts

        for name, path, formats in (
            ("output", output, (".json",)),
            ("report", report, (".json",)),
            ("plot", plot, None),
        ):
            if path is not None:
                _check_output(path, name, formats)
        drawn = image_prompts.images_of(images, samples, seed)
        budget = {"avg_tokens": avg_tokens, "flops": flops, "kv_bytes": kv_bytes, "dtype": dtype, "action": action}
        wanted = reading.parse_shape(shape)
        reading.decoder_of(demonstration.load_config(model), model)
        with console.status(f"loading {model}"):
            prompts = image_prompts.load_prompts(model, drawn, prompt or _DESCRIBE, device=device, dtype=dtype)
        check_plan(prompts.network, decisions, wanted, share=share, early=early, **budget)
        found = measure_layers(prompts.network, prompts, share=share, early=early, seed=seed, resume=resume)
        if report is not None:
            found.save(report)
        policy = found.policy(decisions, wanted, **budget)
        if output is not None:
            policy.save(output)
        if plot is not None:
            found.plot(policy).savefig(plot, dpi=110)
    if as_json:
        _print_json(writing.calibration_dict(found, policy))
        return
    console.print(tables.qualities_table(found, policy))
    console.print(tables.solution_table(policy, found.visual_tokens))
    for line in (
        found.summary(),
        writing.budget_text(policy.budget),
        f"Medians of the prompts: {found.visual_tokens:,} visual and {found.text_tokens:,} text tokens",
        f"In the command cost: {policy_text(policy)}",
        *(
            f"{name}: {path}"
            for name, path in (("Policy", output), ("Calibration", report), ("Picture", plot))
            if path is not None
        ),
    ):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


@app.command("loyalty")
def compare_with_itself(
    model: SupportedModel,
    images: Images,
    prompt: Questions = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            help="Preset (see the command presets), schedule, such as 3:0.25,7:0.25 or remove:3:0.25, or file, such as "
            "policy.json; may be given several times. Default: fastv and pdrop, removing and rerouting, at the "
            "published budgets."
        ),
    ] = None,
    keep: Annotated[
        list[float] | None,
        typer.Option(
            help="Share of the visual tokens that run in a layer on average, such as 0.25; the schedule of every "
            "policy is solved for it. May be given several times."
        ),
    ] = None,
    samples: Samples = 100,
    max_new_tokens: AnswerLength = 16,
    seed: Annotated[int, typer.Option(help="Of the images that are drawn and of the intervals.")] = 0,
    output: Annotated[Path | None, typer.Option(help="Where to save everything, image by image, as JSON.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Where to save a picture of the agreement.")] = None,
    device: RunDevice = "cpu",
    dtype: RunType = "float32",
    as_json: AsJson = False,
) -> None:
    """Compare a model under policies with itself without routing, on your images; no labels are needed.

    Example: reroute-kernels loyalty llava-hf/llava-1.5-7b-hf --images photos --keep 0.33 --keep 0.11 --plot loyalty.png

    For each policy: the divergence KL(unrouted || routed) of the next token's distribution, how often the likeliest
    token and the whole greedy answer are the same, each with its 95% interval, and what the policy costs.
    """
    console = _console()
    with _one_line_errors(), _demonstration(device, dtype) as demonstration:
        from ..loyalty import measure_loyalty
        from . import image_prompts
        from .loyalty import policies_of
        from .plot import draw_loyalty

        for name, path, formats in (("output", output, (".json",)), ("plot", plot, None)):
            if path is not None:
                _check_output(path, name, formats)
        drawn = image_prompts.images_of(images, samples, seed)
        policies = policies_of(demonstration.load_config(model), policy or [], keep or [])
        with console.status(f"loading {model}"):
            prompts = image_prompts.load_prompts(model, drawn, prompt or _DESCRIBE, device=device, dtype=dtype)
        found = measure_loyalty(
            prompts.network, prompts, policies, max_new_tokens=max_new_tokens, seed=seed, dtype=dtype
        )
        told = found.to_dict() | {"images": [path.name for path in drawn]}
        if output is not None:
            output.write_text(json.dumps(told, indent=1) + "\n")
        if plot is not None:
            draw_loyalty(found).savefig(plot, dpi=110)
    if as_json:
        _print_json(told)
        return
    console.print(tables.loyalty_table(found))
    for line in (
        f"{found.model}: {found.prompts:,} prompts; medians: {found.visual_tokens:,} visual and {found.text_tokens:,} "
        f"text tokens; answers of at most {found.max_new_tokens} tokens",
        *(f"{name}: {path}" for name, path in (("Report", output), ("Picture", plot)) if path is not None),
    ):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


@app.command()
def view(
    image: Photo = None,
    prompt: Annotated[
        str | None,
        typer.Option(help="Question; put into the model's chat template unless it holds the model's image token."),
    ] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            help="Preset (see the command presets), schedule, such as 3:0.25,7:0.25 or remove:3:0.25, or file, such as "
            "policy.json; may be given twice. One: beside the same with the other action. Default: tier 192, or what "
            "fits the model.",
        ),
    ] = None,
    model: Checkpoint = None,
    truth: Annotated[
        str | None,
        typer.Option(
            metavar="BOX",
            help="True box, to be drawn: left,top,right,bottom as shares (0 to 1) of the picture that the model sees, "
            "after its processor cropped or resized the photo.",
        ),
    ] = None,
    output: Annotated[Path, typer.Option(help="Where to save the page.")] = Path("view.html"),
    png: Annotated[Path | None, typer.Option(help="Where to save a picture of the stages, too.")] = None,
    device: RunDevice = "cpu",
    dtype: RunType = "float32",
    max_new_tokens: AnswerLength = 32,
) -> None:
    """Show in one page of HTML which patches run, are deferred or are gone in every layer, under two policies.

    Example: reroute-kernels view --image photo.jpg --prompt "Where is the cup?" --policy remove:3:0.25,7:0.25
    """
    console = _console()
    with _demonstration(device, dtype) as demonstration:
        from . import view as viewing

        _check_output(output, "output", (".html",))
        if png is not None:
            _check_output(png, "png")
        example = demonstration.example() if model is None and image is None else None
        box = None if truth is None else viewing.parse_box(truth)
        photo = demonstration.open_image(example.image if example else image)
        if prompt is None:
            prompt = example.prompt if example else _question(image)
            box = example.truth if example and truth is None else box
        policies = policy or (example.policies if example else ())
        with console.status(f"loading {model or 'the tiny model'}"):
            subject = demonstration.load(model, photo, prompt, policies, chat=None, device=device, dtype=dtype)
        with console.status("running"):
            unrouted = viewing.unrouted_answer(subject, max_new_tokens=max_new_tokens)
            panes = viewing.compare(subject, max_new_tokens=max_new_tokens)
        name = model or demonstration.TINY_CHECKPOINT.name
        data = viewing.page_data(subject, panes, prompt, unrouted, name, box)
        output.write_text(viewing.page(data), encoding="utf-8")
        if png is not None:
            viewing.still(subject, panes, png, box)

    console.print(tables.panes_table(panes))
    pictures = "" if png is None else f" Picture: {png}"
    console.print(f"Page: {output}{pictures}", markup=False, highlight=False, soft_wrap=True)
    if model is None:
        console.print(_TINY, soft_wrap=True, highlight=False)


_TINY = (
    "This checkpoint knows shapes on two photos and nothing else (models/tiny_grounding/README.md), and is too small "
    "for its times to say anything about a real model, so that none are shown. Pass --model for one; the command cost "
    "counts what a policy saves."
)


def _question(image: Path | None) -> str:
    return "Where is the temple?" if image is None else "Describe the image."


@contextmanager
def _demonstration(device: str, dtype: str) -> Iterator[ModuleType]:
    """The module `cli.demo`, if it can run so; its errors are one line."""
    try:
        import torch

        from . import demo as demonstration
    except ModuleNotFoundError as error:
        _fail(f"the command needs {error.name}: {install_command(error)}")
    try:
        if dtype not in ("float32", "float16", "bfloat16"):
            raise demonstration.DemoError(f"dtype must be float32, float16 or bfloat16, got {dtype!r}")
        try:
            torch.empty(0, dtype=torch.int64, device=device)
        except (RuntimeError, AssertionError) as error:
            message = demonstration.first_line(error)
            raise demonstration.DemoError(f"device must be one of this machine's, got {device!r}: {message}") from None
        yield demonstration
    except ModuleNotFoundError as error:
        _fail(f"the command needs {error.name}: {install_command(error)}")
    except demonstration.DemoError as error:
        _fail(str(error))


def _check_output(path: Path, name: str, formats: tuple[str, ...] | None = None) -> None:
    from .plot import PICTURE_FORMATS, check_picture

    try:
        check_picture(path, name, formats or PICTURE_FORMATS)
    except ValueError as error:
        _fail(str(error))


@app.command("vllm-args")
def print_vllm_arguments(
    model: Annotated[
        str,
        typer.Argument(help="llava-1.5-7b, qwen2.5-vl-7b, or a checkpoint folder or hub id; only its config is read."),
    ],
    policy: Annotated[
        str,
        typer.Argument(
            help="Preset, such as reroute-fastv/192, schedule, such as 3:0.25,7:0.25 or remove:3:0.25, or file, such "
            "as policy.json."
        ),
    ],
    own_groups: Annotated[
        bool, typer.Option("--own-groups", help="Cache in the layers of each stage only the tokens that run there.")
    ] = False,
    max_model_len: Annotated[int, typer.Option(min=1, help="Tokens that a request may have, images included.")] = 4096,
    as_json: AsJson = False,
) -> None:
    """Print the arguments with which vllm serve routes a model; --json prints those of vllm.LLM.

    Example: reroute-kernels vllm-args llava-1.5-7b reroute-fastv/192
    """
    from ..vllm import engine_arguments, serve_arguments

    with _one_line_errors():
        architecture, settings = reading.vllm_settings(model, policy, own_groups)
        of_engine = engine_arguments(architecture, settings, max_model_len)
        given = serve_arguments(architecture, settings, max_model_len)
    if as_json:
        _print_json(of_engine)
    else:
        print(shlex.join(given))


@app.command("serve", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def start_server(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="A checkpoint folder or hub id.")],
    policy: Annotated[str, typer.Option(help="Preset, schedule or file, as in vllm-args.")],
    own_groups: Annotated[
        bool, typer.Option("--own-groups", help="Cache in the layers of each stage only the tokens that run there.")
    ] = False,
) -> None:
    """Start vllm serve so that it routes. All other options are those of vllm serve, and stand behind the model.

    Example: reroute-kernels serve llava-hf/llava-1.5-7b-hf --policy reroute-fastv/192 --max-model-len 4096 --port 8000
    """
    with _one_line_errors():
        if model.startswith("-"):
            raise ValueError(f"model must stand before the options of vllm serve, got {model!r}")
        if model in MODELS:
            raise ValueError(f"model must be a checkpoint folder or hub id, got {model!r}")
        _, settings = reading.vllm_settings(model, policy, own_groups)
        for each in context.args:
            name = each.partition("=")[0].partition(".")[0].replace("_", "-")
            # vLLM takes the start of a name, too.
            if name.startswith("--ad") and "--additional-config".startswith(name):
                raise ValueError(f"additional-config must not be given, which this command writes, got {each!r}")
    beside = Path(sys.executable).with_name("vllm")
    program = str(beside) if beside.exists() else shutil.which("vllm")
    if program is None:
        _fail('the command needs vllm: pip install "reroute-kernels[vllm]"')
    additional = json.dumps({"reroute": settings.as_dict()})
    os.execv(program, [program, "serve", model, *context.args, "--additional-config", additional])


@app.command("env")
def show_environment(as_json: AsJson = False) -> None:
    """Tell what is installed and supported, which backend runs where, and whether that routes a tiny model.

    Example: reroute-kernels env

    Exits with 1 and the reason if it does not. A small decision is made on every CUDA or ROCm device, or on the CPU
    if there are none, and held against the reference; then a tiny model of transformers is routed on the first of them.
    """
    from .environment import report

    raise typer.Exit(report(as_json))


@contextmanager
def _one_line_errors() -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        _fail(f"a command with these arguments needs {error.name}: {install_command(error)}")
    except (ValueError, OSError, NotImplementedError) as error:
        _fail(str(error))


def _print_json(value: object) -> None:
    print(json.dumps(value, indent=2))


def _console() -> Console:
    # Piped output has no terminal to fit into: wide enough for one line a row.
    console = Console()
    return console if console.is_terminal else Console(width=140)


def _fail(message: str) -> None:
    print(f"reroute-kernels: {message}", file=sys.stderr)
    raise typer.Exit(2)
