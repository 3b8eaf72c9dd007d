"""Requests of very different lengths, and the answers of the adapter for transformers."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageTextToText

import reroute_kernels as rk
from tests.models.prompts import IMAGE, VISION_END, VISION_START

STEPS = 10
SIZES = {"llava": [(192, 192)] * 2, "qwen": [(112, 168), (224, 84)]}

# Text tokens before, between and behind images.
SHAPES = {
    "text": (5,),
    "longer text": (83,),
    "image first": (0, 9),
    "image in the middle": (40, 21),
    "image last": (17, 0),
    "two images": (3, 4, 11),
    "two images side by side": (1, 0, 2),
    "image before long text": (2, 130),
}


@dataclass(frozen=True)
class Request:
    """Requests to vLLM: token ids with one placeholder for each image."""

    ids: list[int]
    images: list[Image.Image]

    def as_prompt(self) -> dict:
        features = {"multi_modal_data": {"image": self.images}} if self.images else {}
        return {"prompt_token_ids": self.ids, **features}


@dataclass(frozen=True)
class Answer:
    """Expanded prompt, generated tokens, their log-probabilities, and positions selected at every stage."""

    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]
    selected: list[list[int]] | None = field(default=None)


def requests(family: str) -> list[Request]:
    """One for each of `SHAPES`."""
    random = np.random.default_rng(7)
    made = []
    for texts in SHAPES.values():
        vocabulary = 90 if family == "llava" else 400
        parts = [(random.integers(5, vocabulary, count)).tolist() for count in texts]
        placeholder = [3] if family == "llava" else [VISION_START, IMAGE, VISION_END]
        ids = parts[0]
        for part in parts[1:]:
            ids = ids + placeholder + part
        images = [
            Image.fromarray(random.integers(0, 255, (height, width, 3), dtype=np.uint8))
            for width, height in SIZES["llava" if family == "llava" else "qwen"][: len(texts) - 1]
        ]
        made.append(Request(ids, images))
    return made


class Oracle:
    """The same checkpoint under transformers."""

    def __init__(self, family: str, folder: Path):
        self.family, self.folder = family, folder
        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()

    @cached_property
    def _pixels(self):
        return AutoImageProcessor.from_pretrained(self.folder, backend="pil")

    def _inputs(self, request: Request, prompt: list[int]) -> dict[str, torch.Tensor]:
        ids = torch.tensor([prompt])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if request.images:
            inputs |= self._pixels(request.images, return_tensors="pt")
        if self.family != "llava":
            inputs["mm_token_type_ids"] = (ids == IMAGE).long()
        return inputs

    @torch.no_grad()
    def answer(self, request: Request, prompt: list[int], policy: rk.Policy | None, steps: int = STEPS) -> Answer:
        """Greedy, to the expanded prompt."""
        inputs, selected = self._inputs(request, prompt), None
        options = {"max_new_tokens": steps, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        options |= {"return_dict_in_generate": True, "output_logits": True}
        if policy is None:
            output = self.model.generate(**inputs, **options)
        else:
            with rk.apply(self.model, policy) as routing:
                output = self.model.generate(**inputs, **options)
                if request.images:
                    selected = [stage.selected[0].tolist() for stage in routing.trace.stages]
        tokens = output.sequences[0, len(prompt) :].tolist()
        logprobs = [
            each.float().log_softmax(-1)[0, token].item() for each, token in zip(output.logits, tokens, strict=True)
        ]
        return Answer(prompt, tokens, logprobs, selected)
