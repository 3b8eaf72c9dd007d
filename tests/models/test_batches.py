"""A batch equals its prompts alone, whatever the padding, the action and the number of images."""

import pytest
import torch

import reroute_kernels as rk
from tests.models.prompts import ACTIONS, IMAGE, SCHEDULE, batch, cached_lengths, offset, policy, selections

GREEDY = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
SIDES = ("left", "right")


@pytest.fixture
def prompts(prompt):
    """Different lengths, one image, two images, and none."""
    return [prompt(1, 4, 9, seed=1), prompt(2, 7, 20, seed=2), prompt(0, 4, 30, seed=3)]


@torch.no_grad()
def alone(model, prompts, policy):
    """Last logits, selections and cached lengths of each prompt on its own."""
    results = []
    for prompt in prompts:
        with rk.apply(model, policy) as routing:
            output = model(**batch([prompt]), use_cache=True)
        selected = selections(routing.trace) if routing.trace else [[]] * len(policy.schedule)
        results.append((output.logits[0, -1], selected, cached_lengths(output.past_key_values)))
    return results


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("action", ACTIONS)
@torch.no_grad()
def test_forward_of_a_padded_batch(model, prompts, action, side, attention):
    model.set_attn_implementation(attention)
    expected = alone(model, prompts, policy(action))
    with rk.apply(model, policy(action)) as routing:
        output = model(**batch(prompts, side), use_cache=True)
    length = output.logits.shape[1]
    assert length == max(map(len, prompts))
    for row, (prompt, (logits, selected, _)) in enumerate(zip(prompts, expected, strict=True)):
        begin = offset(prompt, length, side)
        assert selections(routing.trace, row, begin) == selected
        last = begin + len(prompt) - 1
        torch.testing.assert_close(output.logits[row, last], logits, atol=1e-4, rtol=0)
    longest = [max(lengths) for lengths in zip(*(lengths for _, _, lengths in expected), strict=True)]
    first = SCHEDULE[0].layer
    assert cached_lengths(output.past_key_values)[first:] == longest[first:]


@pytest.mark.everyday(10)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("first", [0, 2], ids=["decision-at-layer-0", "decision-at-layer-2"])
@pytest.mark.filterwarnings("ignore:.*right-padding.*")
def test_generate_on_a_padded_batch(model, prompts, action, side, attention, first):
    model.set_attn_implementation(attention)
    this = policy(action, (rk.Stage(first, 0.4), *SCHEDULE[1:]))
    with rk.apply(model, this) as routing:
        single = [model.generate(**batch([prompt]), **GREEDY)[0, -12:].tolist() for prompt in prompts]
        together = model.generate(**batch(prompts, side), **GREEDY)[:, -12:].tolist()
    assert routing.trace.visual_counts == [int((prompt.ids == 500).sum()) for prompt in prompts]
    assert together == single


@pytest.mark.parametrize("action", ACTIONS)
@torch.no_grad()
def test_several_images_are_one_pool(model, prompt, action):
    two_images = prompt(2, 4, 9, seed=5)
    with rk.apply(model, policy(action)) as routing:
        model(**batch([two_images]))
    visual = (two_images.ids == 500).nonzero().flatten()
    for stage in routing.trace.stages:
        assert len(stage.selected[0]) == int(len(visual) * stage.keep)
        assert set(stage.selected[0].tolist()) <= set(visual.tolist())
    first_image, last_image = visual[: len(visual) // 3], visual[-len(visual) // 3 :]
    selected = set(routing.trace.stages[0].selected[0].tolist())
    assert selected & set(first_image.tolist())
    assert selected & set(last_image.tolist())


@pytest.mark.parametrize("action", ACTIONS)
@torch.no_grad()
def test_permuted_samples_permute_results(model, prompts, action):
    order = [2, 0, 1]
    with rk.apply(model, policy(action)) as routing:
        logits = model(**batch(prompts)).logits
        selected = [selections(routing.trace, row) for row in range(3)]
        permuted = model(**batch([prompts[row] for row in order])).logits
        for place, row in enumerate(order):
            assert selections(routing.trace, place) == selected[row]
            torch.testing.assert_close(permuted[place, -1], logits[row, -1], atol=1e-4, rtol=0)


@pytest.mark.parametrize("action", ACTIONS)
@torch.no_grad()
def test_same_call_twice_is_bitwise_the_same(model, prompts, action):
    with rk.apply(model, policy(action)):
        first, second = (model(**batch(prompts)).logits for _ in range(2))
    assert torch.equal(first, second)


@torch.no_grad()
def test_prompt_that_ends_in_an_image(model, prompt):
    """The next token is predicted from the last one, so a visual token there always runs."""
    ends_in_image = prompt(1, 9, 0, seed=7)
    keep = len(ends_in_image) - int((ends_in_image.ids == 500).nonzero()[-1]) - 1
    ends_in_image.ids = ends_in_image.ids[: len(ends_in_image) - keep]
    last = len(ends_in_image) - 1
    with rk.apply(model, policy()) as routing:
        model(**batch([ends_in_image]))
    visual = int((ends_in_image.ids == 500).sum())
    for stage in routing.trace.stages:
        assert stage.selected[0][-1] == last
        assert len(stage.selected[0]) == int(visual * stage.keep) + 1


def cut_behind_its_image(prompt):
    """The prompt without the text behind its image."""
    prompt.ids = prompt.ids[: int((prompt.ids == IMAGE).nonzero()[-1]) + 1]
    return prompt


@torch.no_grad()
def test_text_behind_a_prompt_that_ends_with_an_image(model, prompt):
    """It stands behind all of the image, whatever the padding."""
    prompts = [prompt(1, 6, 15, seed=1), cut_behind_its_image(prompt(1, 3, 9, seed=2))]
    step = {"input_ids": torch.tensor([[7], [8]])}
    with rk.apply(model, policy()):
        inputs = batch(prompts, "right")
        cache = model(**inputs, use_cache=True).past_key_values
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
        logits = model(**step, attention_mask=mask, past_key_values=cache).logits
        for row, alone in enumerate(prompts):
            cache = model(**batch([alone]), use_cache=True).past_key_values
            expected = model(input_ids=step["input_ids"][row, None], past_key_values=cache).logits[0]
            torch.testing.assert_close(logits[row], expected, atol=1e-4, rtol=0)


def test_generate_behind_a_prompt_that_ends_with_an_image(model, prompt):
    """If an image's positions have several axes, `generate` goes on from its last token alone."""
    prompts = [prompt(1, 6, 15, seed=1), cut_behind_its_image(prompt(1, 3, 9, seed=2))]
    settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with rk.apply(model, policy()):
        alone = [model.generate(**batch([one]), **settings)[0, -4:].tolist() for one in prompts]
        assert model.generate(**batch(prompts, "left"), **settings)[:, -4:].tolist() == alone
        if "image_grid_thw" in batch(prompts):
            with pytest.raises(NotImplementedError, match="attention_mask must put padding on the left in generate"):
                model.generate(**batch(prompts, "right"), **settings)
        else:
            assert model.generate(**batch(prompts, "right"), **settings)[:, -4:].tolist() == alone


@torch.no_grad()
def test_positions_of_a_prompt_are_not_those_that_a_later_call_counts(model, inputs):
    """A model that is given no positions counts its cache, also in a layer that lacks tokens of the prompt."""
    if "image_grid_thw" in inputs:
        pytest.skip("a model of several axes keeps how far its positions are from counts")
    inputs["position_ids"] = torch.arange(inputs["input_ids"].shape[1])[None] + 5

    def step():
        cache = model(**inputs, use_cache=True).past_key_values
        return model(input_ids=torch.tensor([[7]]), past_key_values=cache).logits

    expected = step()
    with rk.apply(model, policy(schedule=(rk.Stage(0, 1.0),))):
        torch.testing.assert_close(step(), expected, atol=1e-4, rtol=0)
