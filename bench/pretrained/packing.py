"""Scenes to train the connector on: each image once, with a question for every object behind it.

The questions behind an image do not see each other, and each has the positions that it would have alone. So have the
visual tokens if some are left out, which makes a step several times cheaper.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bench.grounding.scenes import COLOURS, SHAPES, SIDE, SIDES, Object, Scene

from .chart import COLUMNS, LENGTHS, PARTS, ROWS, box_parts
from .convert import MEAN, STD

Encode = Callable[[str], list[int]]
"""Token ids of a text."""
BEGIN = "<|im_start|>"
"""The text before an image."""
NAMES = (*(tuple(f" {word}" for word in words) for words in (SIDES, COLOURS, SHAPES)), COLUMNS, ROWS, LENGTHS)
"""Words that tell of an object what it is called, where it is and how large, a group for each."""


def question_text(target: Object) -> str:
    """The text behind an image that asks for the box of an object."""
    return f" {target.name}"


def name_parts(target: Object) -> tuple[int, ...]:
    """Which words of each group in `NAMES` tell of an object."""
    names = (tuple(SIDES).index(target.size), tuple(COLOURS).index(target.colour), SHAPES.index(target.shape))
    return names + box_parts(target.box)[:3]


def pixels_of(images: Sequence[np.ndarray], side: int) -> Tensor:
    """(B, 3, side, side), float32: the images as the checkpoint's processor makes them."""
    resized = [Image.fromarray(each).resize((side, side), Image.Resampling.BICUBIC) for each in images]
    stacked = torch.from_numpy(np.stack([np.asarray(each) for each in resized])).permute(0, 3, 1, 2).float() / 255
    return (stacked - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def tokens_of(target: Object, grid: int, share: float = 0.25) -> list[int]:
    """The visual tokens, of `grid` rows and columns, of which the object's box covers at least a share."""
    starts, field = np.arange(grid) * SIDE / grid, SIDE / grid
    left, top, right, bottom = target.box
    across = np.clip(np.minimum(starts + field, right) - np.maximum(starts, left), 0, None)
    down = np.clip(np.minimum(starts + field, bottom) - np.maximum(starts, top), 0, None)
    return np.flatnonzero(np.outer(down, across).ravel() >= share * field**2).tolist()


SPARE = 16
"""Visual tokens beside objects that stay at least where others are left out."""


def kept_tokens(scenes: Sequence[Scene], grid: int, random: np.random.Generator) -> Tensor:
    """(B, K), ascending: all visual tokens on objects, and others at random, as many in all for each scene."""
    on_objects = [sorted({each for target in scene.objects for each in tokens_of(target, grid)}) for scene in scenes]
    count = min(max(map(len, on_objects)) + SPARE, grid**2)
    kept = []
    for on_object in on_objects:
        others = np.setdiff1d(np.arange(grid**2), on_object)
        chosen = random.choice(others, count - len(on_object), replace=False)
        kept.append(sorted([*on_object, *chosen.tolist()]))
    return torch.tensor(kept)


@dataclass
class Packed:
    """Scenes with questions: B scenes, N visual tokens of which K are kept, T text tokens at most, Q questions."""

    pixels: Tensor
    """(B, 3, side, side) float32."""
    names: Tensor
    """(B, N, 6): the words of `NAMES` that tell of the object at a visual token, -1 where there is none."""
    kept: Tensor
    """(B, K), ascending: the visual tokens that stand before the text."""
    text: Tensor
    """(B, T): ids of questions and answers."""
    positions: Tensor
    """(B, T)."""
    mask: Tensor
    """(B, T, 1 + K + T), bool: the tokens that a text token sees."""
    sources: Tensor
    """(Q, 4): places in the flat text, B * T long, from which the tokens of an answer are predicted."""
    answers: Tensor
    """(Q, 4): which of `PARTS` are right."""

    def to(self, device: torch.device) -> Packed:
        return Packed(**{each.name: getattr(self, each.name).to(device) for each in fields(self)})


def pack(scenes: Sequence[Scene], encode: Encode, side: int, grid: int, kept: Tensor | None = None) -> Packed:
    """Pack scenes with a question for each of their objects.

    Args:
        scenes: B of them.
        encode: gives one token for each of `PARTS`.
        side: pixels along an edge of the image.
        grid: rows and columns of its visual tokens.
        kept: (B, K), ascending; without it all visual tokens are.
    """
    kept = torch.arange(grid**2).expand(len(scenes), -1) if kept is None else kept
    first = 1 + grid**2
    ids = [[encode(token)[0] for token in tokens] for tokens in PARTS]
    names = torch.full((len(scenes), grid**2, len(NAMES)), -1)
    texts, segments, positions, sources, answers = [], [], [], [], []
    for row, scene in enumerate(scenes):
        text, segment, position = [], [], []
        for number, target in enumerate(scene.objects):
            names[row, tokens_of(target, grid)] = torch.tensor(name_parts(target))
            right = box_parts(target.box)
            asked = encode(question_text(target))
            sources.append([(row, len(text) + len(asked) - 1 + place) for place in range(len(right))])
            answers.append(right)
            asked = [*asked, *(tokens[part] for tokens, part in zip(ids[:-1], right[:-1], strict=True))]
            text += asked
            segment += [number] * len(asked)
            position += range(first, first + len(asked))
        texts.append(text)
        segments.append(segment)
        positions.append(position)
    longest = max(map(len, texts))

    def padded(rows: list[list[int]], value: int) -> Tensor:
        return torch.tensor([row + [value] * (longest - len(row)) for row in rows])

    of_question = padded(segments, -1)
    earlier = torch.ones(longest, longest, dtype=torch.bool).tril()
    together = (of_question[:, :, None] == of_question[:, None, :]) & earlier
    images_seen = torch.ones(len(scenes), longest, 1 + kept.shape[1], dtype=torch.bool)
    return Packed(
        pixels_of([scene.image for scene in scenes], side),
        names,
        kept,
        padded(texts, 0),
        padded(positions, first),
        torch.cat([images_seen, together], -1),
        torch.tensor([[row * longest + place for row, place in each] for each in sources]),
        torch.tensor(answers),
    )
