"""Reducers on models: dropped tokens never enter the language model, and everything else goes on as if they had."""

import copy
import math
import re
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial

import pytest
import torch
import transformers

import reroute_kernels as rk
from reroute_kernels.models.adapter import cache_name
from reroute_kernels.rankings import LastQuery, Remembered
from reroute_kernels.reducers import Nuwa
from tests.models.families import load
from tests.models.prompts import ACTIONS, IMAGE, batch, cached_lengths, llava_prompt, offset, selections
from tests.models.reduced_by_hand import reduced_prompt
from tests.models.slow_way import SlowWay

SCHEDULE = (rk.Stage(3, 0.2), rk.Stage(4, 0.1), rk.Stage(8, 0.08))
STEPS = 8
GREEDY = {"max_new_tokens": STEPS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
LLAVA = Nuwa(keep=0.3, per_cell=2)
QWEN = Nuwa(keep=0.6, per_cell=3, distance=0.8, quantile=0.1, keeps_own=False)


@pytest.fixture
def reducer(family):
    return LLAVA if family == "llava" else QWEN


def by_hand(model, inputs, reducer):
    def distance(grid):
        return reducer.distance * math.dist((0, 0), [size + size % 2 - 1 for size in grid])

    return reduced_prompt(
        model,
        inputs,
        lambda tokens: math.ceil(tokens * reducer.keep),
        reducer.per_cell,
        distance,
        reducer.quantile,
        reducer.keeps_own,
    )


@torch.no_grad()
def talk_by_hand(model, inputs, policy, turns):
    """Greedy answers to a prompt and to texts that follow, with every position given; logits, cache and selections."""
    arguments, visual, kept, delta = by_hand(model, inputs, policy.reducer)
    plain = replace(policy, reducer=None) if policy.schedule else None
    total = int((inputs["input_ids"] == IMAGE).sum())
    cache, answers, first = transformers.DynamicCache(config=model.config.get_text_config()), [], None
    slow = nullcontext() if plain is None else SlowWay(model, plain, visual, total)
    with slow:
        output = model(**arguments, past_key_values=cache, use_cache=True)
        first, selected = output.logits[0, -1], [] if plain is None else slow.selected
        lengths = cached_lengths(cache)

        # `generate` goes on from the last token, which in transformers 5.4 may stand before the end of an image, and
        # counts from the first one in a later turn.
        place, count = int(arguments["position_ids"][..., -1].max()) + 1, inputs["input_ids"].shape[1]

        def feed(tokens):
            nonlocal place, count
            count += tokens.shape[1]
            positions = torch.arange(place, place + tokens.shape[1])[None]
            place += tokens.shape[1]
            if arguments["position_ids"].ndim == 3:
                positions = positions.expand(3, -1, -1)
            return model(input_ids=tokens, position_ids=positions, past_key_values=cache)

        for turn in [None, *turns]:
            if turn is not None:
                place = count + delta
                output = feed(torch.cat([answers[-1][:, -1:], turn], dim=1))
            answers.append(output.logits[:, -1:].argmax(dim=-1))
            for _ in range(STEPS - 1):
                answers[-1] = torch.cat([answers[-1], feed(answers[-1][:, -1:]).logits[:, -1:].argmax(dim=-1)], dim=1)
    selected = [kept[stage].tolist() for stage in selected]
    return first, answers, lengths, selected, kept[visual].tolist()


def check(model, inputs, policy, turns=()):
    first, answers, lengths, selected, survivors = talk_by_hand(model, inputs, policy, turns)
    with rk.apply(model, policy) as routing, torch.no_grad():
        output = model(**inputs, use_cache=True)
        trace = routing.trace
        answer = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
        got, whole = [answer.sequences[:, -STEPS:]], None
        for turn in turns:
            # The new tokens alone: `generate` would cut off as many as the first layer has cached.
            whole = torch.cat([answer.sequences if whole is None else whole, turn], dim=1)
            answer = model.generate(
                input_ids=torch.cat([answer.sequences[:, -1:], turn], dim=1),
                attention_mask=torch.ones_like(whole),
                past_key_values=answer.past_key_values,
                **GREEDY,
                return_dict_in_generate=True,
            )
            got.append(answer.sequences[:, -STEPS:])
    assert trace.reduction.selected[0].tolist() == survivors
    assert selections(trace) == selected
    assert trace.reduction.scores is None
    assert_scored(trace, inputs, survivors)
    assert cached_lengths(output.past_key_values) == lengths
    torch.testing.assert_close(output.logits[0, -1], first, atol=1e-4, rtol=0)
    assert [each.tolist() for each in got] == [each.tolist() for each in answers]
    assert output.logits.shape[1] == inputs["input_ids"].shape[1]
    assert output.logits.isfinite().all()
    return trace


def assert_scored(trace, inputs, survivors):
    """Only candidates have scores, and the best of them were chosen."""
    visual, pool = (inputs["input_ids"][0] == IMAGE).nonzero().flatten(), survivors
    for stage in trace.stages:
        assert visual[~stage.scores[0].isnan()].tolist() == pool
        selected = torch.isin(visual, stage.selected[0])
        left = ~selected & ~stage.scores[0].isnan()
        assert not left.any() or stage.scores[0][selected].min() >= stage.scores[0][left].max()
        if trace.policy.action == "remove":
            pool = stage.selected[0].tolist()


POLICIES = {
    "reducer alone": {"schedule": ()},
    "reroute": {"schedule": SCHEDULE},
    "remove": {"schedule": SCHEDULE, "action": "remove"},
    "previous layer": {"schedule": SCHEDULE, "ranking": LastQuery("previous")},
    "previous layer, remove": {"schedule": SCHEDULE, "ranking": LastQuery("previous"), "action": "remove"},
    "three queries": {"schedule": SCHEDULE, "ranking": LastQuery("previous", queries=3, head_reduction="max")},
    "memory": {"schedule": SCHEDULE, "ranking": Remembered(LastQuery("previous"), decay=0.8)},
    "memory, remove": {"schedule": SCHEDULE, "ranking": Remembered(LastQuery(), decay=0.8), "action": "remove"},
}


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("title", POLICIES)
def test_generation_and_a_text_turn_on_the_kept_cache(model, prompt, reducer, title, images):
    turn = prompt(0, 3, 4, seed=6).ids[None]
    check(model, batch([prompt(images, 6, 14, seed=11)]), rk.Policy(**POLICIES[title], reducer=reducer), [turn])


@pytest.mark.parametrize(
    ("title", "side"),
    [("reducer alone", "right"), ("reroute", "left"), ("remove", "right"), ("three queries", "left")],
)
@torch.no_grad()
def test_batch_equals_its_samples(model, prompt, reducer, title, side):
    policy = rk.Policy(**POLICIES[title], reducer=reducer)
    prompts = [prompt(1, 4, 9, seed=1), prompt(2, 7, 20, seed=2), prompt(0, 4, 30, seed=3), prompt(1, 0, 2, seed=4)]
    together = batch(prompts, side)
    length = together["input_ids"].shape[1]
    with rk.apply(model, policy) as routing:
        logits = model(**together).logits
        trace = routing.trace
        answers = model.generate(**together, **GREEDY)[:, length:]
    for row, alone in enumerate(prompts):
        begin, inputs = offset(alone, length, side), batch([alone])
        if not alone.features:
            answer = model.generate(**inputs, **GREEDY)[0, -STEPS:]
            assert answers[row].tolist() == answer.tolist()
            assert trace.reduction.selected[row].tolist() == []
            continue
        first, answer, _, selected, survivors = talk_by_hand(model, inputs, policy, ())
        assert (trace.reduction.selected[row] - begin).tolist() == survivors
        assert selections(trace, row, begin) == selected
        torch.testing.assert_close(logits[row, begin + len(alone) - 1], first, atol=1e-4, rtol=0)
        assert answers[row].tolist() == answer[0][0].tolist()


@torch.no_grad()
def test_dropped_tokens_enter_no_layer(model, inputs, reducer):
    """Every layer runs, and caches, text and anchors alone; the tokens that are dropped change nothing after that."""
    seen = []
    layers = model.model.language_model.layers
    handles = [layer.mlp.register_forward_hook(lambda *given: seen.append(given[2].shape[1])) for layer in layers]
    with rk.apply(model, rk.Policy((), reducer=reducer)) as routing:
        output = model(**inputs, use_cache=True)
    for handle in handles:
        handle.remove()
    visual = int((inputs["input_ids"] == IMAGE).sum())
    expected = inputs["input_ids"].shape[1] - visual + math.ceil(visual * reducer.keep)
    assert seen == [expected] * 12
    assert cached_lengths(output.past_key_values) == [expected] * 12
    assert routing.trace.reduction.tokens == expected
    assert routing.trace.reduction.layer == 0
    assert routing.trace.stages == []


def test_text_only_prompt_runs_untouched(model, prompt, reducer):
    inputs = batch([prompt(0, 20, 11, seed=3)])
    expected = model.generate(**inputs, **GREEDY)
    with torch.no_grad():
        logits = model(**inputs).logits
    with rk.apply(model, rk.Policy(SCHEDULE, reducer=reducer)) as routing, torch.no_grad():
        assert torch.equal(model(**inputs).logits, logits)
        assert torch.equal(model.generate(**inputs, **GREEDY), expected)
    assert routing.trace is None


@pytest.mark.parametrize("action", ACTIONS)
def test_gradients_reach_the_vision_tower(model, inputs, reducer, action):
    core = model.model
    tower = core.vision_tower if hasattr(core, "vision_tower") else core.visual
    model.zero_grad()
    with rk.apply(model, rk.Policy(SCHEDULE, action, reducer=reducer)):
        model(**inputs).logits[0, -1].logsumexp(-1).backward()
    gradients = [each.grad for module in (tower, core.language_model) for each in module.parameters()]
    gradients = [each for each in gradients if each is not None]
    assert len(gradients) > 100
    assert all(each.isfinite().all() for each in gradients)
    assert sum(each.abs().sum() for each in gradients) > 0
    model.zero_grad()


def test_llava_next_tiles():
    """Tiles are reduced one by one; borders that are cut and newlines between rows are left as they are."""
    case = load("llava_next")
    inputs = case.batch([case.prompt(2, 6, 15, seed=1)])
    features, seen = {}, []

    class Half:
        def reduce(self, image):
            index = image.saliency.topk(image.features.shape[1] // 2).indices.sort().values
            seen.append((image.grid, image.features.shape[0]))
            return index, image.features.gather(1, index[:, :, None].expand(-1, -1, image.features.shape[2]))

    with torch.no_grad():
        features = case.model.model.get_image_features(inputs["pixel_values"], inputs["image_sizes"]).pooler_output
        with rk.apply(case.model, rk.Policy((), reducer=Half())) as routing:
            marked = case.model.model.get_image_features(inputs["pixel_values"], inputs["image_sizes"]).pooler_output
            output = case.model(**inputs, use_cache=True)
            answer = case.model.generate(**inputs, **GREEDY)
    assert seen == [((4, 4), 6)] * 3
    features, marked = torch.cat(list(features)), torch.cat(list(marked))
    stays = ~marked.isinf().any(dim=1)
    assert torch.equal(marked[stays], features[stays])
    newline = (features == case.model.model.image_newline).all(dim=1)
    assert newline.any()
    assert stays[newline].all()
    assert len(stays) // 3 < stays.sum() < len(stays)
    visual = (inputs["input_ids"][0] == IMAGE).nonzero().flatten()
    assert torch.equal(routing.trace.reduction.selected[0], visual[stays])
    # The same with the remaining tokens alone.
    kept = torch.ones(inputs["input_ids"].shape[1], dtype=torch.bool)
    kept[visual[~stays]] = False
    embeds = case.model.get_input_embeddings()(inputs["input_ids"])
    embeds[0, visual] = features
    positions = torch.arange(len(kept))[kept][None]
    with torch.no_grad():
        cache = transformers.DynamicCache(config=case.model.config.get_text_config())
        expected = case.model(inputs_embeds=embeds[:, kept], position_ids=positions, past_key_values=cache)
        torch.testing.assert_close(output.logits[0, -1], expected.logits[0, -1], atol=1e-4, rtol=0)
        tokens = []
        for place in range(len(kept), len(kept) + STEPS):
            tokens.append(int(expected.logits[0, -1].argmax()))
            expected = case.model(
                input_ids=torch.tensor([[tokens[-1]]]), position_ids=torch.tensor([[place]]), past_key_values=cache
            )
    assert answer[0, -STEPS:].tolist() == tokens


def test_keeping_everything_changes_nothing(model, inputs):
    class All:
        def reduce(self, image):
            count, tokens, _ = image.features.shape
            return torch.arange(tokens).expand(count, -1), image.features

    with torch.no_grad():
        expected = model(**inputs).logits
        with rk.apply(model, rk.Policy((), reducer=All())) as routing:
            torch.testing.assert_close(model(**inputs).logits, expected, atol=1e-5, rtol=0)
    assert len(routing.trace.reduction.selected[0]) == int((inputs["input_ids"] == IMAGE).sum())


class Uneven:
    """Leaves one token of the first image or frame, two of the second, and so on, and gives them as one flat index."""

    def reduce(self, image):
        count, tokens, _ = image.features.shape
        ordinals = torch.arange(tokens).expand(count, -1)
        index = (ordinals <= torch.arange(count)[:, None]).flatten().nonzero().flatten()
        return index, -image.features.flatten(0, 1)[index]


@torch.no_grad()
def test_different_numbers_of_tokens(prompt, model, family):
    """Flat choices of images that come together stay with their images, in a padded batch, too."""
    together = batch([prompt(2, 4, 9, seed=1), prompt(1, 7, 12, seed=2)])
    policy = rk.Policy((rk.Stage(3, 0.5), rk.Stage(8, 0.5)), reducer=Uneven())
    with rk.apply(model, policy) as routing:
        logits = model(**together).logits
        survivors = [each.tolist() for each in routing.trace.reduction.selected]
        answer = model.generate(**together, **GREEDY)
    images = [(row == IMAGE).nonzero().flatten().tolist() for row in together["input_ids"]]
    if family == "llava":  # the three images come as one tensor
        first, second = images[0][:196], images[0][196:]
        assert survivors == [first[:1] + second[:2], images[1][:3]]
    else:
        assert survivors == [[images[0][0], images[0][24]], images[1][:1]]
    assert logits.isfinite().all()
    assert answer.shape == (2, together["input_ids"].shape[1] + STEPS)


# Refusals


@pytest.mark.parametrize(
    ("made", "got"),
    [
        (lambda image: (torch.zeros(0, dtype=torch.int64), image.features[0, :0]), r"\(0,\) torch.int64 and \(0, "),
        (lambda image: (torch.zeros(3, dtype=torch.int64), image.features[0, :2]), r"\(3,\) torch.int64 and \(2, "),
        (lambda image: (torch.tensor(1), image.features[0, 1]), r"\(\) torch.int64 and \("),
        (lambda image: (torch.zeros(1, 2), image.features[:, :2]), r"\(1, 2\) torch.float32 and"),
        (
            lambda image: (torch.zeros(1, 2, dtype=torch.int64), image.features[:, :3]),
            r"\(1, 2\) torch.int64 and \(1, 3",
        ),
        (
            lambda image: (torch.zeros(1, 0, dtype=torch.int64), image.features[:, :0]),
            r"\(1, 0\) torch.int64 and \(1, 0",
        ),
        (lambda image: (None, image.features), "NoneType and"),
    ],
)
def test_results_of_another_shape(model, inputs, made, got):
    class Wrong:
        def reduce(self, image):
            return made(image)

    with (
        rk.apply(model, rk.Policy((), reducer=Wrong())),
        pytest.raises(TypeError, match=rf"reducer must give \(1, K\) int64 tokens, .* got {got}.*Wrong"),
        torch.no_grad(),
    ):
        model(**inputs)


@torch.no_grad()
def test_features_that_were_computed_without_it(model, inputs, reducer):
    """Silently running all tokens is the worst that could happen."""
    features = {name: inputs.pop(name) for name in ("pixel_values", "image_grid_thw") if name in inputs}
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    embeds[inputs["input_ids"] == IMAGE] = torch.cat(list(model.model.get_image_features(**features).pooler_output))
    ran = []
    handle = model.model.language_model.layers[0].register_forward_pre_hook(lambda *_: ran.append(True))
    with (
        given_embeddings(model, embeds),
        rk.apply(model, rk.Policy((), reducer=reducer)),
        pytest.raises(ValueError, match=r"image features must be computed .* 0 were dropped by it and 0 by another"),
    ):
        model(**inputs)
    handle.remove()
    assert not ran


@torch.no_grad()
def test_features_of_another_reducer(model, inputs, reducer):
    names = ("pixel_values", "image_grid_thw")
    features = {name: inputs[name] for name in names if name in inputs}
    with rk.apply(model, rk.Policy((), reducer=Nuwa(keep=0.1, per_cell=1))):
        others = torch.cat(list(model.model.get_image_features(**features).pooler_output))
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    embeds[inputs["input_ids"] == IMAGE] = others
    with (
        given_embeddings(model, embeds),
        rk.apply(model, rk.Policy((), reducer=reducer)),
        pytest.raises(ValueError, match=r"image features must be computed .* 0 were dropped by it and \d+ by another"),
    ):
        model(**{name: value for name, value in inputs.items() if name not in names})


@contextmanager
def given_embeddings(model, embeds):
    """Embeddings that the decoder is handed in place of ids."""
    handle = model.get_input_embeddings().register_forward_hook(lambda *_: embeds)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def test_broken_image_shows(model, inputs, reducer):
    """NaN features, as an overflow leaves them, are not taken for dropped ones."""
    inputs["pixel_values"] = torch.full_like(inputs["pixel_values"], math.nan)
    with rk.apply(model, rk.Policy((), reducer=reducer)) as routing:
        logits = model(**inputs).logits
    assert logits[0, -1].isnan().all()
    visual = int((inputs["input_ids"] == IMAGE).sum())
    assert len(routing.trace.reduction.selected[0]) == math.ceil(visual * reducer.keep)


@torch.no_grad()
def test_image_that_the_mask_hides(model, inputs, reducer):
    inputs["attention_mask"] = (inputs["input_ids"] != IMAGE).long()
    expected = model(**inputs).logits
    with rk.apply(model, rk.Policy((), reducer=reducer)) as routing:
        logits = model(**inputs).logits
    assert routing.trace is None
    text = inputs["attention_mask"][0].bool()
    torch.testing.assert_close(logits[0, text], expected[0, text], atol=1e-5, rtol=0)
    assert logits.isfinite().all()


def test_keeping_everything_in_every_step(model, inputs):
    """A reducer that may leave all tokens is not refused for having dropped none."""
    settings = {**GREEDY, "use_cache": False}
    expected = model.generate(**inputs, **settings)
    with rk.apply(model, rk.Policy((), reducer=Nuwa(keep=1.0, per_cell=4, quantile=0.0))):
        assert torch.equal(model.generate(**inputs, **settings), expected)


@pytest.mark.parametrize("name", ["vision_feature_layer", "vision_feature_select_strategy"])
def test_other_features_in_a_call(name):
    model = load("llava").model
    inputs = batch([llava_prompt(1, 5, 12, seed=1)])
    asked = {name: -1 if name == "vision_feature_layer" else "full"}
    with rk.apply(model, rk.Policy((), reducer=LLAVA)), torch.no_grad():
        for call in (model, partial(model.generate, **GREEDY)):
            with pytest.raises(NotImplementedError, match=rf"{name} must be .* as in the configuration|square images"):
                call(**inputs, **asked)
        model(**inputs, vision_feature_layer=-2, vision_feature_select_strategy="default")


def test_features_of_the_last_layer():
    """The outputs of other layers are freed meanwhile, and their memory is used again."""
    model = copy.deepcopy(load("llava").model)
    model.config.vision_feature_layer = -1
    check(model, batch([llava_prompt(1, 5, 12, seed=1)]), rk.Policy(SCHEDULE, reducer=LLAVA))


def test_feature_layer_that_is_no_output_of_one():
    model = copy.deepcopy(load("llava").model)
    model.config.vision_feature_layer = 0
    with pytest.raises(NotImplementedError, match=r"a vision_feature_layer of 1 to 3, got 0"):
        rk.apply(model, rk.Policy((), reducer=LLAVA))


def test_tower_of_two_models(model, family, reducer):
    other = copy.deepcopy(model)
    name = "vision_tower" if family == "llava" else "visual"
    setattr(other.model, name, getattr(model.model, name))
    policy = rk.Policy((), reducer=reducer)
    with rk.apply(model, policy):
        with pytest.raises(ValueError, match=r"whose vision tower belongs to another one, too"):
            rk.apply(other, policy)
        assert not other.model._forward_pre_hooks
        with rk.apply(model, rk.Policy(SCHEDULE, reducer=reducer), replace=True), rk.apply(other, rk.Policy(SCHEDULE)):
            pass
    with rk.apply(other, policy):
        pass


@torch.no_grad()
def test_cache_of_a_call_that_failed_at_its_end(model, inputs, reducer):
    """All layers hold as many tokens then, as if an unrouted prompt had filled them."""
    cache = transformers.DynamicCache(config=model.config.get_text_config())
    last = model.model.language_model.layers[-1].mlp

    def fail(*_):
        raise RuntimeError("broken")

    handle = last.register_forward_pre_hook(fail)
    with rk.apply(model, rk.Policy((), reducer=reducer)):
        with pytest.raises(RuntimeError, match="broken"):
            model(**inputs, past_key_values=cache)
        handle.remove()
        assert len(set(cached_lengths(cache))) == 1
        with pytest.raises(ValueError, match=f"{cache_name(model)} must come from a finished call"):
            model(input_ids=torch.tensor([[5]]), past_key_values=cache)


@torch.no_grad()
def test_copied_cache_knows_its_policy(model, inputs):
    """Rules of one's own may equal nothing but themselves."""

    class First:
        def reduce(self, image):
            count = image.features.shape[1] // 2
            return torch.arange(count).expand(len(image.features), -1), image.features[:, :count]

        def rank(self, candidates):
            return -candidates.ordinals.float()

    policy = rk.Policy(SCHEDULE, ranking=First(), reducer=First())
    step = {"input_ids": torch.tensor([[5]]), "position_ids": torch.tensor([[inputs["input_ids"].shape[1]]])}
    with rk.apply(model, policy):
        cache = model(**inputs, use_cache=True).past_key_values
        copied = copy.deepcopy(cache)
        assert torch.equal(model(**step, past_key_values=copied).logits, model(**step, past_key_values=cache).logits)


@pytest.mark.parametrize("name", ["glm4v", "glm4v_moe", "aya_vision"])
def test_other_families(name):
    model = load(name).model
    message = f"reducer must be None on a model of type {name!r}, got Nuwa.*llava, .* and smolvlm"
    with pytest.raises(NotImplementedError, match=message):
        rk.apply(model, rk.Policy((), reducer=LLAVA))


def test_other_vision_towers():
    with pytest.raises(
        NotImplementedError, match=r"vision tower with a class token, 'clip_vision_model', got 'pixtral'"
    ):
        rk.apply(load("llava-pixtral").model, rk.Policy((), reducer=LLAVA))


def test_prompt_that_ends_in_an_image(model, prompt, reducer):
    inputs = batch([prompt(1, 5, 12, seed=1)])
    end = int((inputs["input_ids"][0] == IMAGE).nonzero().max()) + 1
    inputs = {
        name: value[:, :end] if value.shape[:1] == (1,) and value.ndim == 2 else value for name, value in inputs.items()
    }
    if "image_grid_thw" in inputs:
        inputs["image_grid_thw"] = torch.tensor([[1, 8, 12]])

    class First:
        def reduce(self, image):
            return torch.zeros(len(image.features), 1, dtype=torch.int64), image.features[:, :1]

    with (
        rk.apply(model, rk.Policy((), reducer=First())),
        pytest.raises(ValueError, match=re.escape("input_ids must end with text where there is a reducer")),
        torch.no_grad(),
    ):
        model(**inputs)


@torch.no_grad()
def test_images_on_a_filled_cache(model, inputs, others, reducer):
    with rk.apply(model, rk.Policy((), reducer=reducer)):
        cache = model(**inputs, use_cache=True).past_key_values
        others["attention_mask"] = torch.ones(1, inputs["input_ids"].shape[1] + others["input_ids"].shape[1])
        with pytest.raises(
            NotImplementedError, match=f"{cache_name(model)} must be empty where a prompt brings images"
        ):
            model(**others, past_key_values=cache)


def test_turn_that_generate_cuts_wrongly(model, inputs, prompt, reducer):
    """It cuts off as many tokens as the first layer has cached, which are too few; the others are left out here."""
    turn = prompt(0, 3, 4, seed=6).ids[None]

    with rk.apply(model, rk.Policy(SCHEDULE, reducer=reducer)):
        answer = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
        whole = answer
        for number in range(2):
            ids = torch.cat([whole.sequences, turn + number], dim=1)
            mask = torch.ones_like(ids)
            alone = model.generate(
                input_ids=ids[:, -turn.shape[1] - 1 :],
                attention_mask=mask,
                past_key_values=copy.deepcopy(whole.past_key_values),
                **GREEDY,
                return_dict_in_generate=True,
            )
            whole = model.generate(
                input_ids=ids,
                attention_mask=mask,
                past_key_values=whole.past_key_values,
                **GREEDY,
                return_dict_in_generate=True,
            )
            assert whole.sequences[:, -STEPS:].tolist() == alone.sequences[:, -STEPS:].tolist()
            assert cached_lengths(whole.past_key_values) == cached_lengths(alone.past_key_values)
