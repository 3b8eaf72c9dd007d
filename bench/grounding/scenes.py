"""Scenes to ground in: shapes over crops of photos, and questions about them.

A scene has 1 to 8 objects that do not overlap. Each has a size, a colour and a shape, and no two in a scene agree in
all three, though most share one or two with another. The backgrounds are crops of the two photos that ship with
scikit-learn: training takes them from the left two thirds, held-out scenes from the right third.

The same seed gives the same scenes.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

SIDE = 192
"""Pixels of an image, both ways."""
PATCH = 16
GRID = SIDE // PATCH
"""Rows and columns of visual tokens: one token a patch."""
MOST_OBJECTS = 8

SIDES = {"small": (26, 34), "large": (44, 56)}
COLOURS = {
    "red": (225, 35, 40),
    "green": (30, 185, 60),
    "blue": (40, 80, 235),
    "yellow": (250, 220, 40),
    "purple": (170, 50, 200),
    "white": (245, 245, 245),
}
SHAPES = ("circle", "square", "triangle", "ring", "cross", "star")

KINDS = ("box", "neighbour", "corner", "count", "light")
"""Kinds of questions: the first three need grounding, "neighbour" and "corner" in two hops; the last two need none."""
STRAIGHT = {"left of": 180, "right of": 0, "above": 90, "below": 270}
DIAGONAL = {"top right": 45, "top left": 135, "bottom left": 225, "bottom right": 315}
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight")
COORDINATES = tuple(f"{step / 50:.2f}" for step in range(51))
"""Words for coordinates, as shares of the image's side: the normalised form of LLaVA models, in steps of 0.02."""

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Object:
    """One shape in a scene."""

    size: str
    colour: str
    shape: str
    box: tuple[int, int, int, int]
    """Left, top, right, bottom in pixels."""

    @property
    def name(self) -> str:
        return f"{self.size} {self.colour} {self.shape}"

    @property
    def centre(self) -> tuple[float, float]:
        left, top, right, bottom = self.box
        return (left + right) / 2, (top + bottom) / 2

    def tokens(self, share: float = 0.25) -> list[int]:
        """The visual tokens of which the object's box covers at least a share."""
        left, top, right, bottom = self.box
        starts = np.arange(GRID) * PATCH
        across = np.clip(np.minimum(starts + PATCH, right) - np.maximum(starts, left), 0, None)
        down = np.clip(np.minimum(starts + PATCH, bottom) - np.maximum(starts, top), 0, None)
        return np.flatnonzero(np.outer(down, across).ravel() >= share * PATCH**2).tolist()


@dataclass(frozen=True)
class Question:
    """A question about a scene."""

    kind: str
    text: str
    answer: str
    target: Object | None = None
    """The object asked for, if one is."""
    anchor: Object | None = None
    """The object from which it is found, if there are two hops."""


@dataclass(frozen=True)
class Scene:
    """An image and the objects in it."""

    image: np.ndarray
    """`[192, 192, 3]`, uint8."""
    objects: tuple[Object, ...]
    night: bool

    def questions(self) -> list[Question]:
        """Every question that has one answer."""
        asked = [Question("box", f"box of the {each.name}", box_words(each.box), each) for each in self.objects]
        for anchor in self.objects:
            for relation, degrees in STRAIGHT.items():
                if (found := self._towards(anchor, degrees)) is not None:
                    answer = f"{found.colour} {found.shape}"
                    asked.append(Question("neighbour", f"what is {relation} the {anchor.name}", answer, found, anchor))
            for relation, degrees in DIAGONAL.items():
                if (found := self._towards(anchor, degrees)) is not None:
                    text = f"what colour is the object at the {relation} of the {anchor.name}"
                    asked.append(Question("corner", text, found.colour, found, anchor))
        asked.append(Question("count", "how many objects", NUMBERS[len(self.objects) - 1]))
        asked.append(Question("light", "is it day or night", "night" if self.night else "day"))
        return asked

    def _towards(self, anchor: Object, degrees: float) -> Object | None:
        """The nearest object in a direction; None if another one could be meant."""
        candidates = []
        for other in self.objects:
            if other is not anchor:
                x, y = (there - here for there, here in zip(other.centre, anchor.centre, strict=True))
                off = abs((math.degrees(math.atan2(-y, x)) - degrees + 180) % 360 - 180)
                candidates.append((math.hypot(x, y), off, other))
        inside = [each for each in candidates if each[1] <= 17.5]
        if not inside:
            return None
        distance, _, found = min(inside, key=lambda each: each[0])
        rivals = [each for each in candidates if each[2] is not found and each[1] <= 27.5]
        return None if any(rival[0] < 1.25 * distance for rival in rivals) else found


def box_words(box: Box) -> str:
    """The words that stand for a box in pixels."""
    return " ".join(COORDINATES[round(edge / SIDE * 50)] for edge in box)


def read_box(answer: str) -> Box | None:
    """The box in pixels that an answer stands for; None for an answer that is no box."""
    words = answer.split()
    if len(words) != 4 or any(word not in COORDINATES for word in words):
        return None
    left, top, right, bottom = (float(word) * SIDE for word in words)
    return (left, top, right, bottom) if left < right and top < bottom else None


def make_scene(random: np.random.Generator, objects: int, *, held_out: bool = False) -> Scene:
    """A scene with the given number of objects; if `held_out` is set, training has not seen its photo crop."""
    night = bool(random.random() < 0.5)
    image = _background(random, held_out, night)
    placed: list[Object] = []
    while len(placed) < objects:
        placed = []
        for _ in range(objects):
            size, colour, shape = _draw_name(random, placed)
            for _ in range(30):
                side = int(random.integers(*SIDES[size], endpoint=True))
                left, top = (int(each) for each in random.integers(1, SIDE - side, size=2))
                box = (left, top, left + side, top + side)
                if all(_apart(box, other.box) for other in placed):
                    placed.append(Object(size, colour, shape, box))
                    break
            else:
                break
    for each in placed:
        left, top, right, bottom = each.box
        mask = _sprite(each.shape, right - left)[..., None]
        colour = np.clip(np.array(COLOURS[each.colour]) + random.integers(-15, 16, size=3), 0, 255)
        image[top:bottom, left:right] = image[top:bottom, left:right] * (1 - mask) + colour * mask
    return Scene(image.round().astype(np.uint8), tuple(placed), night)


def held_out_scene(seed: int, number: int) -> Scene:
    """Scene `number` of the held-out ones of a seed; the numbers of objects take turns."""
    return make_scene(np.random.default_rng([seed, number]), 1 + number % MOST_OBJECTS, held_out=True)


def _draw_name(random: np.random.Generator, placed: list[Object]) -> tuple[str, str, str]:
    """Size, colour and shape of the next object: most share one or two of them with an earlier object."""
    taken = {(each.size, each.colour, each.shape) for each in placed}
    while True:
        name = [choices[random.integers(len(choices))] for choices in (tuple(SIDES), tuple(COLOURS), SHAPES)]
        if placed and random.random() < 0.75:
            like = placed[random.integers(len(placed))]
            shared = random.permutation(3)[: random.integers(1, 3)]
            for which in shared:
                name[which] = (like.size, like.colour, like.shape)[which]
        if tuple(name) not in taken:
            return name[0], name[1], name[2]


def _apart(box: Box, other: Box, gap: int = 3) -> bool:
    return box[2] + gap <= other[0] or other[2] + gap <= box[0] or box[3] + gap <= other[1] or other[3] + gap <= box[1]


def _background(random: np.random.Generator, held_out: bool, night: bool) -> np.ndarray:
    photo = _photos()[random.integers(2)]
    border = photo.width * 2 // 3
    first, last = (border, photo.width) if held_out else (0, border)
    side = int(random.integers(110, 210))
    left, top = int(random.integers(first, last - side + 1)), int(random.integers(0, photo.height - side + 1))
    crop = photo.resize((SIDE, SIDE), Image.Resampling.BILINEAR, (left, top, left + side, top + side))
    pixels = np.asarray(crop, dtype=np.float32)
    if random.random() < 0.5:
        pixels = pixels[:, ::-1]
    light = (0.30, 0.32, 0.45) if night else (0.85, 0.85, 0.80)
    return pixels * np.array(light, dtype=np.float32) * np.float32(random.uniform(0.85, 1.1))


@functools.cache
def _photos() -> list[Image.Image]:
    from sklearn.datasets import load_sample_images

    return [Image.fromarray(photo) for photo in load_sample_images().images]


@functools.cache
def _sprite(shape: str, side: int) -> np.ndarray:
    """How much of each pixel a shape covers, `[side, side]`."""
    fine = 4 * side
    mask = Image.new("L", (fine, fine))
    draw, last, middle = ImageDraw.Draw(mask), fine - 1, fine / 2
    if shape in ("circle", "ring"):
        draw.ellipse((0, 0, last, last), fill=255)
    if shape == "ring":
        inset = 0.27 * fine
        draw.ellipse((inset, inset, last - inset, last - inset), fill=0)
    if shape == "square":
        draw.rectangle((0, 0, last, last), fill=255)
    if shape == "triangle":
        draw.polygon([(middle, 0), (last, last), (0, last)], fill=255)
    if shape == "cross":
        near, far = 0.33 * fine, 0.67 * fine
        draw.rectangle((near, 0, far, last), fill=255)
        draw.rectangle((0, near, last, far), fill=255)
    if shape == "star":
        corners = []
        for corner in range(8):
            radius = middle if corner % 2 == 0 else 0.4 * middle
            angle = math.pi / 4 * corner
            corners.append((middle + radius * math.sin(angle), middle - radius * math.cos(angle)))
        draw.polygon(corners, fill=255)
    return np.asarray(mask.resize((side, side), Image.Resampling.BOX), dtype=np.float32) / 255
