"""The command line: `reroute-kernels` or `python -m reroute_kernels`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

try:
    import typer
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text
except ModuleNotFoundError as error:
    print(f"reroute-kernels: the command line needs {error.name}: pip install 'reroute-kernels[demo]'", file=sys.stderr)
    sys.exit(2)

from .cost import average_visual_tokens
from .presets import NUM_LAYERS, preset, presets

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def _reroute_kernels() -> None:
    """Route visual tokens through vision-language models."""


@app.command("presets")
def list_presets() -> None:
    """List the published configurations with what they really cost.

    Example: reroute-kernels presets
    """
    table = Table(Column("preset", no_wrap=True, min_width=42), "action", "layer: keep", "average of 576 tokens")
    for name in presets():
        policy = preset(*name)
        table.add_row(
            f"{name.model}/{name.method}/{name.avg_tokens}",
            policy.action,
            "  ".join(f"{stage.layer}: {stage.keep:g}" for stage in policy.schedule),
            f"{average_visual_tokens(policy, NUM_LAYERS[name.model], 576):.1f}",
        )
    console = _console()
    console.print(table)
    console.print("A -stagewise configuration is the same policy as the one without.", highlight=False)


@app.command()
def demo(
    model: Annotated[
        str | None,
        typer.Option(help="Checkpoint folder or hub id of a supported model. Default: a tiny one with random weights."),
    ] = None,
    image: Annotated[Path | None, typer.Option(help="Photo. Default: one that ships with scikit-learn.")] = None,
    prompt: Annotated[
        str | None, typer.Option(help="Prompt with the model's image token. Default: a question in its chat template.")
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option(help="Preset (see the command presets) or schedule, such as 3:0.25,7:0.25. Default: tier 192."),
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")] = False,
    output: Annotated[Path, typer.Option(help="Where to save the picture.")] = Path("demo.png"),
    device: Annotated[str, typer.Option(help="Device to run on.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "float32",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of the answers.")] = 16,
    repeats: Annotated[int, typer.Option(min=1, help="Prefills to time of each kind.")] = 7,
) -> None:
    """Run one prompt unrouted, with tokens removed, and rerouted; print a table and save a picture.

    Example: reroute-kernels demo --image photo.jpg --chat --prompt "Where is the cup?"
    """
    try:
        _demo(model, image, prompt, policy, chat, output, device, dtype, max_new_tokens, repeats)
    except ModuleNotFoundError as error:
        _fail(f"the demo needs {error.name}: pip install 'reroute-kernels[demo]'")


def _demo(model, image, prompt, policy, chat, output, device, dtype, max_new_tokens, repeats) -> None:
    import torch

    from .models import demo as demonstration

    console = _console()
    try:
        if dtype not in ("float32", "float16", "bfloat16"):
            raise demonstration.DemoError(f"dtype must be float32, float16 or bfloat16, got {dtype!r}")
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            message = demonstration.first_line(error)
            raise demonstration.DemoError(f"device must be one of this machine's, got {device!r}: {message}") from None
        demonstration.check_output(output)
        photo = demonstration.open_image(image)
        if prompt is None:
            chat, prompt = True, "Where is the temple?" if image is None else "Describe the image."
        subject = demonstration.load(model, photo, prompt, policy, chat=chat, device=device, dtype=dtype)
        with console.status("running"):
            runs = demonstration.compare(subject, max_new_tokens=max_new_tokens, repeats=repeats)
        ids = torch.tensor(demonstration.visual_token_ids(subject.model.config), device=subject.model.device)
        positions = torch.isin(subject.inputs["input_ids"][0], ids).nonzero().flatten().tolist()
        shares = demonstration.stage_shares(runs[-1].trace, positions)
        demonstration.draw(subject, shares, output)
    except demonstration.DemoError as error:
        _fail(str(error))

    table = Table(
        "",
        Column("answer", overflow="fold"),
        "visual tokens\nper layer",
        "cached tokens\n(all layers)",
        "KV bytes",
        "prefill ms",
    )
    for run in runs:
        table.add_row(
            run.name,
            Text(run.answer),
            f"{run.average_visual_tokens:.1f}",
            f"{run.cached_tokens:,}",
            f"{run.kv_bytes:,}",
            f"{run.prefill_ms:.1f}",
        )
    console.print(table)
    stages = Table(
        "reroute, from layer", "visual tokens that ran", "deferred", "picked back", "share of those that ran"
    )
    for share in shares:
        stages.add_row(
            str(share.layer),
            str(len(share.ran)),
            str(len(share.deferred)),
            str(len(share.returned)),
            f"{len(share.returned) / len(share.ran):.0%}",
        )
    console.print(stages)
    console.print(
        f"{len(positions)} visual tokens; {device}, {dtype}; prefill: median of {repeats}, the three in turn. "
        f"Picture: {output}",
        markup=False,
        highlight=False,
    )
    if model is None:
        console.print(
            "This checkpoint has random weights: its words mean nothing, and it is too small for its prefill times "
            "to say anything about a real model. Pass --model for one.",
            soft_wrap=True,
        )


def _console() -> Console:
    # Piped output has no terminal to fit into: wide enough for one line a row.
    console = Console()
    return console if console.is_terminal else Console(width=140)


def _fail(message: str) -> None:
    print(f"reroute-kernels: {message}", file=sys.stderr)
    raise typer.Exit(2)


def main() -> None:
    """Entry point of the console script."""
    app(prog_name="reroute-kernels")


if __name__ == "__main__":
    main()
