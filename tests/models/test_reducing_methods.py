"""Every reducer on the tower of every family, with stages behind it, against all of it done by hand.

Everyday tests run a selection; `--all-types` runs every method on every tower in every situation, under both actions.
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from functools import cache

import torch

import reroute_kernels as rk
from reroute_kernels.models.adapter import cache_name
from reroute_kernels.reducers import (
    CDPruner,
    DivPrune,
    FlashVid,
    HoloV,
    Nuwa,
    VidCom2,
    VisionFeatures,
    VisionZip,
    VisPruner,
)
from tests.models.families import load_shallow
from tests.models.prompts import ACTIONS, IMAGE, VIDEO, Prompt, offset, selections
from tests.models.slow_way import decoder_of, layer_types
from tests.models.towers_by_hand import SALIENCY, slow_images, talk
from tests.test_flashvid import slow_flashvid
from tests.test_published_reducers import SLOW, slow_vidcom2
from tests.test_reducers import slow_anchors

KEEP, STEPS = 0.4, 3
GREEDY = {
    "max_new_tokens": STEPS,
    "do_sample": False,
    "eos_token_id": None,
    "pad_token_id": 0,
    "return_dict_in_generate": True,
    "output_logits": True,
}
METHODS = {
    "CDPruner": CDPruner(0.25),  # fewer than the features have channels: determinants of more are 0
    "DivPrune": DivPrune(KEEP),
    "FlashVid": FlashVid(0.35, tau=0.3, min_segments=2, selection="v1"),
    "FlashVid of defaults": FlashVid(0.35),  # clips are shorter than there are to be segments
    "HoloV": HoloV(KEEP),
    "Nuwa": Nuwa(KEEP, 2),
    "VidCom2": VidCom2(KEEP),
    "VisPruner": VisPruner(KEEP),
    "VisionZip": VisionZip(KEEP),
}
QUERIES_AND_KEYS = ("q_proj.weight", "k_proj.weight", "qkv.weight")
TURN = torch.tensor([5, 6, 7, 8])


@cache
def load_sharp(name):
    """A family whose vision tower tells patches apart: random weights attend to all alike, up to rounding."""
    family = load_shallow(name)
    model = copy.deepcopy(family.model)
    for part, weight in model.named_parameters():
        if "language_model" not in part and "text_model" not in part and part.endswith(QUERIES_AND_KEYS):
            weight.data *= 8
    return replace(family, model=model)


def one_image(case):
    return [case.prompt(1, 4, 9, seed=1)]


def two_images(case):
    return [case.prompt(2, 4, 9, seed=7)]  # with other seeds two tokens are nearest to each other, and both farthest


def padded_batch(case):
    return [case.prompt(1, 4, 9, seed=1), case.prompt(2, 7, 12, seed=3)]


def one_video(case):
    return [case.prompt(0, 4, 9, seed=4, video=True)]


def two_videos(case):
    """Of one prompt, with an image between them."""
    parts = [*one_video(case), case.prompt(1, 3, 5, seed=3), case.prompt(0, 2, 7, seed=5, video=True)]
    return [Prompt(torch.cat([part.ids for part in parts]), case._merged([part.features for part in parts], dim=1))]


def images_and_videos(case):
    return [*one_video(case), case.prompt(1, 3, 5, seed=3), case.prompt(0, 2, 7, seed=5, video=True)]


SITUATIONS = {
    "prompt": one_image,
    "two images": two_images,
    "batch": padded_batch,
    "video": one_video,
    "two videos": two_videos,
    "images and videos": images_and_videos,
    "later turn": one_image,
}
NEED_VIDEO = ("video", "two videos", "images and videos")
EVERYDAY = [
    ("llava", "VisionZip", "batch"),
    ("llava_next", "CDPruner", "batch"),
    ("llava_onevision", "FlashVid", "images and videos"),
    ("qwen2_vl", "VidCom2", "video"),
    ("qwen2_5_vl", "FlashVid", "images and videos"),
    ("qwen2_5_vl", "CDPruner", "images and videos"),
    ("qwen3_vl", "FlashVid", "two videos"),
    ("llava_onevision", "FlashVid of defaults", "two videos"),
    ("qwen3_vl", "VisionZip", "later turn"),
    ("qwen3_5", "DivPrune", "two images"),
    ("internvl", "HoloV", "batch"),
    ("mistral3", "VisPruner", "two images"),
    ("idefics3", "Nuwa", "prompt"),
    ("smolvlm", "CDPruner", "later turn"),
]


def pytest_generate_tests(metafunc):
    if "situation" in metafunc.fixturenames:
        cells = EVERYDAY
        if metafunc.config.getoption("--all-types"):
            cells = [
                (name, method, situation)
                for name in SALIENCY
                for method in METHODS
                for situation in SITUATIONS
                if situation not in NEED_VIDEO or load_sharp(name).has_video
            ]
        ids = ["-".join(cell).replace(" ", "_") for cell in cells]
        metafunc.parametrize(("name", "method", "situation"), cells, ids=ids)


def slow_nuwa(image, number, reducer):
    count = math.ceil(reducer.keep * image.features.shape[1] - 1e-9)
    reach = reducer.distance * math.hypot(*(side + side % 2 - 1 for side in image.grid))
    options = reducer.per_cell, reach, reducer.quantile, reducer.keeps_own
    given = (image.features, image.similarity_features, image.saliency)
    index, made = slow_anchors(*(each[number] for each in given), image.grid, count, *options)
    return dict(zip(index.tolist(), made, strict=True))


def slow_divprune_of_tiles(image):
    found, start, tokens = [], 0, image.features.shape[1]
    for size in image.tiles:
        projected = image.projected[start : start + size].flatten(0, 1)[None]
        whole = VisionFeatures(projected, image.grid, None, None)
        chosen = SLOW[DivPrune](whole, 0, math.ceil(size * tokens * KEEP - 1e-9))
        found += sorted(start * tokens + token for token in chosen)
        start += size
    return torch.tensor(found), image.features.flatten(0, 1)[found]


def slow_choice(reducer, image):
    """The places over T x N that stay, ascending, and their features."""
    frames, tokens = image.features.shape[:2]
    if isinstance(reducer, VidCom2):
        index = torch.tensor(slow_vidcom2(image.projected, KEEP)) if image.is_video else torch.arange(frames * tokens)
        return index, image.features.flatten(0, 1)[index]
    if isinstance(reducer, FlashVid):
        options = reducer.retention, reducer.expansion, reducer.alpha, reducer.tau
        clips = [slice(0, frames)] if image.is_video else [slice(frame, frame + 1) for frame in range(frames)]
        made = [
            slow_flashvid(image.features[clip], image.saliency[clip], *options, reducer.min_segments, reducer.selection)
            for clip in clips
        ]
        index = torch.cat([places + clip.start * tokens for clip, (places, _) in zip(clips, made, strict=True)])
        return index, torch.cat([features for _, features in made])
    if isinstance(reducer, DivPrune) and max(image.tiles) > 1:
        return slow_divprune_of_tiles(image)
    count = math.ceil(tokens * reducer.keep - 1e-9)
    found = {}
    for number in range(frames):
        if isinstance(reducer, Nuwa):
            own = slow_nuwa(image, number, reducer)
        else:
            own = SLOW[type(reducer)](image, number, count)
        found |= {number * tokens + token: features for token, features in own.items()}
    index = sorted(found)
    return torch.tensor(index), torch.stack([found[place] for place in index])


@cache
@torch.no_grad()
def chosen_by_hand(name, method, situation, row):
    case = load_sharp(name)
    return [slow_choice(METHODS[method], image) for image in slow_images(case, SITUATIONS[situation](case)[row])]


def schedule_of(case):
    """A decision at each of two layers, whose shares are of all visual tokens."""
    kinds = layer_types(decoder_of(case.model))
    layers = [number for number, kind in enumerate(kinds) if kind == "full_attention" and number > 0]
    return rk.Stage(layers[0], 0.3), rk.Stage(layers[-1], 0.15)


@torch.no_grad()
def talk_of_model(case, prompts, policy, turns):
    inputs = case.batch(prompts)
    length = inputs["input_ids"].shape[1]
    with rk.apply(case.model, policy) as routing:
        output = case.model.generate(**inputs, **GREEDY)
        trace, first = routing.trace, output.logits[0]
        answers = [output.sequences[:, length:]]
        for turn in turns:
            whole = torch.cat([output.sequences, turn[None]], dim=1)
            cache = {cache_name(case.model.model): output.past_key_values}
            output = case.model.generate(input_ids=whole, attention_mask=torch.ones_like(whole), **cache, **GREEDY)
            answers.append(output.sequences[:, whole.shape[1] :])
    return trace, first, answers, length


def test_method_on_a_tower(name, method, situation):
    case, turns = load_sharp(name), [TURN] if situation == "later turn" else []
    prompts = SITUATIONS[situation](case)
    for action in ACTIONS:
        policy = rk.Policy(schedule_of(case), action, reducer=METHODS[method])
        trace, logits, answers, length = talk_of_model(case, prompts, policy, turns)
        for row, prompt in enumerate(prompts):
            chosen = chosen_by_hand(name, method, situation, row)
            first, expected, kept, selected = talk(case, prompt, replace(policy, reducer=None), chosen, STEPS, turns)
            begin = offset(prompt, length, "left")
            visual = kept[(prompt.ids[kept] == IMAGE) | (prompt.ids[kept] == VIDEO)]
            assert (trace.reduction.selected[row] - begin).tolist() == visual.tolist()
            whole = method == "VidCom2" and not (prompt.ids == VIDEO).any()
            assert whole or 0 < len(visual) < int(((prompt.ids == IMAGE) | (prompt.ids == VIDEO)).sum())
            assert selections(trace, row, begin) == selected
            torch.testing.assert_close(logits[row], first, atol=1e-4, rtol=0)
            assert [each[row].tolist() for each in answers] == [each.tolist() for each in expected]
