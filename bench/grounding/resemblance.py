"""Whether the model behaves like the large ones whose tokens are routed: where it looks, and the layers it can miss.

Both are measured without routing, before any policies are compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
from torch import nn

from .answers import Answerer, Item, batches
from .metrics import Interval, interval, score

TOP = 0.25
"""The share of visual tokens that counts as looked at."""


@torch.no_grad()
def coverage(answerer: Answerer, items: Sequence[Item]) -> dict[str, list[Interval]]:
    """How well the last prompt token finds the object, by layer; for items that ask for a box.

    Returns:
        `coverage`: the share of the object's tokens that are among the quarter of visual tokens with the most
        attention of the last prompt token, mean over heads; by chance it would be a quarter. `rank`: the mean place of
        the object's tokens in that order, 0 for the first token and 1 for the last; by chance a half.
    """
    model = answerer.model
    implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")
    covered, ranks = [], []
    try:
        for places in batches(items):
            inputs = answerer.inputs([items[place] for place in places])
            maps = model(**inputs, output_attentions=True, use_cache=False, logits_to_keep=1).attentions
            visual = inputs["input_ids"][0] == model.config.image_token_index
            # (batch, layers, visual tokens)
            looks = torch.stack([each[:, :, -1].mean(dim=1)[:, visual] for each in maps], dim=1).cpu()
            order = looks.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
            for place, ranked in zip(places, order.numpy(), strict=True):
                of_object = ranked[:, items[place].question.target.tokens()]
                covered.append((of_object < TOP * ranked.shape[1]).mean(axis=1))
                ranks.append(of_object.mean(axis=1) / (ranked.shape[1] - 1))
    finally:
        model.set_attn_implementation(implementation)
    return {
        name: [interval(of_layer) for of_layer in np.stack(values, axis=1)]
        for name, values in (("coverage", covered), ("rank", ranks))
    }


@contextmanager
def skipped_layer(layer: nn.Module):
    """The model without the contribution of one decoder layer."""
    handle = layer.register_forward_hook(lambda module, args, output: args[0])
    try:
        yield
    finally:
        handle.remove()


def skipped(answerer: Answerer, layer: int | None):
    """The model without the contribution of one decoder layer; the whole model if `layer` is None."""
    return nullcontext() if layer is None else skipped_layer(answerer.model.model.language_model.layers[layer])


def without_layers(answerer: Answerer, items: Sequence[Item]) -> list[Interval]:
    """ACC@0.5 of items that ask for a box: of the whole model, then without each of its layers."""
    found = []
    for layer in (None, *range(answerer.model.config.text_config.num_hidden_layers)):
        hits = []
        with skipped(answerer, layer):
            for places in batches(items):
                answers = answerer.answer(answerer.inputs([items[place] for place in places]))
                hits += [
                    score(items[place].question, answer)["acc@0.5"]
                    for place, answer in zip(places, answers, strict=True)
                ]
        found.append(interval(hits))
    return found
