"""Prompts about the images of a folder, for commands that measure on them."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from .demo import DemoError, full_prompt, load_network, load_processor, open_image

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


@dataclass(frozen=True)
class ImagePrompts:
    """Arguments of a model for prompts about images, made one after the other; the prompts take turns."""

    network: nn.Module
    processor: Any
    images: Sequence[Path]
    prompts: Sequence[str]

    def __len__(self) -> int:
        return len(self.images)

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        for number, path in enumerate(self.images):
            prompt = self.prompts[number % len(self.prompts)]
            inputs = self.processor(images=open_image(path), text=prompt, return_tensors="pt")
            yield dict(inputs.to(self.network.device, self.network.dtype))


def images_of(folder: Path, most: int, seed: int) -> list[Path]:
    """Images of a folder, drawn if there are more than asked for, in the order of their names.

    Raises:
        DemoError: it is no folder, or has no images.
    """
    if not folder.is_dir():
        raise DemoError(f"images must be a folder, got {folder}")
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if not found:
        raise DemoError(f"images must be a folder with images ({', '.join(SUFFIXES)}), got none in {folder}")
    return sorted(random.Random(seed).sample(found, min(most, len(found))))


def load_prompts(
    model: str, images: Sequence[Path], prompts: Sequence[str], *, device: str, dtype: str
) -> ImagePrompts:
    """Load a checkpoint with prompts about images.

    Args:
        model: checkpoint folder or hub id.
        images: their files.
        prompts: questions, put into the model's chat template unless they hold its image token.
        device, dtype: the device and the precision to run in.

    Raises:
        DemoError: something cannot be loaded, or a prompt has not one image token.
    """
    processor = load_processor(model)
    texts = [full_prompt(prompt, processor, model, None) for prompt in prompts]
    return ImagePrompts(load_network(model, device, dtype), processor, images, texts)
