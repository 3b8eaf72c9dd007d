"""Boxes as text of four tokens: the field of a chart in which the centre lies, and the box's width and height.

The chart has 26 columns, A to Z, and 26 rows, a to z. " C f45" is a box around the middle of column C and row f, four
fields wide and five high. What is learned first counts most: where a box is before how large it is. Columns, rows and
lengths are tokens of their own, so none has two meanings.
"""

from __future__ import annotations

import re
import string

from bench.grounding.scenes import SIDE, Box

COLUMNS = tuple(f" {letter}" for letter in string.ascii_uppercase)
ROWS = tuple(f" {letter}" for letter in string.ascii_lowercase)
LENGTHS = tuple("123456789")
FIELDS = len(COLUMNS)
PARTS = (COLUMNS, ROWS, LENGTHS, LENGTHS)
"""Tokens that may stand at each place of an answer."""
_BOX = re.compile(r" ([A-Z]) ([a-z])([1-9])([1-9])")


def box_parts(box: Box) -> tuple[int, int, int, int]:
    """Which of `PARTS` stand for a box in pixels."""
    left, top, right, bottom = (edge / SIDE * FIELDS for edge in box)
    fields = (min(int((low + high) / 2), FIELDS - 1) for low, high in ((left, right), (top, bottom)))
    lengths = (min(max(round(length), 1), len(LENGTHS)) - 1 for length in (right - left, bottom - top))
    return (*fields, *lengths)


def box_text(box: Box) -> str:
    """The text that stands for a box in pixels."""
    return "".join(tokens[part] for tokens, part in zip(PARTS, box_parts(box), strict=True))


def read_box(text: str) -> Box | None:
    """The box in pixels that a text stands for; None for a text that is no box."""
    found = _BOX.fullmatch(text)
    if found is None:
        return None
    across, down = (ord(found[place].lower()) - ord("a") + 0.5 for place in (1, 2))
    width, height = (int(found[place]) / 2 for place in (3, 4))
    edges = (across - width, down - height, across + width, down + height)
    return tuple(edge * SIDE / FIELDS for edge in edges)
