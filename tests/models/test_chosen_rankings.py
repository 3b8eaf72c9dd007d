"""Rankings without position, mixed and remembering ones on three families, against the slow way."""

from functools import partial

import pytest

from reroute_kernels.rankings import AllText, LastQuery, Mixed, Remembered, TextRaters
from tests.models.families import load
from tests.models.test_ways import compare, compare_batch, generate, one_image, text_only, turns, two_images

RANKINGS = [
    LastQuery(rotary=False),
    AllText(rotary=False),
    TextRaters("this"),
    Mixed(LastQuery(rotary=False), uniform=0.3),
    Remembered(LastQuery()),
    Mixed(Remembered(AllText(query_reduction="max"), decay=0.8)),
]


@pytest.fixture(params=["llava", "qwen2_5_vl", "qwen3_vl"])
def case(request):
    return load(request.param)


@pytest.mark.everyday(5)
@pytest.mark.parametrize("ranking", RANKINGS, ids=str)
def test_generate(case, ranking):
    compare(case, generate(case, [two_images(case)]), ranking=ranking)


@pytest.mark.everyday(5)
@pytest.mark.parametrize("ranking", RANKINGS, ids=str)
def test_padded_batch(case, ranking):
    compare_batch(case, choices={"ranking": ranking})


@pytest.mark.everyday(5)
@pytest.mark.parametrize("ranking", RANKINGS, ids=str)
def test_turn_with_an_image(case, ranking):
    """On the cache of one with text, and of one with an image."""
    for begin in (text_only(case), one_image(case)):
        compare(case, partial(turns, case, [begin], [case.prompt(1, 3, 8, seed=7)]), ranking=ranking)
