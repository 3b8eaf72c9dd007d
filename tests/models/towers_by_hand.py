"""Features and saliencies that vision towers hand to reducers, by hand: whole attention matrices, patch by patch.

And the prompt that holds what is left of an image, which the model runs without knowing of the dropped tokens.
"""

from __future__ import annotations

import inspect
from contextlib import ExitStack, contextmanager, nullcontext
from itertools import pairwise

import torch
import transformers

from reroute_kernels.models.adapter import cache_name, cache_of
from reroute_kernels.reducers import VisionFeatures
from tests.models.prompts import IMAGE, VIDEO
from tests.models.reduced_by_hand import inputs_of, llava_images, softmax_rows
from tests.models.slow_way import SlowWay, decoder_of


def qwen_saliency(model, images, inputs):
    """Column sums of the last block, by whole matrices, of all images and then all videos."""
    tower = model.model.visual
    for pixels, grids in (("pixel_values", "image_grid_thw"), ("pixel_values_videos", "video_grid_thw")):
        if grids not in inputs:
            continue
        with inputs_of(tower.blocks) as seen, torch.no_grad():
            output = tower(inputs[pixels], grid_thw=inputs[grids])
            merged = tower.merger(output.last_hidden_state)
        back = torch.cdist(output.pooler_output, merged).argmin(dim=1)
        hidden, arguments = seen[len(tower.blocks) - 1]
        block = tower.blocks[-1]
        query, key, _ = block.attn.qkv(block.norm1(hidden)).unflatten(-1, (3, block.attn.num_heads, -1)).unbind(1)
        cos, sin = (table[:, None] for table in arguments["position_embeddings"])
        half = query.shape[-1] // 2
        query, key = (x * cos + torch.cat([-x[..., half:], x[..., :half]], dim=-1) * sin for x in (query, key))
        bounds = arguments["cu_seqlens"].tolist()
        received = [softmax_rows(query[a:b], key[a:b]).mean(dim=0).sum(dim=0) for a, b in pairwise(bounds)]
        received = torch.cat(received).view(-1, tower.spatial_merge_size**2).mean(dim=1)[back]
        for frames, height, width in inputs[grids].tolist():
            count = frames * height * width // tower.spatial_merge_size**2
            yield received[:count].view(frames, -1)
            received = received[count:]


def layered(attention, merge, class_token=False):
    """Slow saliency of a tower whose attention weights can be had."""

    def saliency(model, images, inputs):
        tower = getattr(model.model, "vision_tower", None) or model.model.vision_model
        module, weights = attention(tower), []
        handle = module.register_forward_hook(lambda *given: weights.append(given[2][1]))
        before = tower.config._attn_implementation
        tower.set_attn_implementation("eager")
        try:
            with torch.no_grad():
                features_of(model, inputs)
        finally:
            tower.set_attn_implementation(before)
            handle.remove()
        (weights,) = weights
        received = weights[:, :, 0, 1:].sum(dim=1) if class_token else weights.mean(dim=1).sum(dim=1)
        yield from merge(model.model, received, inputs)

    return saliency


def features_of(model, inputs):
    """Outputs of the encoders of images or of videos."""
    core = model.model
    encode = core.get_video_features if "pixel_values_videos" in inputs else core.get_image_features
    names = ("pixel_values", "pixel_values_videos", "image_sizes", "image_grid_thw", "video_grid_thw")
    return encode(*[inputs[name] for name in names if name in inputs])


def onevision_frames(core, received, inputs):
    if "pixel_values_videos" not in inputs:
        return [received]
    pooled = core.apply_pooling(received[:, :, None])[:, :, 0]
    return pooled.split(inputs["pixel_values_videos"].shape[1])


def shuffled(core, received, inputs):
    """Squares of 2 x 2 patches."""
    side = round(received.shape[1] ** 0.5)
    squares = received.view(-1, side // 2, 2, side // 2, 2)
    return [squares.mean(dim=(2, 4)).flatten(1)]


def pixtral_squares(core, received, inputs):
    patch = core.config.vision_config.patch_size
    start = 0
    for height, width in (inputs["image_sizes"] // patch).tolist():
        image = received[0, start : start + height * width].view(height, width)
        start += height * width
        image = image[: height // 2 * 2, : width // 2 * 2].view(height // 2, 2, width // 2, 2)
        yield image.mean(dim=(1, 3)).flatten()[None]


def as_they_are(core, received, inputs):
    return [received]


def plain_projector(core):
    return core.multi_modal_projector


OTHERS = {
    "llava_onevision": (
        plain_projector,
        layered(lambda tower: getattr(tower, "vision_model", tower).encoder.layers[-1].self_attn, onevision_frames),
    ),
    "internvl": (plain_projector, layered(lambda tower: tower.encoder.layer[-1].attention, shuffled, class_token=True)),
    "mistral3": (plain_projector, layered(lambda tower: tower.transformer.layers[-1].attention, pixtral_squares)),
    "idefics3": (
        lambda core: core.connector.modality_projection,
        layered(lambda tower: tower.encoder.layers[-1].self_attn, shuffled),
    ),
}
QWENS = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"]
TOWERS = {**dict.fromkeys(QWENS, qwen_saliency), **{name: saliency for name, (_, saliency) in OTHERS.items()}}


KEYS = {
    "llava": (lambda tower: getattr(tower, "vision_model", tower).encoder.layers[-2].self_attn.k_proj, as_they_are),
    "llava_next": (
        lambda tower: getattr(tower, "vision_model", tower).encoder.layers[-2].self_attn.k_proj,
        as_they_are,
    ),
    "llava_onevision": (
        lambda tower: getattr(tower, "vision_model", tower).encoder.layers[-1].self_attn.k_proj,
        onevision_frames,
    ),
    "internvl": (lambda tower: tower.encoder.layer[-1].attention.k_norm, shuffled),
    "mistral3": (lambda tower: tower.transformer.layers[-1].attention.k_proj, pixtral_squares),
    "idefics3": (lambda tower: tower.encoder.layers[-1].self_attn.k_proj, shuffled),
    **dict.fromkeys(QWENS, (lambda tower: tower.blocks[-1].attn.qkv, None)),
}
"""The module that makes the keys of a salient layer, and how values (T, P) of patches become those of tokens."""


@torch.no_grad()
def slow_keys(case, inputs):
    """(N, D) for all images, or for all videos: the mean over heads and over merged patches, channel by channel."""
    core = case.model.model
    tower = next(getattr(core, name) for name in ("vision_tower", "vision_model", "visual") if hasattr(core, name))
    module, merge = KEYS[case.name]
    made = []
    handle = module(tower).register_forward_hook(lambda *given: made.append(given[2]))
    output = features_of(case.model, inputs)
    handle.remove()
    (keys,) = made
    heads = tower.config.num_heads if merge is None else tower.config.num_attention_heads
    if merge is None:
        keys = keys.unflatten(-1, (3, heads, -1))[:, 1].mean(dim=1)
        merged = torch.stack([group.mean(dim=0) for group in keys.split(tower.spatial_merge_size**2)])
        unsorted = tower.merger(output.last_hidden_state)
        return merged[torch.cdist(torch.cat(list(output.pooler_output)), unsorted).argmin(dim=1)]
    keys = keys.unflatten(-1, (heads, -1)).mean(dim=-2)
    if case.name in ("llava", "llava_next", "internvl"):
        keys = keys[:, 1:]
    channels = [list(merge(core, keys[..., channel], inputs)) for channel in range(keys.shape[-1])]
    return torch.stack([torch.cat([each.flatten() for each in images]) for images in channels], dim=-1)


def llava_saliency(model, images, inputs):
    tiles = inputs["pixel_values"].flatten(0, -4)
    return [torch.stack([saliency for _, _, saliency, _ in llava_images(model, tiles)])]


SALIENCY = {**TOWERS, "smolvlm": TOWERS["idefics3"], "llava": llava_saliency, "llava_next": llava_saliency}
"""Gives (T, N) for each call of a reducer, in order."""
KEYS["smolvlm"] = KEYS["idefics3"]


def tower_of(core):
    return next(getattr(core, name) for name in ("vision_tower", "vision_model", "visual") if hasattr(core, name))


def projector_of(core):
    return core.connector.modality_projection if hasattr(core, "connector") else core.multi_modal_projector


def is_video(inputs):
    return "pixel_values_videos" in inputs


def reduces_before_projector(case, inputs):
    """Whether a reducer chooses among what the projector is handed, not among what it makes."""
    return case.name not in QWENS and case.name != "mistral3" and not is_video(inputs)


@torch.no_grad()
def slow_similar(case, inputs):
    """(N, c), the mean of many layers' outputs at the tokens of all images or videos."""
    core = case.model.model
    tower = tower_of(core)
    encoder = getattr(tower, "vision_model", tower)
    encoder = getattr(encoder, "encoder", getattr(tower, "transformer", None))
    if case.name in QWENS:
        layers = tower.blocks[len(tower.blocks) * 7 // 32 : len(tower.blocks) * 23 // 32 + 1]
    else:
        layers = encoder.layer if hasattr(encoder, "layer") else encoder.layers
        layers = layers[max(0, len(layers) * 2 // 3 - 1) :]
    made = []

    def note(layer, args, output):
        made.append(output[0] if isinstance(output, tuple) else output)

    with ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.register_forward_hook(note).remove)
        output = features_of(case.model, inputs)
    mean = torch.stack(made).mean(dim=0)
    if case.name in QWENS:
        back = torch.cdist(torch.cat(list(output.pooler_output)), tower.merger(output.last_hidden_state)).argmin(dim=1)
        return tower.merger(mean)[back]
    if case.name == "mistral3":
        projector = core.multi_modal_projector
        return projector.patch_merger(projector.norm(mean[0]), inputs["image_sizes"])
    if case.name in ("llava", "llava_next", "internvl"):
        mean = mean[:, 1:]
    if is_video(inputs):
        mean = core.apply_pooling(mean)
    if case.name == "internvl":
        side = round(mean.shape[1] ** 0.5)
        mean = core.pixel_shuffle(mean.unflatten(1, (side, side)), scale_factor=0.5).flatten(1, 2)
    if hasattr(core, "connector"):
        mean = core.connector.pixel_shuffle(mean, 2)
    return mean.flatten(0, 1)


IMAGES = ("pixel_values", "image_grid_thw", "image_sizes")
VIDEOS = ("pixel_values_videos", "video_grid_thw")


def modalities(case, prompt):
    """The placeholder of images and that of videos, with the model's inputs without those of the other."""
    inputs = case.batch([prompt])
    for token, own, others in ((IMAGE, IMAGES, VIDEOS), (VIDEO, VIDEOS, IMAGES)):
        if own[0] in inputs:
            yield token, {name: value for name, value in inputs.items() if name not in others}


def slow_images(case, prompt):
    """One `VisionFeatures` for each call of a reducer by one prompt: its images, then its videos."""
    return [image for _, inputs in modalities(case, prompt) for image in images_of(case, prompt, inputs)]


@torch.no_grad()
def images_of(case, prompt, inputs):
    core = case.model.model
    saliency = list(SALIENCY[case.name](case.model, None, inputs))
    width = core.get_input_embeddings().weight.shape[1]
    if case.name in QWENS:
        projected = torch.cat([each.reshape(-1, width) for each in features_of(case.model, inputs).pooler_output])
        features = projected
    else:
        handed = []
        handle = projector_of(core).register_forward_hook(lambda module, args, output: handed.append((args[0], output)))
        features_of(case.model, inputs)
        handle.remove()
        ((features, projected),) = handed
        projected = core.apply_pooling(projected) if is_video(inputs) else projected
        features = features if reduces_before_projector(case, inputs) else projected
    values = [features, projected, slow_keys(case, inputs), slow_similar(case, inputs)]
    sizes = [each.numel() for each in saliency]
    split = zip(*[each.reshape(sum(sizes), -1).split(sizes) for each in values], strict=True)
    ids = prompt.ids
    text = core.get_input_embeddings()(ids[(ids != IMAGE) & (ids != VIDEO)])
    images = []
    for number, (salient, each) in enumerate(zip(saliency, split, strict=True)):
        features, projected, keys, similar = (value.unflatten(0, salient.shape) for value in each)
        images.append(
            VisionFeatures(
                features,
                slow_grid(case, inputs, number, salient.shape[1]),
                lambda salient=salient: salient,
                lambda similar=similar: similar,
                is_video=is_video(inputs),
                _keys=lambda keys=keys: keys,
                _projected=lambda projected=projected: projected,
                _text=lambda salient=salient: (text,) * len(salient),
                _tiles=lambda salient=salient: slow_tiles(case, inputs, len(salient)),
            )
        )
    return images


def slow_tiles(case, inputs, tiles):
    """How many tiles each image has: in these families an overview and two more."""
    if case.name in ("llava_next", "llava_onevision"):
        assert tiles == 3 * len(inputs["image_sizes"])
        return [3] * len(inputs["image_sizes"])
    return [1] * tiles


def slow_grid(case, inputs, number, tokens):
    if case.name in QWENS:
        _, *sides = inputs["video_grid_thw" if is_video(inputs) else "image_grid_thw"][number].tolist()
        return tuple(side // 2 for side in sides)
    if case.name == "mistral3":
        patch = case.model.config.vision_config.patch_size
        return tuple(side // patch // 2 for side in inputs["image_sizes"][number].tolist())
    return (round(tokens**0.5),) * 2


@contextmanager
def handing_on(case, inputs, values, projects=True):
    """Values (T, N, c) of each image take the place of its features, where a reducer acts.

    Args:
        projects: False: they take the place of what the projector makes of them, and go on from there.
    """
    core = case.model.model
    with ExitStack() as stack:
        if reduces_before_projector(case, inputs):
            (values,) = values
            if projects:
                handle = projector_of(core).register_forward_pre_hook(lambda module, args: (values, *args[1:]))
            else:
                handle = projector_of(core).register_forward_hook(lambda *given: values)
            stack.callback(handle.remove)
        elif case.name in QWENS:

            def hand_on(tower, args, output):
                output.pooler_output = torch.cat([each.flatten(0, 1) for each in values])
                return output

            stack.callback(core.visual.register_forward_hook(hand_on).remove)
        elif case.name == "mistral3":
            joined = torch.cat([each.flatten(0, 1) for each in values])
            stack.callback(projector_of(core).register_forward_hook(lambda *given: joined).remove)
        else:
            core.apply_pooling = lambda features: torch.cat(list(values))
            stack.callback(vars(core).pop, "apply_pooling")
        yield


def embedded(case, inputs, token):
    """The features that these placeholders of one prompt are replaced by, with newlines, and those of layers behind."""
    core = case.model.model
    output = features_of(case.model, inputs)
    parts = [each.reshape(-1, each.shape[-1]) for each in output.pooler_output]
    ids = inputs["input_ids"][0]
    if sum(map(len, parts)) + len(parts) == int((ids == token).sum()):
        # Before transformers 5.17 the model ends each video with a newline, not its encoder.
        parts = [torch.cat([part, core.image_newline[None]]) for part in parts]
    layers = getattr(output, "deepstack_features", None) or []
    return torch.cat(parts), [each if isinstance(each, torch.Tensor) else torch.cat(list(each)) for each in layers]


DROPPED = 1e4


@torch.no_grad()
def reduced_arguments(case, prompt, chosen):
    """The decoder's arguments for a prompt of which only what a reducer left exists, and (L,) bool, what that is.

    Args:
        chosen: for each call of the reducer, the places over T x N that stay, and their features, as (index, made).
    """
    core, ids, chosen = case.model.model, prompt.ids, list(chosen)
    embeds = core.get_input_embeddings()(ids)
    kept, layers = torch.ones_like(ids, dtype=torch.bool), []
    for token, inputs in modalities(case, prompt):
        made, flags = [], []
        for image in images_of(case, prompt, inputs):
            (index, features), shape = chosen.pop(0), image.features.shape
            made.append(image.features.flatten(0, 1).index_copy(0, index, features).view(shape))
            dropped = torch.full(shape[:2], DROPPED).flatten().index_fill(0, index, 0.0)
            flags.append(dropped.view(*shape[:2], 1).expand(-1, -1, embeds.shape[1]))
        places = ids == token
        with handing_on(case, inputs, made):
            embeds[places], of_layers = embedded(case, inputs, token)
        with handing_on(case, inputs, flags, projects=False):
            kept[places] = embedded(case, inputs, token)[0][:, 0] != DROPPED
        layers = layers or [torch.zeros_like(embeds) for _ in of_layers]
        for layer, features in zip(layers, of_layers, strict=True):
            layer[places] = features
    inputs, visual = case.batch([prompt]), (ids == IMAGE) | (ids == VIDEO)
    positions = torch.arange(len(ids))[None]
    if case.name in QWENS:
        names = inspect.signature(core.get_rope_index).parameters
        positions, _ = core.get_rope_index(**{name: inputs[name] for name in names if name in inputs})
    arguments = {"inputs_embeds": embeds[None, kept], "position_ids": positions[..., kept]}
    if layers:
        arguments["visual_pos_masks"] = visual[None, kept]
        arguments["deepstack_visual_embeds"] = [each[visual & kept] for each in layers]
    return arguments, kept


@torch.no_grad()
def talk(case, prompt, policy, chosen, steps, turns=()):
    """First logits, greedy answers and selections of one prompt, and of texts that follow it.

    Args:
        policy: without its reducer; its stages are done the slow way.
        chosen: as in `reduced_arguments`.
    """
    arguments, kept = reduced_arguments(case, prompt, chosen)
    core, decoder = case.model.model, decoder_of(case.model)
    visual = (prompt.ids == IMAGE) | (prompt.ids == VIDEO)
    cache = transformers.DynamicCache(config=decoder.config)
    if case.name.startswith("qwen3_5") and not hasattr(cache, "has_previous_state"):
        cache = None  # before transformers 5.6 the first call makes one for recurrent states
    with SlowWay(case.model, policy, visual[kept], int(visual.sum())) if policy.schedule else nullcontext() as slow:

        def run(**given):
            nonlocal cache
            given[cache_name(core)] = cache
            if slow is not None:
                slow._begin(core, (), {name: value for name, value in given.items() if name != "position_ids"})
            output = decoder(**given, use_cache=True)
            cache = cache_of(output)
            return case.model.lm_head(output.last_hidden_state[0, -1])

        first = logits = run(**arguments)
        selected = [] if slow is None else [kept.nonzero().flatten()[stage].tolist() for stage in slow.selected]
        place = int(arguments["position_ids"].max()) + 1
        if slow is not None:
            slow.visual = None

        def feed(tokens):
            nonlocal place
            positions = torch.arange(place, place + len(tokens)).expand_as(arguments["position_ids"][..., :1] + tokens)
            place += len(tokens)
            return run(inputs_embeds=core.get_input_embeddings()(tokens)[None], position_ids=positions)

        answers = []
        for turn in [None, *turns]:
            if turn is not None:
                logits = feed(torch.cat([answers[-1][-1:], turn]))
            tokens = [logits.argmax()]
            for _ in range(steps - 1):
                tokens.append(feed(tokens[-1][None]).argmax())
            answers.append(torch.stack(tokens))
    return first, answers, kept.nonzero().flatten(), selected
