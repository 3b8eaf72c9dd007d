"""One prompt through one model three times: unrouted, with tokens removed, and rerouted.

`compare` runs it; commands.py prints and saves the results.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path

import torch
from torch import Tensor, nn

from reroute_kernels import models
from reroute_kernels.models import ADAPTERS, apply
from reroute_kernels.models.adapter import cache_of, visual_token_ids

from ..boxes import UNITS, Box, overlap, read_box
from ..cost import average_visual_tokens
from ..notation import parse_policy, policy_text
from ..policy import Policy
from ..policy_file import names_file
from ..presets import ALL_METHODS, model_of, suggested
from ..reducers import ReducerLike, VisionFeatures
from ..trace import Trace
from .arguments import first_line

TINY_CHECKPOINT = Path(models.__file__).with_name("tiny_grounding")
"""A LLaVA of 16 narrow layers and 144 visual tokens, trained to find shapes on photos; bench/grounding/ made it."""


class DemoError(Exception):
    """Something that the user asked for cannot be done; the message is one line."""


@dataclass(frozen=True)
class Example:
    """A scene that ships with the tiny checkpoint, and the measured rates of the two policies that it shows."""

    image: Path
    prompt: str
    truth: Box
    policies: tuple[str, str]
    """Policies that remove and that reroute, as `notation.parse_policy` takes them."""
    measure: str
    """The measure of `rates`."""
    scenes: int
    """How many held-out scenes these were measured on."""
    rates: dict[str, tuple[float, float, float]]
    """By the names of runs: the share of boxes found, and its 95% interval."""


def example() -> Example:
    """The scene that `bench.grounding.example` picked."""
    known = json.loads(TINY_CHECKPOINT.joinpath("example.json").read_text())
    return Example(
        TINY_CHECKPOINT / "example.png",
        known["prompt"],
        tuple(known["truth"]),
        (known["policies"]["remove"], known["policies"]["reroute"]),
        known["measure"],
        known["scenes"],
        {name: tuple(rate) for name, rate in known["rates"].items()},
    )


@dataclass
class Subject:
    """A loaded model with one prompt for it."""

    model: nn.Module
    processor: object
    inputs: dict[str, Tensor]
    policies: tuple[Policy, Policy]
    """The two policies given, or those that `remove` and `reroute` follow."""
    names: tuple[str, str]
    """Names of the policies."""
    picture: object
    """The part of the photo that the model sees, as a PIL image."""
    grid: tuple[int, int]
    """Rows and columns of visual tokens over the picture."""

    def visual_positions(self) -> list[int]:
        """Where the visual tokens stand in the prompt."""
        ids = torch.tensor(visual_token_ids(self.model.config), device=self.model.device)
        return torch.isin(self.inputs["input_ids"][0], ids).nonzero().flatten().tolist()


@dataclass
class Run:
    """Result of one way of running the prompt."""

    name: str
    policy: Policy | None
    answer: str = ""
    cached_tokens: int = 0
    """Keys cached by the prefill, summed over the layers."""
    kv_bytes: int = 0
    average_visual_tokens: float = 0.0
    """Visual tokens that run in a layer, averaged over the layers."""
    prefill_ms: float = 0.0
    """Median of several prefills."""
    trace: Trace | None = None
    box: Box | None = None
    """The box found in the answer."""

    def told(self, truth: Box | None) -> str:
        """Name, answer and, if the true box is known, the overlap with it."""
        found = "" if truth is None else f" (IoU {self.overlap(truth):.2f})" if self.box else " (no box)"
        return f"{self.name}: {self.answer or 'no answer'}{found}"

    def overlap(self, truth: Box) -> float:
        """Intersection over union of the answer's box with the true one."""
        return overlap(self.box, truth) if self.box else 0.0


def parse_policies(texts: Sequence[str], config) -> tuple[tuple[str, Policy], ...]:
    """The two policies, with names, that `--policy` arguments stand for.

    Args:
        texts: two policies as `notation.parse_policy` takes them. If there is one, the other action is shown beside it:
            by its published counterpart, or else on the same schedule. None: the default and its counterpart.
        config: of the model.
    """
    if len(texts) > 2:
        raise DemoError(f"policy must be given once or twice, got {len(texts)}: {' '.join(texts)}")
    try:
        if len(texts) == 2:
            return tuple((text, parse_policy(text, config)) for text in texts)
        (text,) = texts or (suggested(config),)
        policy = parse_policy(text, config)
    except (ValueError, TypeError, OSError) as error:
        raise DemoError(first_line(error)) from None
    if names_file(text):
        return _with_other_action(text, policy)
    if ":" in text:
        return tuple((policy_text(each), each) for each in _with_removal(policy))
    known = model_of(config)
    *_, method, tier = text.split("/")
    baseline = method.removeprefix("reroute-").removesuffix("-stagewise")
    pair = [baseline, f"reroute-{baseline}"]
    if not set(pair) <= set(ALL_METHODS):
        return _with_other_action(text, policy)
    prefix = "" if known is None else f"{known.name}/"
    return tuple((f"{prefix}{each}/{tier}", parse_policy(f"{each}/{tier}", config)) for each in pair)


def _with_other_action(text: str, policy: Policy) -> tuple[tuple[str, Policy], ...]:
    """A policy and the same with the other action, with names."""
    return tuple(
        (text if each.action == policy.action else f"{text}, but {each.action}", each) for each in _with_removal(policy)
    )


def _with_removal(policy: Policy) -> tuple[Policy, Policy]:
    """The same under `remove`, and under the policy's own action, or `reroute` if that is `remove`."""
    other = "reroute" if policy.action == "remove" else policy.action
    return replace(policy, action="remove", align=None), replace(policy, action=other, recycle=0)


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


def load(
    model: str | None, image, prompt: str, policies: Sequence[str], *, chat: bool | None, device: str, dtype: str
) -> Subject:
    """Load a checkpoint by the ordinary transformers path and process the prompt for it.

    Args:
        model: checkpoint folder or hub id; None for the tiny checkpoint.
        image: the photo, as a PIL image.
        prompt: text with the model's image token once.
        policies: as `parse_policies` takes them.
        chat: put the prompt into the model's chat template, which adds the image token; None: if it lacks the token.
        device, dtype: the device and the precision to run in.
    """
    source = str(TINY_CHECKPOINT if model is None else model)
    config = load_config(source)
    names, policies = zip(*parse_policies(policies, config), strict=True)
    # The weights come last: they take longest, and nothing that is wrong with the prompt needs them.
    processor = load_processor(source)
    prompt = full_prompt(prompt, processor, source, chat)
    try:
        inputs = processor(images=image, text=prompt, return_tensors="pt")
    except Exception as error:
        raise DemoError(f"model {source} could not be loaded: {first_line(error)}") from None
    network = load_network(source, device, dtype)
    inputs = inputs.to(device)
    picture, grid = seen_picture(network.config, processor, inputs, image)
    subject = Subject(network, processor, dict(inputs), policies, names, picture, grid)
    if (tokens := len(subject.visual_positions())) != grid[0] * grid[1]:
        raise DemoError(
            f"model must see the image as one grid of visual tokens, got {source}, which makes {tokens} of "
            f"{grid[0]} x {grid[1]} patches"
        )
    return subject


def load_network(source: str, device: str, dtype: str) -> nn.Module:
    """The model of a checkpoint, in evaluation mode."""
    from transformers import AutoModelForImageTextToText
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        network = AutoModelForImageTextToText.from_pretrained(source, dtype=getattr(torch, dtype), use_safetensors=True)
        return network.to(device).eval()
    except Exception as error:
        raise DemoError(f"model {source} could not be loaded: {first_line(error)}") from None


def load_config(source: str):
    """The configuration of a checkpoint of a supported type."""
    from transformers import AutoConfig

    accepted = f"a checkpoint folder or hub id of a supported type ({', '.join(ADAPTERS)})"
    try:
        config = AutoConfig.from_pretrained(source)
    except Exception as error:
        raise DemoError(f"model must be {accepted}, got {source}: {first_line(error)}") from None
    if config.model_type not in ADAPTERS:
        raise DemoError(f"model must be {accepted}, got {source} of type {config.model_type!r}")
    return config


def load_processor(source: str):
    """The processor of a checkpoint."""
    from transformers import AutoProcessor

    try:
        return AutoProcessor.from_pretrained(source)
    except Exception as error:
        raise DemoError(f"model {source} could not be loaded: {first_line(error)}") from None


def full_prompt(prompt: str, processor, source: str, chat: bool | None) -> str:
    """The prompt as the processor takes it, with the image token once."""
    if chat is None:
        chat = processor.image_token not in prompt
    if chat and not processor.chat_template:
        raise DemoError(
            f"prompt must hold the image token {processor.image_token!r} for {source}, which has no chat template, "
            f"got {prompt!r}"
        )
    if chat:
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    if prompt.count(processor.image_token) != 1:
        raise DemoError(
            f"prompt must hold the image token {processor.image_token!r} once (--chat adds it), got {prompt!r}"
        )
    return prompt


def seen_picture(config, processor, inputs, image):
    """The part of the photo that the model sees, and the rows and columns of visual tokens over it."""
    from PIL import Image

    if "image_grid_thw" in inputs:
        _, rows, columns = inputs["image_grid_thw"][0].tolist()
        merge = config.vision_config.spatial_merge_size
        patch = config.vision_config.patch_size
        return image.resize((columns * patch, rows * patch)), (rows // merge, columns // merge)
    pixels = inputs["pixel_values"][0].float().cpu()
    if pixels.ndim != 3:
        raise DemoError(
            f"model must see the image as one grid of visual tokens, got one that cuts it into {len(pixels)}"
        )
    settings = processor.image_processor
    mean, std = (pixels.new_tensor(values)[:, None, None] for values in (settings.image_mean, settings.image_std))
    pixels = ((pixels * std + mean).clamp(0, 1) * 255).round().to(torch.uint8)
    patch = config.vision_config.patch_size
    return Image.fromarray(pixels.permute(1, 2, 0).numpy()), (pixels.shape[1] // patch, pixels.shape[2] // patch)


def _names_of_runs(policies: Sequence[Policy]) -> list[str]:
    usual = ["remove", "reroute"]
    named = ["freeze" if each.action == "freeze" else name for each, name in zip(policies, usual, strict=True)]
    return named if len(set(named)) == len(named) else usual


def compare(subject: Subject, *, max_new_tokens: int, repeats: int) -> list[Run]:
    """Run the prompt unrouted, with removal and rerouted; prefills are timed in turn, so that all share the noise."""
    model, inputs = subject.model, subject.inputs
    runs = [Run("unrouted", None), *map(Run, _names_of_runs(subject.policies), subject.policies)]
    visual = len(subject.visual_positions())
    text = inputs["input_ids"].shape[1] - visual
    times: dict[str, list[float]] = {run.name: [] for run in runs}
    for repeat in range(repeats + 1):
        for run in runs:
            with routed(model, run.policy) as routing, torch.no_grad():
                if repeat == 0:  # warms up, and gives everything but the time
                    output = model(**inputs, use_cache=True, logits_to_keep=1)
                    measure_cache(run, cache_of(output), text)
                    if run.policy is not None and run.policy.action == "freeze":
                        layers = model.config.get_text_config().num_hidden_layers
                        run.average_visual_tokens = average_visual_tokens(run.policy, layers, visual)
                    run.answer = answer(subject, max_new_tokens)
                    run.box = answered_box(subject, run.answer)
                    run.trace = routing.trace if routing else None
                else:
                    times[run.name].append(
                        timed(lambda: model(**inputs, use_cache=True, logits_to_keep=1), model.device)
                    )
    return [replace(run, prefill_ms=statistics.median(times[run.name]) * 1e3) for run in runs]


def answer(subject: Subject, max_new_tokens: int) -> str:
    """The greedy answer to the prompt."""
    tokens = subject.model.generate(**subject.inputs, max_new_tokens=max_new_tokens, do_sample=False)
    answer = tokens[0, subject.inputs["input_ids"].shape[1] :]
    return subject.processor.decode(answer, skip_special_tokens=True).strip()


def answered_box(subject: Subject, said: str) -> Box | None:
    """The box in an answer, if it holds one and the model's unit is known."""
    model_type = subject.model.config.model_type
    return read_box(said, model_type, subject.picture.size) if model_type in UNITS else None


class Watched:
    """A reducer, with a record of the tokens whose features it made: means of several, in place of their own."""

    def __init__(self, reducer: ReducerLike):
        self.reducer = reducer
        self.merged: set[int] = set()
        """Places among the tokens of the last image."""

    def __repr__(self) -> str:
        return repr(self.reducer)

    def __getattr__(self, name: str):
        return getattr(self.reducer, name)

    def reduce(self, image: VisionFeatures) -> tuple[Tensor, Tensor]:
        index, features = self.reducer.reduce(image)
        places, made = index.flatten(), features.flatten(0, -2)
        is_made = (image.features.flatten(0, 1)[places] != made).any(dim=-1)
        self.merged = set(places[is_made].tolist())
        return index, features


class routed:
    """`apply` if there is a policy, nothing if there is none; a reducer is `Watched`."""

    def __init__(self, model: nn.Module, policy: Policy | None):
        self.routing = None
        try:
            if policy is not None and policy.reducer is not None:
                policy = replace(policy, reducer=Watched(policy.reducer))
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
    removed: set[int]
    """Tokens that are gone for good."""
    returned: set[int]
    """Tokens that run here and were deferred in the stage before."""
    freezes: bool = False
    """Whether the deferred ones are frozen: they are read in the stage."""
    merged: set[int] = field(default_factory=set)
    """Tokens that run here and hold the mean of several."""


def reduced_share(trace: Trace, visual_positions: list[int]) -> StageShare | None:
    """The visual tokens that a reducer left; None without one."""
    if trace.reduction is None:
        return None
    place = {position: number for number, position in enumerate(visual_positions)}
    left = {place[each] for each in trace.reduction.selected[0].tolist()}
    return StageShare(0, left, set(), set(place.values()) - left, set(), merged=left & _merged(trace))


def drawn_shares(trace: Trace, visual_positions: list[int]) -> list[StageShare]:
    """Tokens for pictures: those that a reducer left, if there is one, and those of each stage."""
    reduced = reduced_share(trace, visual_positions)
    return [*([] if reduced is None else [reduced]), *stage_shares(trace, visual_positions)]


def _merged(trace: Trace) -> set[int]:
    reducer = trace.policy.reducer
    return reducer.merged if isinstance(reducer, Watched) else set()


def stage_shares(trace: Trace, visual_positions: list[int]) -> list[StageShare]:
    """The visual tokens of each stage of a routed prefill, as places among the image's tokens."""
    place = {position: number for number, position in enumerate(visual_positions)}
    everything, shares = set(place.values()), []
    left = everything if trace.reduction is None else {place[each] for each in trace.reduction.selected[0].tolist()}
    before = left
    for stage in trace.stages:
        ran = {place[position] for position in stage.selected[0].tolist()}
        deferred = left - ran if trace.policy.action != "remove" else set()
        freezes = trace.policy.action == "freeze"
        removed, merged = everything - ran - deferred, ran & _merged(trace)
        shares.append(StageShare(stage.layer, ran, deferred, removed, ran - before, freezes, merged))
        before = ran
    return shares
