"""Boxes in the answers of every family."""

from __future__ import annotations

import pytest

from reroute_kernels.boxes import UNITS, box_text, read_box
from reroute_kernels.models import ADAPTERS

WIDE = (400, 200)
SHARES = (0.24, 0.3, 0.42, 0.5)
IN_PIXELS = "96, 60, 168, 100"
IN_THOUSANDTHS = "240, 300, 420, 500"


def families(units):
    return [model_type for model_type, theirs in UNITS.items() if theirs == units]


@pytest.mark.parametrize(
    "answer",
    [
        "[0.24, 0.30, 0.42, 0.50]",
        "[0.24,0.3,0.42,0.5]",
        "0.24 0.30 0.42 0.50",
        "0.24, 0.30, 0.42, 0.50.",
        "(0.24, 0.30), (0.42, 0.50)",
        "The box of object 2 is [0.24, 0.30, 0.42, 0.50], and that of 3 is [0.1, 0.1, 0.2, 0.2].",
        "at 0.24 0.30 0.42 0.50 in the picture",
        "[[0.24, 0.30, 0.42, 0.50], [0.1, 0.1, 0.2, 0.2]]",
    ],
)
@pytest.mark.parametrize("model_type", families("shares"))
def test_llava_writes_shares(model_type, answer):
    assert read_box(answer, model_type, WIDE) == SHARES


@pytest.mark.parametrize(
    "answer",
    [
        f"[{IN_PIXELS}]",
        f'```json\n[\n\t{{"bbox_2d": [{IN_PIXELS}], "label": "cup 1 2 3 4"}}\n]\n```',
        f'{{"bbox_2d": [{IN_PIXELS}]}}',
        "(96,60),(168,100)",
        "96 60 168 100",
        "[0.24, 0.30, 0.42, 0.50]",
    ],
)
def test_qwen2_5_vl_writes_pixels_of_the_resized_picture(answer):
    assert read_box(answer, "qwen2_5_vl", WIDE) == pytest.approx(SHARES)


@pytest.mark.parametrize(
    "answer",
    [
        f"[{IN_THOUSANDTHS}]",
        f'{{"bbox_2d": [{IN_THOUSANDTHS}], "label": "cup"}}',
        "<|object_ref_start|>the cup<|object_ref_end|><|box_start|>(240,300),(420,500)<|box_end|>",
        "the cup(240,300),(420,500)",
        f"<ref>cup</ref><box>[[{IN_THOUSANDTHS}]]</box>",
        "[0.24, 0.30, 0.42, 0.50]",
    ],
)
@pytest.mark.parametrize("model_type", families("thousandths"))
def test_other_qwens_write_thousandths(model_type, answer):
    assert read_box(answer, model_type, WIDE) == pytest.approx(SHARES)


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "a red cup",
        "0.24 0.30 0.42",
        "0.1 0.24 0.30 0.42 0.50",
        "[0.42, 0.30, 0.24, 0.50]",
        "[0.24, 0.50, 0.42, 0.50]",
        "[24, 30, 42, 50]",
        "1. cup 2. cup 3. cup 4. cup",
    ],
    ids=["empty", "words", "three numbers", "five numbers", "reversed", "no height", "not shares", "a list"],
)
def test_an_answer_without_a_box(answer):
    assert read_box(answer, "llava", WIDE) is None


def test_edges_beyond_the_picture_move_to_its_border():
    assert read_box("[-4, 60, 404, 100]", "qwen2_5_vl", WIDE) == (0, 0.3, 1, 0.5)
    assert read_box("[500, 60, 604, 100]", "qwen2_5_vl", WIDE) is None
    assert read_box("[0, 0, 1, 1]", "qwen3_vl", WIDE) == (0, 0, 1, 1)


def test_box_text_is_read_back():
    assert box_text(SHARES) == "[0.2400, 0.3000, 0.4200, 0.5000]"
    assert read_box(box_text(SHARES), "llava", WIDE) == SHARES


def test_errors_name_what_is_accepted():
    with pytest.raises(ValueError, match=r"model_type must be one whose boxes can be read \(glm4v.*got 'smolvlm'"):
        read_box("", "smolvlm", WIDE)
    with pytest.raises(ValueError, match=r"size must be a positive width and height, got \(0, 5\)"):
        read_box("", "llava", (0, 5))


def test_model_types_are_those_of_adapters():
    assert UNITS.keys() <= ADAPTERS.keys()
