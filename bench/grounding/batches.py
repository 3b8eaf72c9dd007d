"""Batches of scenes to train on: each scene once, with several questions after it that do not see each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bench.grounding.llava_folder import EOS, MEAN, STD

from . import scenes
from .checkpoint import TOKEN_ID
from .scenes import KINDS, Question, Scene

VISUAL_TOKENS = scenes.GRID**2
PREFIX = 1 + VISUAL_TOKENS
"""The beginning-of-sequence token and the image."""
WIDTH = 111
"""Tokens of questions and answers after a scene, padding included."""


@dataclass
class Batch:
    """Scenes with questions. B scenes, S = 256 tokens, P answer tokens in all of them."""

    pixels: Tensor
    """`[B, 3, 192, 192]`, float32, normalised as the processor does it."""
    text: Tensor
    """`[B, 111]`: ids of questions and answers."""
    positions: Tensor
    """`[B, S]`: each question begins where the image ends."""
    mask: Tensor
    """`[B, 1, S, S]`, bool: causal, and no question sees another."""
    sources: tuple[Tensor, Tensor]
    """Rows and places of the tokens from which an answer's tokens are predicted, `[P]` each."""
    answers: Tensor
    """`[P]`: ids of the answers' tokens."""
    kinds: Tensor
    """`[P]`: the kind of question, as a place in `KINDS`."""
    objects: Tensor
    """`[B, 144]`: which object is at each visual token, -1 for none."""
    labels: Tensor
    """`[B, 8, 3]`: size, colour and shape of every object, -1 if there is none."""
    boxes: Tensor
    """`[B, 8, 4]`: as shares of the image's side."""
    night: Tensor
    """`[B]`, bool."""


def pixels_of(images: Sequence[np.ndarray]) -> Tensor:
    """`[B, 3, 192, 192]`, float32: the images as the processor normalises them."""
    stacked = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255
    return (stacked - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def choose_questions(scene: Scene, random: np.random.Generator, each: dict[str, int]) -> list[Question]:
    """Questions at random, as many of each kind as asked for; fewer if a scene has fewer."""
    chosen = []
    asked = scene.questions()
    for kind, most in each.items():
        of_kind = [question for question in asked if question.kind == kind]
        chosen += [of_kind[place] for place in random.permutation(len(of_kind))[:most]]
    return chosen


def make_batch(scenes_: Sequence[Scene], questions: Sequence[Sequence[Question]]) -> Batch:
    """Pack scenes with their questions."""
    texts, segments, positions, rows, places, answers, kinds = [], [], [], [], [], [], []
    for row, asked in enumerate(questions):
        text, segment, position = [], [], []
        for number, question in enumerate(asked, start=1):
            prompt = [TOKEN_ID[word] for word in question.text.split()]
            answer = [TOKEN_ID[word] for word in (*question.answer.split(), EOS)]
            first = PREFIX + len(text) + len(prompt) - 1
            rows += [row] * len(answer)
            places += range(first, first + len(answer))
            answers += answer
            kinds += [KINDS.index(question.kind)] * len(answer)
            text += [*prompt, *answer[:-1]]
            length = len(prompt) + len(answer) - 1
            segment += [number] * length
            position += range(PREFIX, PREFIX + length)
        texts.append(text)
        segments.append(segment)
        positions.append(position)
    text_ids = torch.tensor([text + [0] * (WIDTH - len(text)) for text in texts])
    segment_ids = torch.tensor([[0] * PREFIX + each + [-1] * (WIDTH - len(each)) for each in segments])
    position_ids = torch.tensor([[*range(PREFIX), *each, *[0] * (WIDTH - len(each))] for each in positions])
    earlier = torch.ones(PREFIX + WIDTH, PREFIX + WIDTH, dtype=torch.bool).tril()
    together = (segment_ids[:, None, :] == 0) | (segment_ids[:, None, :] == segment_ids[:, :, None])

    objects = torch.full((len(scenes_), VISUAL_TOKENS), -1)
    labels = torch.full((len(scenes_), scenes.MOST_OBJECTS, 3), -1)
    boxes = torch.zeros(len(scenes_), scenes.MOST_OBJECTS, 4)
    sizes, colours = tuple(scenes.SIDES), tuple(scenes.COLOURS)
    for row, scene in enumerate(scenes_):
        for number, each in enumerate(scene.objects):
            objects[row, each.tokens()] = number
            labels[row, number] = torch.tensor(
                [sizes.index(each.size), colours.index(each.colour), scenes.SHAPES.index(each.shape)]
            )
            boxes[row, number] = torch.tensor(each.box) / scenes.SIDE
    return Batch(
        pixels_of([scene.image for scene in scenes_]),
        text_ids,
        position_ids,
        (together & earlier)[:, None],
        (torch.tensor(rows), torch.tensor(places)),
        torch.tensor(answers),
        torch.tensor(kinds),
        objects,
        labels,
        boxes,
        torch.tensor([scene.night for scene in scenes_]),
    )
