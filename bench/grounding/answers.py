"""Answers of the grounding model to questions about held-out scenes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import logging

from bench.grounding.llava_folder import IMAGE

from .checkpoint import FOLDER
from .scenes import MOST_OBJECTS, Question, Scene, held_out_scene

SEED = 1
"""Seed of the held-out scenes."""

# Which kind of question each scene is asked, in turn: half of them for a box.
_TURNS = ("box", "neighbour", "box", "corner", "box", "count", "box", "corner", "box", "light", "box", "neighbour")


@dataclass(frozen=True)
class Item:
    """One held-out scene and the question that is asked about it."""

    number: int
    scene: Scene
    question: Question


def held_out_items(count: int, *, seed: int = SEED) -> list[Item]:
    """The first held-out scenes, one question each: of the kind in turn, or for a box if a scene has none of these."""
    return [held_out_item(number, seed=seed) for number in range(count)]


def held_out_item(number: int, *, seed: int = SEED) -> Item:
    """Held-out scene `number` with its question."""
    scene = held_out_scene(seed, number)
    # Numbers of objects take turns, too: the kind of a scene's question must not depend on its number of objects.
    turn = (number + number // MOST_OBJECTS) % len(_TURNS)
    asked = scene.questions()
    of_kind = [each for each in asked if each.kind == _TURNS[turn]] or [each for each in asked if each.kind == "box"]
    random = np.random.default_rng([seed, number, 1])
    return Item(number, scene, of_kind[random.integers(len(of_kind))])


class Answerer:
    """The model with its processor, in float32 on a device.

    Args:
        folder: of the checkpoint.
        device: the device that runs it.
    """

    def __init__(self, folder: Path = FOLDER, device: str = "cpu"):
        logging.disable_progress_bar()
        self.processor = AutoProcessor.from_pretrained(folder)
        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
        self.model.to(device).eval()

    def inputs(self, items: Sequence[Item]) -> dict[str, Tensor]:
        """The prompts of items whose questions have equally many words, as `generate` takes them."""
        images = [Image.fromarray(item.scene.image) for item in items]
        texts = [f"{IMAGE} {item.question.text}" for item in items]
        return dict(self.processor(images=images, text=texts, return_tensors="pt").to(self.model.device))

    @torch.no_grad()
    def encoded(self, inputs: dict[str, Tensor]) -> dict[str, object]:
        """The same prompts with their images encoded, so that several policies need not encode them again."""
        inputs = dict(inputs)
        features = self.model.model.get_image_features(inputs.pop("pixel_values"), return_dict=True).pooler_output
        return inputs | {"mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=features)}}

    @torch.no_grad()
    def answer(self, inputs: dict[str, object]) -> list[str]:
        """The answers by greedy decoding, to the result of `inputs` or `encoded`."""
        tokens = self.model.generate(**inputs, max_new_tokens=5, do_sample=False)
        return self.processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def batches(items: Sequence[Item], size: int = 64) -> Iterator[list[int]]:
    """Places of the items, grouped by the number of words in their questions."""
    by_length: dict[int, list[int]] = {}
    for place, item in enumerate(items):
        by_length.setdefault(len(item.question.text.split()), []).append(place)
    for places in by_length.values():
        for first in range(0, len(places), size):
            yield places[first : first + size]
