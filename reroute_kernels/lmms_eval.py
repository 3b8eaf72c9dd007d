"""Routed models as model types of lmms-eval: `lmms-eval --model reroute_qwen2_5_vl --model_args ...,policy=...`.

lmms-eval finds `manifests` by its entry point. Each type is lmms-eval's own class for the family, which loads, prompts
and generates, under a policy.
"""

from __future__ import annotations

import os
from functools import cache, partial
from importlib import import_module

import torch
from loguru import logger
from torch import Tensor

from reroute_kernels.models import apply
from reroute_kernels.models.adapter import visual_token_ids

from .boxes import UNITS, box_text, read_box
from .notation import read_policy
from .policy import Policy
from .policy_file import names_file
from .presets import ALL_METHODS, model_of, preset
from .trace import Trace

WRAPPED = {
    "llava_hf": ("LlavaHf", ("llava", "llava_next", "llava_onevision")),
    "qwen2_5_vl": ("Qwen2_5_VL", ("qwen2_5_vl",)),
    "qwen3_vl": ("Qwen3_VL", ("qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe")),
}
"""lmms-eval's model types that have a routed one: the name of their class, and the `config.model_type`s they load."""

BOXES = ("answer", "shares")

_FORMS = (
    f"a method ({', '.join(ALL_METHODS)}) beside avg_tokens, a preset such as llava-1.5-7b/reroute-fastv/64 or "
    "flashvid/10%, a schedule such as 2:0.25+6:0.25 (remove:2:0.25+6:0.25 removes), a file such as policy.json, or none"
)


def manifests() -> list:
    """Entries for lmms-eval's registry: `reroute_llava_hf`, `reroute_qwen2_5_vl` and `reroute_qwen3_vl`."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return [
        ModelManifest(
            model_id=f"reroute_{wrapped}",
            simple_class_path=f"{__name__}.{name}Simple",
            chat_class_path=f"{__name__}.{name}Chat",
        )
        for wrapped, (name, _) in WRAPPED.items()
    ]


def policy_of(policy: object, avg_tokens: object, config) -> Policy | None:
    """The policy that the arguments of a model type stand for.

    Args:
        policy: a method of the presets; the name of a preset, `model/method/avg_tokens`; a schedule, whose stages are
            joined by `+` since lmms-eval splits arguments at commas; or the path of a policy file, without a comma for
            the same reason. None or `none` for no routing.
        avg_tokens: the tier of a method, or its percentage, such as `10%`; given with a method only.
        config: the checkpoint's configuration: a method is solved for models for which no preset is published.

    Raises:
        ValueError: an argument is none of these, or the budget of a method is too small for this checkpoint.
        OSError: the file cannot be read.
    """
    if policy is None or str(policy).lower() == "none":
        policy = None
    elif not isinstance(policy, str):
        raise ValueError(f"policy must be {_FORMS}; got {policy!r}")
    is_method = policy is not None and (policy in ALL_METHODS or not _is_for_read_policy(policy))
    if avg_tokens is not None and not is_method:
        raise ValueError(f"avg_tokens must be left out where policy is no method, got {avg_tokens!r} beside {policy!r}")
    if policy is None:
        return None
    if is_method:
        return _preset_of(policy, avg_tokens, config)
    try:
        return read_policy(policy, config)
    except ValueError as error:
        raise ValueError(f"policy must be {_FORMS}; got {policy!r}: {error}") from None


def _is_for_read_policy(text: str) -> bool:
    """Whether a text is a schedule, a preset with its tier, or a file."""
    return bool(set(text) & set(":/")) or names_file(text)


def _preset_of(method: str, avg_tokens: object, config) -> Policy:
    if method not in ALL_METHODS:
        raise ValueError(f"policy must be {_FORMS}; got {method!r}")
    published = model_of(config)
    return preset(config if published is None else published.name, method, avg_tokens)


def visual_tokens_by_layer(trace: Trace, layers: int) -> list[list[int]]:
    """How many visual tokens of each sample ran in each of the decoder's layers, in a routed prefill.

    Args:
        trace: of the prefill; reading it copies from the device.
        layers: decoder layers.
    """
    before = trace.visual_counts if trace.reduction is None else [len(each) for each in trace.reduction.selected]
    starts = [stage.layer for stage in trace.stages]
    counts = [before, *([len(each) for each in stage.selected] for stage in trace.stages)]
    stages = [sum(start <= layer for start in starts) for layer in range(layers)]
    return [[counts[stage][sample] for stage in stages] for sample in range(len(before))]


class _Stopped(BaseException):
    """A `generate` that failed; no `Exception`, since lmms-eval's LLaVA goes on with empty answers after those."""


class _WithImages:
    """A processor that is handed the images of the call before if a call brings none."""

    def __init__(self, processor):
        self._processor = processor
        self._images = None

    def __call__(self, *args, images=None, **kwargs):
        if images is not None:
            self._images = images
        return self._processor(*args, images=self._images, **kwargs)

    def __getattr__(self, name: str):
        return getattr(self._processor, name)


class RoutedLMM:
    """Mixin that adds routing to one of lmms-eval's model classes.

    Args:
        pretrained: checkpoint folder or hub id.
        policy, avg_tokens: as `policy_of` takes them; without a policy the model runs unrouted.
        boxes: `"answer"` leaves answers as the model wrote them; `"shares"` puts the box that an answer holds in its
            place, as shares of the picture's width and height: `[0.24, 0.3, 0.42, 0.5]`.
        arguments: of lmms-eval's class.

    Attributes:
        routing: the handle that `apply` returned, or None.
        prompts: how many prompts with images or videos were answered.
        average_visual_tokens: visual tokens that ran in a layer, averaged over layers and those prompts.

    Raises:
        ValueError: an argument is not accepted, or does not fit the checkpoint.
    """

    wrapped: str

    def __init__(self, pretrained: str, policy=None, avg_tokens=None, boxes: str = "answer", **arguments):
        from transformers import AutoConfig

        self.routing = None
        config = AutoConfig.from_pretrained(
            pretrained, revision=arguments.get("revision", "main"), trust_remote_code=False
        )
        self._check(pretrained, config, boxes, arguments)
        parsed = policy_of(policy, avg_tokens, config)
        if parsed is not None and not arguments.get("use_cache", True):
            raise ValueError(
                f"use_cache must be True where there is a policy, got {arguments['use_cache']!r}: without a cache "
                "every step is a new prefill, ranked by the newest token"
            )
        device = arguments.setdefault("device", "cuda" if torch.cuda.is_available() else "cpu")
        # lmms-eval's defaults are an empty device_map for LLaVA, which transformers refuses, and GPUs for Qwen.
        if int(os.environ.get("WORLD_SIZE", "1")) == 1 and (self.wrapped == "llava_hf" or device == "cpu"):
            arguments.setdefault("device_map", device)
        super().__init__(pretrained=pretrained, **arguments)
        self._visual_ids = torch.tensor(visual_token_ids(config), device="cpu")
        self._num_layers = config.get_text_config().num_hidden_layers
        self._boxes, self._sizes = boxes, []
        self.prompts, self._visual, self._ran = 0, 0, 0.0
        if parsed is not None:
            self.routing = apply(self.model, parsed)
        self.model.generate = partial(self._generate, self.model.generate)
        if boxes == "shares":
            tokenizer = (self._image_processor if self.wrapped == "llava_hf" else self.processor).tokenizer
            tokenizer.batch_decode = partial(self._decode, tokenizer.batch_decode)
        logger.info(
            f"{pretrained} runs {'unrouted' if parsed is None else f'{policy} (avg_tokens={avg_tokens}): {parsed}'}"
        )

    def _check(self, pretrained: str, config, boxes: object, arguments: dict) -> None:
        model_types = WRAPPED[self.wrapped][1]
        if config.model_type not in model_types:
            raise ValueError(
                f"pretrained must be of type {' or '.join(model_types)} for reroute_{self.wrapped}, got {pretrained} "
                f"of type {config.model_type!r}"
            )
        if arguments.get("trust_remote_code") or getattr(config, "auto_map", None):
            raise ValueError(
                "pretrained must be a checkpoint without code of its own, and trust_remote_code False, got "
                f"{pretrained} and {arguments.get('trust_remote_code', False)!r}"
            )
        if boxes not in BOXES:
            raise ValueError(f"boxes must be {' or '.join(BOXES)}, got {boxes!r}")

    @property
    def average_visual_tokens(self) -> float:
        return self._ran / self.prompts if self.prompts else 0.0

    def generate_until(self, requests: list) -> list:
        """The answers. An error in `generate` ends the run, also if lmms-eval's class would go on without an answer.

        Raises:
            RuntimeError: a prompt with an image was not routed although there is a policy.
        """
        try:
            answers = super().generate_until(requests)
        except _Stopped as stopped:
            raise stopped.__cause__ from None
        if self.prompts:
            logger.info(
                f"{self.prompts} prompts with images: {self._visual / self.prompts:.1f} visual tokens, of which "
                f"{self.average_visual_tokens:.2f} ran in a layer on average"
            )
        return answers

    def loglikelihood(self, requests: list) -> list:
        """As in lmms-eval's class, if it has this. Its labels tell where the answer begins; the token before it ranks.

        lmms-eval 0.7.3 counts the tokens of LLaVA's context without its images. Labels would begin inside of the
        images, and transformers refuses such calls by now. Here the images' tokens are counted.
        """
        if self.wrapped != "llava_hf":
            return super().loglikelihood(requests)
        processor, self._image_processor = self._image_processor, _WithImages(self._image_processor)
        try:
            return super().loglikelihood(requests)
        finally:
            self._image_processor = processor

    def clean(self) -> None:
        """Take the routing off the model, then clean up as lmms-eval does."""
        if self.routing is not None:
            self.routing.remove()
        super().clean()

    def _generate(self, generate, *args, **kwargs):
        before = None if self.routing is None else self.routing.trace
        try:
            output = generate(*args, **kwargs)
            self._count(kwargs["input_ids"], before)
            self._sizes = self._picture_sizes(kwargs) if self._boxes == "shares" else []
        except Exception as error:
            raise _Stopped from error
        return output

    def _count(self, input_ids: Tensor, before: Trace | None) -> None:
        visual = torch.isin(input_ids, self._visual_ids.to(input_ids.device)).sum(1).tolist()
        if not any(visual):
            return
        ran = [[count] for count in visual]
        if self.routing is not None:
            trace = self.routing.trace
            if trace is None or trace is before:
                raise RuntimeError(
                    f"generate must route a prompt with images by {self.routing.policy}, and it left no trace of that"
                )
            ran = visual_tokens_by_layer(trace, self._num_layers)[:: len(trace.visual_counts) // len(visual)]
        for all_of_them, counts in zip(visual, ran, strict=True):
            if all_of_them:
                self.prompts += 1
                self._visual += all_of_them
                self._ran += sum(counts) / len(counts)

    def _decode(self, decode, *args, **kwargs) -> list[str]:
        answers = decode(*args, **kwargs)
        if len(self._sizes) != len(answers):
            return answers
        model_type = self.config.model_type
        boxes = [size and read_box(answer, model_type, size) for answer, size in zip(answers, self._sizes, strict=True)]
        return [box_text(box) if box else answer for answer, box in zip(answers, boxes, strict=True)]

    def _picture_sizes(self, inputs: dict) -> list[tuple[int, int] | None]:
        """Width and height in pixels of each prompt's picture as the model sees it; None unless there is just one."""
        rows = len(inputs["input_ids"])
        if UNITS[self.config.model_type] != "pixels":
            return [(1, 1)] * rows
        sizes: list[tuple[int, int] | None] = [None] * rows
        vision, grids = self.config.vision_config, inputs.get("image_grid_thw")
        left = iter([] if grids is None else grids.tolist())
        counts = (inputs["input_ids"] == self.config.image_token_id).sum(1).tolist()
        for row, count in enumerate(counts):
            found = []
            while count > 0:
                frames, height, width = next(left)
                count -= frames * height * width // vision.spatial_merge_size**2
                found.append((width * vision.patch_size, height * vision.patch_size))
            if len(found) == 1:
                sizes[row] = found[0]
        return sizes


@cache
def __getattr__(name: str) -> type:
    # lmms-eval's classes import much, and the registry loads this module for every model, so classes are made on
    # request.
    for wrapped, (base, _) in WRAPPED.items():
        for flavour in ("simple", "chat"):
            if name == f"{base}{flavour.capitalize()}":
                parent = getattr(import_module(f"lmms_eval.models.{flavour}.{wrapped}"), base)
                doc = f"lmms-eval's {flavour} `{wrapped}` under a policy; `RoutedLMM` has its arguments."
                return type(name, (RoutedLMM, parent), {"wrapped": wrapped, "__module__": __name__, "__doc__": doc})
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
