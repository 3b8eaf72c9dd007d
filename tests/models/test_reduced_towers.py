"""Reducers on the towers of every family: saliency by whole matrices, and prompts that hold the survivors alone."""

import inspect
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from transformers.generation.utils import GenerationMixin

import reroute_kernels as rk
from reroute_kernels.models.adapter import cache_name
from tests.models.families import load_shallow
from tests.models.prompts import IMAGE, VIDEO, Prompt, offset
from tests.models.slow_way import decoder_of
from tests.models.towers_by_hand import KEYS, OTHERS, QWENS, TOWERS, features_of, projector_of, slow_keys

STEPS = 4
CROPS_BY_COUNT = "number_of_tokens_to_crop" in GenerationMixin._assisted_decoding.__code__.co_varnames
GREEDY = {"max_new_tokens": STEPS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


class Salient:
    """Leaves the most salient tokens of each image or frame, and halves their features."""

    def __init__(self):
        self.images = []

    def reduce(self, image):
        image.saliency, image.similarity_features  # noqa: B018 (computed while the state of the call is there)
        self.images.append(image)
        count = -(-image.features.shape[1] // 2)
        index = image.saliency.topk(count, dim=1).indices.sort(dim=1).values
        rows = index[:, :, None].expand(-1, -1, image.features.shape[2])
        return index, image.features.gather(1, rows) / 2


class Ragged(Salient):
    """Leaves more of each frame than of the one before, in one flat index."""

    def reduce(self, image):
        super().reduce(image)
        count, tokens, _ = image.features.shape
        least = (torch.arange(tokens) <= torch.arange(count)[:, None]).flatten()
        index = least.nonzero().flatten()
        return index, image.features.flatten(0, 1)[index] / 2


class Seen(Salient):
    """Notes what reducers are handed, and leaves all tokens as they are."""

    def reduce(self, image):
        image.keys, image.projected  # noqa: B018 (computed while the state of the call is there)
        super().reduce(image)
        tokens = torch.arange(image.features.shape[1]).expand(len(image.features), -1)
        return tokens, image.features.clone()


@pytest.mark.parametrize("video", [False, True], ids=["images", "video"])
@pytest.mark.parametrize("name", KEYS)
@torch.no_grad()
def test_keys_and_projected_features(name, video):
    case, reducer = load_shallow(name), Seen()
    if video and not case.has_video:
        pytest.skip("no videos")
    inputs = case.batch([case.prompt(0 if video else 2, 4, 9, seed=1, video=video)])
    expected, projected = slow_keys(case, inputs), []
    core = case.model.model
    if name in QWENS:
        projected = list(features_of(case.model, inputs).pooler_output)
    else:
        handle = projector_of(core).register_forward_hook(lambda *given: projected.append(given[2]))
        features_of(case.model, inputs)
        handle.remove()
    if video and name == "llava_onevision":
        projected = [core.apply_pooling(projected[0])]
    with rk.apply(case.model, rk.Policy((), reducer=reducer)):
        case.model(**inputs)
    width = expected.shape[1]
    torch.testing.assert_close(torch.cat([image.keys.reshape(-1, width) for image in reducer.images]), expected)
    width = case.model.config.get_text_config().hidden_size
    got = torch.cat([image.projected.reshape(-1, width) for image in reducer.images])
    torch.testing.assert_close(got, torch.cat([each.reshape(-1, width) for each in projected]))
    assert all(image.keys.shape[:2] == image.features.shape[:2] for image in reducer.images)


@pytest.fixture(params=TOWERS)
def case(request):
    return load_shallow(request.param)


@contextmanager
def halved(case, inputs):
    """The features before the projector at half their size, or behind it where frames are pooled or patches merged."""
    if case.name not in OTHERS:
        yield
        return
    projector = OTHERS[case.name][0](case.model.model)
    if case.name == "mistral3" or "pixel_values_videos" in inputs:
        handle = projector.register_forward_hook(lambda *given: given[2] / 2)
    else:
        handle = projector.register_forward_pre_hook(lambda module, args: (args[0] / 2, *args[1:]))
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def by_hand(case, prompt, kept):
    """Last logits, greedy tokens and lengths of the caches of one prompt whose tokens `kept` alone exist."""
    inputs, core, decoder = case.batch([prompt]), case.model.model, decoder_of(case.model)
    ids = inputs["input_ids"][0]
    embeds = core.get_input_embeddings()(ids)
    layer_features = []
    with halved(case, inputs):
        if case.name in OTHERS:
            if prompt.features:
                parts = [each.reshape(-1, embeds.shape[1]) for each in features_of(case.model, inputs).pooler_output]
                if sum(map(len, parts)) + len(parts) == int(((ids == IMAGE) | (ids == VIDEO)).sum()):
                    # Before transformers 5.17 the model ends each video with a newline, not its encoder.
                    parts = [torch.cat([part, core.image_newline[None]]) for part in parts]
                embeds[(ids == IMAGE) | (ids == VIDEO)] = torch.cat(parts)
        elif prompt.features:
            output = features_of(case.model, inputs)
            embeds[(ids == IMAGE) | (ids == VIDEO)] = torch.cat(list(output.pooler_output)) / 2
            layer_features = [
                each if isinstance(each, torch.Tensor) else torch.cat(list(each))
                for each in getattr(output, "deepstack_features", None) or []
            ]
    visual = (ids == IMAGE) | (ids == VIDEO)
    positions = torch.arange(len(ids))[None]
    if case.name in QWENS:
        names = inspect.signature(core.get_rope_index).parameters
        positions, _ = core.get_rope_index(**{name: inputs[name] for name in names if name in inputs})
    arguments = {"inputs_embeds": embeds[None, kept], "position_ids": positions[..., kept]}
    if layer_features:
        arguments["visual_pos_masks"] = visual[None, kept]
        arguments["deepstack_visual_embeds"] = [each[kept[visual]] for each in layer_features]
    hidden = decoder(**arguments).last_hidden_state
    logits, tokens = case.model.lm_head(hidden[0, -1]), []
    place, embeds = int(positions[..., -1].max()) + 1, arguments["inputs_embeds"]
    first = logits
    for _ in range(STEPS):  # without a cache: all tokens anew
        tokens.append(int(logits.argmax()))
        embeds = torch.cat([embeds, core.get_input_embeddings()(torch.tensor([[tokens[-1]]]))], dim=1)
        following = torch.full_like(positions[..., :1], place)
        arguments["position_ids"] = torch.cat([arguments["position_ids"], following], dim=-1)
        if layer_features:
            mask = arguments["visual_pos_masks"]
            arguments["visual_pos_masks"] = torch.cat([mask, torch.zeros_like(mask[:, :1])], dim=1)
        logits = case.model.lm_head(decoder(**{**arguments, "inputs_embeds": embeds}).last_hidden_state[0, -1])
        place += 1
    return first, tokens


def check_row(case, prompt, row, logits, answer, survivors, side, length):
    begin = offset(prompt, length, side)
    ids = prompt.ids
    kept = (ids != IMAGE) & (ids != VIDEO)
    kept[torch.tensor(survivors) - begin] = True
    first, tokens = by_hand(case, prompt, kept)
    torch.testing.assert_close(logits[row, begin + len(prompt) - 1], first, atol=1e-4, rtol=0)
    assert answer[row].tolist() == tokens
    return kept


@torch.no_grad()
def run(case, prompts, reducer, side="left"):
    together = case.batch(prompts, side)
    length = together["input_ids"].shape[1]
    with rk.apply(case.model, rk.Policy((), reducer=reducer)) as routing:
        logits = case.model(**together).logits
        survivors = [each.tolist() for each in routing.trace.reduction.selected]
        images = list(reducer.images)
        answer = case.model.generate(**together, **GREEDY)[:, length:]
    kept = [
        check_row(case, prompt, row, logits, answer, survivors[row], side, length) for row, prompt in enumerate(prompts)
    ]
    return together, images, kept


def test_saliency_equals_whole_matrices(case):
    prompts = [case.prompt(2, 4, 9, seed=1)]
    inputs, images, _ = run(case, prompts, Salient())
    expected = list(TOWERS[case.name](case.model, images, inputs))
    assert len(expected) == len(images)
    for image, saliency in zip(images, expected, strict=True):
        torch.testing.assert_close(image.saliency, saliency, atol=1e-5, rtol=1e-5)
        assert image.similarity_features.shape[:2] == image.features.shape[:2] == saliency.shape
        assert not image.is_video
        assert image.grid[0] * image.grid[1] == saliency.shape[1]


def test_survivors_alone_in_a_padded_batch(case):
    prompts = [case.prompt(1, 4, 9, seed=1), case.prompt(2, 7, 12, seed=2)]
    _, images, kept = run(case, prompts, Salient())
    if case.name == "llava_onevision":  # the model puts rows of tiles beside each other
        return
    visual = [(prompt.ids == IMAGE) for prompt in prompts]
    chosen = torch.cat([mask[places] for mask, places in zip(kept, visual, strict=True)])
    best = []
    for image in images:
        count = -(-image.features.shape[1] // 2)
        worst = image.saliency.topk(count, dim=1).values[:, -1:]
        best.append((image.saliency >= worst).flatten())
    assert torch.equal(chosen, torch.cat(best))


@pytest.mark.parametrize("reducer", [Salient, Ragged])
def test_frames_of_a_video_come_together(case, reducer):
    if not case.has_video:
        pytest.skip("no videos")
    prompt, reducer = case.prompt(0, 4, 9, seed=3, video=True), reducer()
    inputs, images, kept = run(case, [prompt], reducer)
    assert [image.is_video for image in images] == [True]
    frames = images[0].features.shape[0]
    assert frames > 1
    if isinstance(reducer, Ragged):
        counts = kept[0][prompt.ids == VIDEO][: frames * images[0].features.shape[1]].view(frames, -1).sum(dim=1)
        assert counts.tolist() == [min(count, images[0].features.shape[1]) for count in range(1, frames + 1)]
    for image, saliency in zip(images, TOWERS[case.name](case.model, images, inputs), strict=True):
        torch.testing.assert_close(image.saliency, saliency, atol=1e-5, rtol=1e-5)


def test_rerouted_survivors(case):
    """Stages choose among what a reducer left."""
    prompt = case.prompt(1, 4, 9, seed=1)
    layer = len(decoder_of(case.model).layers) - 1
    policy = rk.Policy((rk.Stage(layer, 0.25),), reducer=Salient())
    for action in ("reroute", "remove"):
        with rk.apply(case.model, replace(policy, action=action)) as routing, torch.no_grad():
            assert case.model(**case.batch([prompt])).logits.isfinite().all()
            (stage,), reduction = routing.trace.stages, routing.trace.reduction
        assert {*stage.selected[0].tolist()} < {*reduction.selected[0].tolist()}


@torch.no_grad()
def test_several_videos_of_a_batch_stay_apart():
    """LLaVA-OneVision encodes the frames of all of them together."""
    case, reducer = load_shallow("llava_onevision"), Ragged()
    prompts = [case.prompt(0, 4, 9, seed=3, video=True), case.prompt(0, 4, 9, seed=4, video=True)]
    _, images, _ = run(case, prompts, reducer)
    assert [image.features.shape[0] for image in images] == [5, 5]


@torch.no_grad()
def test_images_and_a_video_in_one_batch():
    for name in ("qwen2_5_vl", "qwen3_vl", "llava_onevision"):
        case, reducer = load_shallow(name), Salient()
        together = case.batch([case.prompt(1, 4, 9, seed=3), case.prompt(0, 4, 9, seed=4, video=True)])
        with rk.apply(case.model, rk.Policy((), reducer=reducer)) as routing:
            logits = case.model(**together).logits
            survivors = [each.tolist() for each in routing.trace.reduction.selected]
        assert sorted(image.is_video for image in reducer.images) == [False, True]
        for row, prompt in enumerate((case.prompt(1, 4, 9, seed=3), case.prompt(0, 4, 9, seed=4, video=True))):
            begin = offset(prompt, logits.shape[1], "left")
            kept = (prompt.ids != IMAGE) & (prompt.ids != VIDEO)
            kept[torch.tensor(survivors[row]) - begin] = True
            torch.testing.assert_close(logits[row, -1], by_hand(case, prompt, kept)[0], atol=1e-4, rtol=0)


@torch.no_grad()
def test_tiles_that_the_model_resamples():
    """Marks of dropped tokens would be mixed with features."""
    case = load_shallow("llava_onevision")
    inputs = case.batch([case.prompt(1, 4, 9, seed=1)])
    core = case.model.model
    with rk.apply(case.model, rk.Policy((), reducer=Salient())):
        given = inputs["pixel_values"], inputs["image_sizes"]
        with pytest.raises(NotImplementedError, match="so few tiles that the model does not resample them"):
            core.get_image_features(*given, vision_aspect_ratio="anyres_max_1")
        core.get_image_features(*given, vision_aspect_ratio="anyres_max_2")


@torch.no_grad()
def test_patches_that_a_mask_hides():
    case = load_shallow("idefics3")
    inputs = case.batch([case.prompt(1, 4, 9, seed=1)])
    inputs["pixel_attention_mask"] = torch.ones(*inputs["pixel_values"].shape[:2], 56, 56, dtype=torch.bool)
    with rk.apply(case.model, rk.Policy((), reducer=Salient())):
        expected = case.model(**inputs).logits
        assert expected.isfinite().all()
        inputs["pixel_attention_mask"][0, 0, 28:] = False
        with pytest.raises(NotImplementedError, match="images whose patches all show something"):
            case.model(**inputs)


def test_methods_of_an_instance_end_with_its_routing():
    case = load_shallow("llava_onevision")
    before = dict(vars(case.model.model))
    routing = rk.apply(case.model, rk.Policy((), reducer=Salient()))
    assert vars(case.model.model).keys() > before.keys()
    routing.remove()
    assert vars(case.model.model).keys() == before.keys()


@torch.no_grad()
def test_a_failed_video_leaves_no_state():
    case, reducer = load_shallow("llava_onevision"), Salient()
    video = case.batch([case.prompt(0, 4, 9, seed=3, video=True)])
    prompt = case.prompt(1, 4, 9, seed=1)
    with rk.apply(case.model, rk.Policy((), reducer=reducer)):
        with pytest.raises(RuntimeError):
            case.model(**{**video, "pixel_values_videos": video["pixel_values_videos"][..., :30]})
        reducer.images.clear()
        assert case.model(**case.batch([prompt])).logits.isfinite().all()
    assert [image.is_video for image in reducer.images] == [False]


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "internvl", "llava_onevision"])
@torch.no_grad()
def test_assisted_decoding(name):
    """Rejected guesses leave the caches, whose layers hold fewer tokens than the prompt."""
    case = load_shallow(name)
    prompt = case.prompt(1, 4, 9, seed=1)
    prompt = Prompt(torch.cat([prompt.ids, *[prompt.ids[-6:]] * 2]), prompt.features)
    inputs, settings, lengths = case.batch([prompt]), {**GREEDY, "max_new_tokens": 24, "eos_token_id": -1}, []
    note = case.model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    for policy in (rk.Policy((), reducer=Salient()), rk.Policy((rk.Stage(1, 0.5),), reducer=Salient())):
        with rk.apply(case.model, policy):
            expected = case.model.generate(**inputs, **settings)
            if not CROPS_BY_COUNT:
                with pytest.raises(NotImplementedError, match="assisted decoding, which cuts the cache"):
                    case.model.generate(**inputs, **settings, prompt_lookup_num_tokens=3)
                continue
            lengths.clear()
            assert torch.equal(case.model.generate(**inputs, **settings, prompt_lookup_num_tokens=3), expected)
        assert max(lengths[1:]) > 1  # some were guessed
        assert sum(lengths[1:]) > 23  # and some rejected
    note.remove()


@torch.no_grad()
def test_a_later_turn_of_the_whole_conversation(case):
    """`generate` cuts it by the first layer's cache, which holds survivors alone; nothing runs twice."""
    prompt, turn = case.prompt(1, 4, 9, seed=1), torch.tensor([5, 6, 7, 8])
    with rk.apply(case.model, rk.Policy((), reducer=Salient())) as routing:
        first = case.model.generate(**case.batch([prompt]), **GREEDY, return_dict_in_generate=True)
        if type(first.past_key_values).__name__.startswith("Qwen3_5"):
            pytest.skip("before transformers 5.6 linear attention forgets the cache in a call of several tokens")
        survivors = routing.trace.reduction.selected[0]
        whole = torch.cat([first.sequences[0], turn])
        cache = {cache_name(case.model.model): first.past_key_values}
        answer = case.model.generate(
            input_ids=whole[None], attention_mask=torch.ones_like(whole)[None], **cache, **GREEDY
        )
    kept = (whole != IMAGE) & (whole != VIDEO)
    kept[survivors] = True
    _, tokens = by_hand(case, Prompt(whole, prompt.features), kept)
    assert answer[0, len(whole) :].tolist() == tokens
