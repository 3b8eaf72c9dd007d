"""One prompt through one model three times: unrouted, with tokens removed, and rerouted.

The command line in `reroute_kernels/__main__.py` prints and saves what `compare` finds.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path

import torch
from torch import Tensor, nn

from ..notation import first_line, parse_preset, parse_schedule
from ..policy import Policy
from ..presets import Preset, preset
from ..routing import Trace
from . import ADAPTERS, apply
from .adapter import visual_token_ids

TINY_CHECKPOINT = Path(__file__).with_name("tiny_llava")
"""A LLaVA-1.5 of 32 narrow layers and 576 visual tokens with random weights."""

DEFAULT_PRESETS = {
    "llava": Preset("llava-1.5-7b", "reroute-fastv", 192),
    "qwen2_5_vl": Preset("qwen2.5-vl-7b", "reroute-fastv", 192),
}


class DemoError(Exception):
    """Something that the user asked for cannot be done; the message is one line."""


@dataclass
class Subject:
    """A loaded model with one prompt for it."""

    model: nn.Module
    processor: object
    inputs: dict[str, Tensor]
    policies: tuple[Policy, Policy]
    """What `remove` and `reroute` follow."""
    picture: object
    """The part of the photo that the model sees, as a PIL image."""
    grid: tuple[int, int]
    """Rows and columns of visual tokens over the picture."""


@dataclass
class Run:
    """What one way of running the prompt did."""

    name: str
    policy: Policy | None
    answer: str = ""
    cached_tokens: int = 0
    """Keys cached by the prefill, summed over the layers."""
    kv_bytes: int = 0
    average_visual_tokens: float = 0.0
    """Visual tokens cached by a layer, averaged over the layers."""
    prefill_ms: float = 0.0
    """Median of several prefills."""
    trace: Trace | None = None


def parse_policies(text: str | None, model_type: str) -> tuple[Policy, Policy]:
    """The `remove` and the `reroute` policy that a `--policy` argument stands for.

    Args:
        text: `model/method/avg_tokens` of a preset, whose published counterpart is the other policy; or a schedule
            such as `3:0.25,7:0.25`, which both follow. None: the default preset of the model type.
        model_type: `config.model_type`.
    """
    try:
        if text is not None and ":" in text:
            schedule = parse_schedule(text)
            return Policy(schedule, "remove"), Policy(schedule, "reroute")
        name = DEFAULT_PRESETS[model_type]
        if text is not None:
            name = parse_preset(text)
        baseline = name.method.removeprefix("reroute-").removesuffix("-stagewise")
        return preset(*name._replace(method=baseline)), preset(*name._replace(method=f"reroute-{baseline}"))
    except (ValueError, TypeError) as error:
        raise DemoError(
            f"policy must be a preset like llava-1.5-7b/reroute-fastv/192 or a schedule like 3:0.25,7:0.25, "
            f"got {text!r}: {error}"
        ) from None


def open_image(path: Path | None):
    """The photo as an RGB PIL image; without a path the one that ships with scikit-learn."""
    from PIL import Image, UnidentifiedImageError

    if path is None:
        try:
            path = Path(str(files("sklearn.datasets.images") / "china.jpg"))
        except ModuleNotFoundError:
            raise DemoError(
                "image must be given where scikit-learn, which ships the default photo, is missing"
            ) from None
    try:
        return Image.open(path).convert("RGB")
    except FileNotFoundError:
        raise DemoError(f"image must be an existing file, got {path}") from None
    except (UnidentifiedImageError, OSError) as error:
        raise DemoError(f"image must be readable, got {path}: {error}") from None


def load(model: str | None, image, prompt: str, policy: str | None, *, chat: bool, device: str, dtype: str) -> Subject:
    """Load a checkpoint by the ordinary transformers path and process the prompt for it.

    Args:
        model: checkpoint folder or hub id; None for the tiny checkpoint.
        image: the photo, as a PIL image.
        prompt: text with the model's image token once.
        policy: as `parse_policies` takes it.
        chat: put the prompt into the model's chat template, which adds the image token.
        device, dtype: where and in what precision to run.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    source = str(TINY_CHECKPOINT if model is None else model)
    accepted = f"a checkpoint folder or hub id of a supported type ({', '.join(ADAPTERS)})"
    try:
        config = AutoConfig.from_pretrained(source)
    except Exception as error:
        raise DemoError(f"model must be {accepted}, got {source}: {first_line(error)}") from None
    if config.model_type not in ADAPTERS:
        raise DemoError(f"model must be {accepted}, got {source} of type {config.model_type!r}")
    policies = parse_policies(policy, config.model_type)

    # The weights come last: they take longest, and nothing that is wrong with the prompt needs them.
    try:
        processor = AutoProcessor.from_pretrained(source)
    except Exception as error:
        raise DemoError(f"model {source} could not be loaded: {first_line(error)}") from None
    if chat:
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    if prompt.count(processor.image_token) != 1:
        raise DemoError(
            f"prompt must hold the image token {processor.image_token!r} once (--chat adds it), got {prompt!r}"
        )
    try:
        inputs = processor(images=image, text=prompt, return_tensors="pt")
        network = AutoModelForImageTextToText.from_pretrained(source, dtype=getattr(torch, dtype), use_safetensors=True)
        network = network.to(device).eval()
    except Exception as error:
        raise DemoError(f"model {source} could not be loaded: {first_line(error)}") from None
    inputs = inputs.to(device)
    picture, grid = seen_picture(network.config, processor, inputs, image)
    return Subject(network, processor, dict(inputs), policies, picture, grid)


def seen_picture(config, processor, inputs, image):
    """The part of the photo that the model sees, and the rows and columns of visual tokens over it."""
    from PIL import Image

    if "image_grid_thw" in inputs:
        _, rows, columns = inputs["image_grid_thw"][0].tolist()
        merge = config.vision_config.spatial_merge_size
        patch = config.vision_config.patch_size
        return image.resize((columns * patch, rows * patch)), (rows // merge, columns // merge)
    pixels = inputs["pixel_values"][0].float().cpu()
    settings = processor.image_processor
    mean, std = (torch.tensor(values)[:, None, None] for values in (settings.image_mean, settings.image_std))
    pixels = ((pixels * std + mean).clamp(0, 1) * 255).round().to(torch.uint8)
    patch = config.vision_config.patch_size
    return Image.fromarray(pixels.permute(1, 2, 0).numpy()), (pixels.shape[1] // patch, pixels.shape[2] // patch)


def compare(subject: Subject, *, max_new_tokens: int, repeats: int) -> list[Run]:
    """Run the prompt unrouted, with removal and rerouted; prefills are timed in turn, so that all share the noise."""
    model, inputs = subject.model, subject.inputs
    runs = [Run("unrouted", None), Run("remove", subject.policies[0]), Run("reroute", subject.policies[1])]
    visual = int(torch.isin(inputs["input_ids"], torch.tensor(visual_token_ids(model.config)).to(model.device)).sum())
    text = inputs["input_ids"].shape[1] - visual
    times: dict[str, list[float]] = {run.name: [] for run in runs}
    for repeat in range(repeats + 1):
        for run in runs:
            with routed(model, run.policy) as routing, torch.no_grad():
                if repeat == 0:  # warms up, and gives everything but the time
                    output = model(**inputs, use_cache=True, logits_to_keep=1)
                    measure_cache(run, output.past_key_values, text)
                    tokens = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
                    answer = tokens[0, inputs["input_ids"].shape[1] :]
                    run.answer = subject.processor.decode(answer, skip_special_tokens=True).strip()
                    run.trace = routing.trace if routing else None
                else:
                    times[run.name].append(
                        timed(lambda: model(**inputs, use_cache=True, logits_to_keep=1), model.device)
                    )
    return [replace(run, prefill_ms=statistics.median(times[run.name]) * 1e3) for run in runs]


class routed:
    """`apply` where there is a policy, nothing where there is none."""

    def __init__(self, model: nn.Module, policy: Policy | None):
        self.routing = None
        try:
            if policy is not None:
                self.routing = apply(model, policy)
        except (ValueError, NotImplementedError) as error:
            raise DemoError(str(error)) from None

    def __enter__(self):
        return self.routing

    def __exit__(self, *exception):
        if self.routing is not None:
            self.routing.remove()


def measure_cache(run: Run, cache, text: int) -> None:
    layers = cache.layers
    lengths = [layer.keys.shape[-2] for layer in layers]
    run.cached_tokens = sum(lengths)
    run.kv_bytes = sum(table.numel() * table.element_size() for layer in layers for table in (layer.keys, layer.values))
    run.average_visual_tokens = sum(length - text for length in lengths) / len(lengths)


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, the device's work included."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - start


@dataclass
class StageShare:
    """How the tokens of one stage were chosen."""

    layer: int
    ran: set[int]
    deferred: set[int]
    returned: set[int]
    """Tokens that run here and were deferred in the stage before."""


def stage_shares(trace: Trace, visual_positions: list[int]) -> list[StageShare]:
    """The visual tokens of each stage of a routed prefill, as places among the image's tokens."""
    place = {position: number for number, position in enumerate(visual_positions)}
    everything, shares, before = set(place.values()), [], set(place.values())
    for stage in trace.stages:
        ran = {place[position] for position in stage.selected[0].tolist()}
        shares.append(StageShare(stage.layer, ran, everything - ran, ran - before))
        before = ran
    return shares


def draw(subject: Subject, shares: list[StageShare], path: Path) -> None:
    """Save the photo once per stage: patches that ran, patches deferred, and patches that came back."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np
    from matplotlib.patches import Patch, Rectangle

    rows, columns = subject.grid
    photo = np.asarray(subject.picture)
    height, width = photo.shape[0] / rows, photo.shape[1] / columns
    size = (3.2 * (len(shares) + 1), 4.2)
    figure, axes = plt.subplots(1, len(shares) + 1, figsize=size, squeeze=False, layout="constrained")
    for axis, share in zip(axes[0], [None, *shares], strict=True):
        axis.set_axis_off()
        axis.imshow(photo)
        if share is None:
            axis.set_title("what the model sees", fontsize=10)
            continue
        veil = np.zeros((rows, columns, 4))
        veil.reshape(-1, 4)[sorted(share.deferred)] = (0.05, 0.05, 0.1, 0.78)
        axis.imshow(veil, extent=(0, photo.shape[1], photo.shape[0], 0), interpolation="nearest")
        for place in sorted(share.returned):
            corner = (place % columns * width, place // columns * height)
            axis.add_patch(Rectangle(corner, width, height, fill=False, edgecolor="#ff2bd6", linewidth=1.1))
        axis.set_title(f"from layer {share.layer}: {len(share.ran)} ran,\n{len(share.returned)} came back", fontsize=10)
    figure.legend(
        handles=[
            Patch(facecolor="white", edgecolor="black", label="ran"),
            Patch(facecolor="#22222a", label="deferred"),
            Patch(facecolor="white", edgecolor="#ff2bd6", label="came back after being deferred"),
        ],
        loc="outside lower center",
        ncols=3,
        frameon=False,
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)
