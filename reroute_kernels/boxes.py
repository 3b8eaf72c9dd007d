"""Boxes in answers: every family of models writes them in units of its own."""

from __future__ import annotations

import re

Box = tuple[float, float, float, float]
"""Left, top, right, bottom."""

UNITS = {
    "glm4v": "thousandths",
    "glm4v_moe": "thousandths",
    "internvl": "thousandths",
    "llava": "shares",
    "llava_next": "shares",
    "llava_onevision": "shares",
    "qwen2_5_vl": "pixels",
    "qwen2_vl": "thousandths",
    "qwen3_5": "thousandths",
    "qwen3_5_moe": "thousandths",
    "qwen3_vl": "thousandths",
    "qwen3_vl_moe": "thousandths",
}
"""Unit in which a `config.model_type` gives the edges of a box: shares or thousandths of the picture's width and
height, or pixels of the picture that its processor has resized."""

_NUMBER = r"(-?\d+(?:\.\d+)?)"
_COMMA = r"\s*[\s,]\s*"
_PATTERNS = (
    # [l, t, r, b] and (l, t), (r, b), also with spaces only
    re.compile(rf"[\[(]\s*{_NUMBER}{_COMMA}{_NUMBER}(?:{_COMMA}|\s*\)\s*,?\s*\(\s*){_NUMBER}{_COMMA}{_NUMBER}\s*[\])]"),
    # four numbers without brackets, if there is no fifth beside them
    re.compile(rf"(?<![\w.,-])(?<!\d\s){_COMMA.join([_NUMBER] * 4)}(?![\w,]|\.\d|\s+-?\d)"),
)


def read_box(answer: str, model_type: str, size: tuple[int, int]) -> Box | None:
    """The first box that a model's answer holds.

    Args:
        answer: such as `[0.24, 0.3, 0.42, 0.5]`, `0.24 0.30 0.42 0.50`, `{"bbox_2d": [108, 64, 180, 220]}` or
            `(240,300),(420,500)`.
        model_type: `config.model_type` of the model that gave it, one of `UNITS`.
        size: width and height, in pixels, of the picture as the model sees it: after its processor has resized it.

    Returns:
        Left, top, right and bottom as shares, 0 to 1, of width and height, edges beyond the picture moved to its
        border; None if the answer holds no box, or one without area in the picture. Four numbers up to 1 are shares
        in every family, since no box is that small in pixels or thousandths.

    Raises:
        ValueError: the units of this model type are not known, or the size is not positive.
    """
    if model_type not in UNITS:
        raise ValueError(f"model_type must be one whose boxes can be read ({', '.join(UNITS)}), got {model_type!r}")
    width, height = size
    if not (width > 0 and height > 0):
        raise ValueError(f"size must be a positive width and height, got {size!r}")
    found = next(filter(None, (pattern.search(answer) for pattern in _PATTERNS)), None)
    if found is None:
        return None
    edges = [float(edge) for edge in found.groups()]
    across, down = {"shares": (1, 1), "thousandths": (1000, 1000), "pixels": (width, height)}[UNITS[model_type]]
    if all(edge <= 1 for edge in edges):
        across = down = 1
    left, top, right, bottom = (
        min(max(edge / whole, 0.0), 1.0) for edge, whole in zip(edges, (across, down) * 2, strict=True)
    )
    return (left, top, right, bottom) if left < right and top < bottom else None


def box_text(box: Box) -> str:
    """A box in brackets, as lmms-eval's tasks read it: `[0.24, 0.3, 0.42, 0.5]`, to four decimals."""
    return f"[{', '.join(f'{edge:.4f}' for edge in box)}]"


def overlap(one: Box, other: Box) -> float:
    """Intersection over union of two boxes in the same unit: left, top, right, bottom."""
    width, height = (min(one[2 + axis], other[2 + axis]) - max(one[axis], other[axis]) for axis in (0, 1))
    shared = max(width, 0.0) * max(height, 0.0)
    areas = ((right - left) * (bottom - top) for left, top, right, bottom in (one, other))
    return shared / (sum(areas) - shared) if shared else 0.0
