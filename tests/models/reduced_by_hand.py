"""A reducer's work on a prompt, done by hand: whole attention matrices, image by image, token by token.

The prompt that it makes holds the survivors' features at their own positions, and the model that runs it knows nothing
of the dropped tokens.
"""

from __future__ import annotations

from contextlib import contextmanager
from itertools import pairwise

import torch

from tests.models.prompts import IMAGE
from tests.test_reducers import slow_anchors


@contextmanager
def inputs_of(modules):
    """The first tensor that each module is handed, and all its keyword arguments, by number."""
    seen = {}

    def note(number):
        def hook(module, args, kwargs):
            seen[number] = (args[0] if args else kwargs["hidden_states"]), kwargs

        return hook

    handles = [
        module.register_forward_pre_hook(note(number), with_kwargs=True) for number, module in enumerate(modules)
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def softmax_rows(query, key):
    """(H, N, N) of (N, H, D)."""
    query, key = query.transpose(0, 1), key.transpose(0, 1)
    return (query @ key.transpose(1, 2) / query.shape[-1] ** 0.5).softmax(dim=-1)


@torch.no_grad()
def llava_images(model, pixel_values):
    """For each image (or tile): its features before the projector, similarity features, saliency, and its grid."""
    tower = model.model.vision_tower
    layers = getattr(tower, "vision_model", tower).encoder.layers
    with inputs_of(layers) as seen:
        output = tower(pixel_values, output_hidden_states=True)
    depth, number = len(layers), model.config.vision_feature_layer
    layer, states = layers[number], layers[number].layer_norm1(seen[depth + number][0])
    heads = layer.self_attn.num_heads
    for image in range(len(pixel_values)):
        query, key = (
            getattr(layer.self_attn, f"{name}_proj")(states[image]).unflatten(-1, (heads, -1)) for name in "qk"
        )
        saliency = softmax_rows(query, key)[:, 0, 1:].sum(dim=0)
        hidden = output.hidden_states
        similar = torch.stack([each[image, 1:] for each in hidden[depth * 2 // 3 :]]).mean(dim=0)
        side = round((hidden[0].shape[1] - 1) ** 0.5)
        yield hidden[number][image, 1:], similar, saliency, (side, side)


@torch.no_grad()
def qwen_images(model, pixel_values, grids):
    """As `llava_images`, for the outputs of the merger."""
    tower = model.model.visual
    depth, cells = len(tower.blocks), tower.spatial_merge_size**2
    with inputs_of(tower.blocks) as seen:
        output = tower(pixel_values, grid_thw=grids)
    # The order of windows is found from the merged features, which are different at every place.
    merged = tower.merger(output.last_hidden_state)
    back = torch.cdist(output.pooler_output, merged).argmin(dim=1)
    torch.testing.assert_close(merged[back], output.pooler_output)
    hidden, arguments = seen[depth - 1]
    block = tower.blocks[-1]
    query, key, _ = block.attn.qkv(block.norm1(hidden)).unflatten(-1, (3, block.attn.num_heads, -1)).unbind(1)
    cos, sin = (table[:, None] for table in arguments["position_embeddings"])
    half = query.shape[-1] // 2
    query, key = (x * cos + torch.cat([-x[..., half:], x[..., :half]], dim=-1) * sin for x in (query, key))
    ends = arguments["cu_seqlens"].tolist()
    received = [softmax_rows(query[start:end], key[start:end]).mean(dim=0).sum(dim=0) for start, end in pairwise(ends)]
    saliency = torch.cat(received).view(-1, cells).mean(dim=1)[back]
    outputs = [seen[number + 1][0] if number + 1 < depth else output.last_hidden_state for number in range(depth)]
    similar = tower.merger(torch.stack(outputs[depth * 7 // 32 : depth * 23 // 32 + 1]).mean(dim=0))[back]
    start = 0
    for _, height, width in grids.tolist():
        grid = height // tower.spatial_merge_size, width // tower.spatial_merge_size
        rows = slice(start, start + grid[0] * grid[1])
        start = rows.stop
        yield output.pooler_output[rows], similar[rows], saliency[rows], grid


def images_of(model, inputs):
    if "image_grid_thw" in inputs:
        return qwen_images(model, inputs["pixel_values"], inputs["image_grid_thw"])
    return llava_images(model, inputs["pixel_values"])


def has_equal_saliencies(model, inputs) -> bool:
    """Whether only rounding distinguishes two tokens of an image."""
    salient = [saliency.sort().values for _, _, saliency, _ in images_of(model, inputs)]
    return any(bool((each.diff() < 1e-6 * each.max()).any()) for each in salient)


@torch.no_grad()
def reduced_prompt(model, inputs, count, per_cell, distance, quantile, keeps_own):
    """One sample's prompt without the tokens that Nüwa drops.

    Args:
        inputs: of the model, with ids and pixel values of one sample.
        count: gives the number of anchors for a number of tokens of an image.
        distance: gives the distance in tokens for a grid.

    Returns:
        The model's arguments, (M,) bool of the visual tokens among the M that are left, (M,) their places in the full
        prompt, and by how much positions after the prompt differ from counts.
    """
    core, ids = model.model, inputs["input_ids"][0]
    qwen = "image_grid_thw" in inputs
    embeds = core.get_input_embeddings()(ids)
    dropped = torch.zeros_like(ids, dtype=torch.bool)
    places = (ids == IMAGE).nonzero().flatten()
    for features, similar, saliency, grid in images_of(model, inputs):
        anchors, made = slow_anchors(
            features, similar, saliency, grid, count(len(features)), per_cell, distance(grid), quantile, keeps_own
        )
        features = features.clone()
        features[anchors] = made
        here, places = places[: len(features)], places[len(features) :]
        embeds[here] = features if qwen else core.multi_modal_projector(features)
        dropped[here] = True
        dropped[here[anchors]] = False
    assert not len(places)
    kept = (~dropped).nonzero().flatten()
    if qwen:
        names = ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")
        positions, delta = core.get_rope_index(**{name: inputs[name] for name in names if name in inputs})
    else:
        positions, delta = torch.arange(len(ids))[None], 0
    arguments = {"inputs_embeds": embeds[None, kept], "position_ids": positions[..., kept]}
    return arguments, ids[kept] == IMAGE, kept, int(delta)
