"""Raters of SparseVLM (arXiv 2410.04417): text tokens that the visual tokens resemble more than they do the others."""

from __future__ import annotations

import torch
from torch import Tensor

from . import ops
from .positions import flags_of
from .precision import full_precision
from .prompt import Prompt
from .ref.rank import last_queries

TILE = 512
"""Tokens that are compared with the text at a time."""


def rating_text(prompt: Prompt) -> Tensor:
    """(B, L) bool, the text that may rate: behind the visual tokens, before an answer; no padding.

    Of a prompt that ends with an image it is the last token.
    """
    text = prompt.pinned if prompt.visible is None else prompt.pinned & prompt.visible
    places = torch.arange(prompt.length, device=text.device)
    return text & (places > torch.where(prompt.pool, places, -1).amax(dim=1, keepdim=True))


@torch.no_grad()
def text_raters(inputs: Tensor, visual: Tensor, text: Tensor, most_text: int) -> Tensor:
    """Text tokens that are relevant to the visual tokens at least as much as the mean of the text.

    A visual token's relevance is spread over the text by a softmax of the products of their embeddings; that of a text
    token is the mean over the visual tokens.

    Args:
        inputs: (B, L, d), embeddings, as the first layer is handed them.
        visual, text: (B, L) bool.
        most_text: at least the text tokens of the sample that has most.

    Returns:
        (B, L) bool, at least one token of each sample that has text.
    """
    length = text.shape[1]
    index = last_queries(inputs, text, min(most_text, length))
    embeddings = ops.gather_tokens(index, inputs)[0].float()
    relevance = torch.zeros(index.shape, dtype=torch.float32, device=inputs.device)
    with full_precision(inputs.device):
        for start in range(0, length, TILE):
            part = slice(start, start + TILE)
            products = inputs[:, part].float() @ embeddings.transpose(1, 2)
            shares = products.masked_fill((index < 0)[:, None], -torch.inf).softmax(dim=-1)
            relevance += shares.masked_fill(~visual[:, part, None], 0).sum(dim=1)
    mean = relevance.sum(dim=1, keepdim=True) / (index >= 0).sum(dim=1, keepdim=True)
    rates = (index >= 0) & (relevance >= mean)
    rates |= (index >= 0) & ~rates.any(dim=1, keepdim=True)  # all are alike, and the mean is rounded up
    return flags_of(torch.where(rates, index, -1), length)
