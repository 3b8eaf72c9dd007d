"""Raters of SparseVLM, against their formula pair by pair."""

import pytest
import torch

from reroute_kernels.prompt import Prompt
from reroute_kernels.rankings import TextRaters
from reroute_kernels.raters import rating_text, text_raters
from tests.models.slow_way import raters_of

VISUAL = torch.tensor([[0, 1, 1, 1, 0, 1, 1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0]]).bool()
VALID = torch.tensor([[1] * 12, [0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 0]]).bool()


def embeddings(seed, length=12):
    return torch.randn(2, length, 6, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("seed", range(4))
def test_equal_the_slow_way(seed, monkeypatch):
    monkeypatch.setattr("reroute_kernels.raters.TILE", 5)
    prompt, inputs = Prompt(VISUAL, VALID), embeddings(seed)
    raters = text_raters(inputs, prompt.pool, rating_text(prompt), prompt.most_text)
    for row, length in enumerate((12, 11)):
        expected = raters_of(inputs[row], VISUAL[row].nonzero().flatten().tolist(), length)
        assert raters[row].nonzero().flatten().tolist() == expected
        assert 0 < len(expected) < length - 7


def test_only_text_behind_the_image_rates():
    prompt = Prompt(VISUAL, VALID)
    assert rating_text(prompt)[0].nonzero().flatten().tolist() == [7, 8, 9, 10, 11]
    assert rating_text(prompt)[1].nonzero().flatten().tolist() == [7, 8, 9, 10]
    # Neither answers nor draft tokens, and the last token of a prompt that ends with an image.
    answered = Prompt(VISUAL, VALID, starts=torch.tensor([9, 10]))
    assert rating_text(answered).sum(dim=1).tolist() == [2, 3]
    assert rating_text(Prompt(VISUAL, None, draft_tokens=2)).sum(dim=1).tolist() == [3, 3]
    assert rating_text(Prompt(VISUAL[:, :7], None)).tolist() == [[False] * 6 + [True]] * 2


def test_all_text_rates_where_all_is_alike():
    prompt, inputs = Prompt(VISUAL[:1], None), torch.ones(1, 12, 6)
    for count in range(8, 13):  # 1 / 3 times 3 is not 1 in every order
        short = Prompt(VISUAL[:1, :count], None)
        raters = text_raters(inputs[:, :count], short.pool, rating_text(short), short.most_text)
        assert torch.equal(raters, rating_text(short))
    assert rating_text(prompt).sum() == 5


def test_rows_without_an_image_or_without_a_token():
    visual = VISUAL & torch.tensor([[True], [False]])
    valid = VALID.clone()
    prompt = Prompt(visual, valid)
    raters = text_raters(embeddings(0), prompt.pool, rating_text(prompt), prompt.most_text)
    assert torch.equal(raters[1], valid[1])
    valid[1] = False
    prompt = Prompt(visual, valid)
    raters = text_raters(embeddings(0), prompt.pool, rating_text(prompt), prompt.most_text)
    assert raters.any(dim=1).tolist() == [True, False]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_compared_in_float32(dtype):
    prompt, inputs = Prompt(VISUAL, VALID), embeddings(1).to(dtype)
    flags = prompt.pool, rating_text(prompt), prompt.most_text
    assert torch.equal(text_raters(inputs, *flags), text_raters(inputs.float(), *flags))


def test_costs_what_all_text_costs_and_the_search():
    class Decoder:
        heads, kv_heads, head_dim, hidden_size = 4, 2, 8, 32

    projections = 2 * 32 * (100 * 16 + 20 * 32)
    assert TextRaters().flops(Decoder, 100, 20) == projections + 2 * 20 * 32 * 100 + 2 * 32 * 20 * 100
