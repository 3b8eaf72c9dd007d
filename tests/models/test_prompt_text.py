"""The text that reducers are handed: that of the row in which each image stands, of nothing else."""

import pytest
import torch

import reroute_kernels as rk
from reroute_kernels.models.prompt_text import PromptText
from reroute_kernels.reducers import CDPruner
from tests.models.families import load_shallow
from tests.models.prompts import IMAGE, VIDEO
from tests.models.slow_way import decoder_of

TOWERS = [
    "llava",
    "llava_next",
    "llava_onevision",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "qwen3_5",
    "internvl",
    "mistral3",
    "idefics3",
]
GREEDY = {"max_new_tokens": 2, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


class Texts:
    """Notes the text of each image, tile or frame, and whether it is of a video; leaves all tokens."""

    def __init__(self):
        self.seen = []

    def reduce(self, image):
        self.seen += [(text, image.is_video) for text in image.text]
        tokens = torch.arange(image.features.shape[1]).expand(len(image.features), -1)
        return tokens, image.features.clone()


def text_of(case, ids):
    """Embeddings of the tokens that are neither placeholders nor anything else's."""
    return case.model.model.get_input_embeddings()(ids[(ids != IMAGE) & (ids != VIDEO)])


def check(case, prompts, seen, answers=0):
    """Runs of images, tiles or frames with one text each belong to the prompts with images, in order."""
    expected = [text_of(case, prompt.ids[: len(prompt) - answers]) for prompt in prompts if prompt.features]
    runs = [text for number, text in enumerate(seen) if number == 0 or not torch.equal(text, seen[number - 1])]
    assert len(runs) == len(expected)
    assert all(map(torch.equal, runs, expected))


@pytest.mark.parametrize("name", TOWERS)
@torch.no_grad()
def test_each_image_is_handed_the_text_of_its_row(name):
    case, reducer = load_shallow(name), Texts()
    prompts = [case.prompt(1, 4, 9, seed=1), case.prompt(0, 5, 3, seed=2), case.prompt(2, 7, 12, seed=3)]
    with rk.apply(case.model, rk.Policy((), reducer=reducer)):
        for side in ("left", "right") if name != "qwen3_5" else ("left",):
            inputs = case.batch(prompts, side)
            case.model(**inputs)
            check(case, prompts, [text for text, _ in reducer.seen])
            reducer.seen.clear()
        case.model.generate(**case.batch(prompts), **GREEDY)
        check(case, prompts, [text for text, _ in reducer.seen])
        reducer.seen.clear()
        # Without a mask, in a batch of one, and twice as many rows for beams.
        inputs = case.batch(prompts[:1])
        del inputs["attention_mask"]
        case.model.generate(**inputs, **GREEDY | {"num_beams": 2})
        check(case, prompts[:1], [text for text, _ in reducer.seen])


@pytest.mark.parametrize("name", ["llava_onevision", "qwen2_5_vl", "qwen3_vl"])
@torch.no_grad()
def test_images_and_videos_of_a_batch(name):
    case, reducer = load_shallow(name), Texts()
    prompts = [
        case.prompt(0, 4, 9, seed=4, video=True),
        case.prompt(2, 3, 5, seed=3),
        case.prompt(0, 2, 7, seed=5, video=True),
    ]
    with rk.apply(case.model, rk.Policy((), reducer=reducer)):
        for call in (case.model, case.model.generate):
            call(**case.batch(prompts), **(GREEDY if call == case.model.generate else {}))
            check(case, prompts[::2], [text for text, is_video in reducer.seen if is_video])
            check(case, prompts[1:2], [text for text, is_video in reducer.seen if not is_video])
            reducer.seen.clear()


@torch.no_grad()
def test_answers_that_are_scored_are_no_text():
    case, reducer = load_shallow("llava"), Texts()
    prompts = [case.prompt(1, 4, 9, seed=1), case.prompt(1, 7, 12, seed=2)]
    inputs = case.batch(prompts)
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -5:] = inputs["input_ids"][:, -5:]
    with rk.apply(case.model, rk.Policy((), reducer=reducer)) as routing:
        case.model(**inputs, labels=labels)
        check(case, prompts, [text for text, _ in reducer.seen], answers=5)
        reducer.seen.clear()
        routing.answers_from = inputs["input_ids"].shape[1] - 3
        case.model(**inputs)
        check(case, prompts, [text for text, _ in reducer.seen], answers=3)


@torch.no_grad()
def test_masks_of_four_dimensions():
    case, reducer = load_shallow("llava"), Texts()
    prompts = [case.prompt(1, 4, 9, seed=1), case.prompt(1, 7, 12, seed=2)]
    inputs = case.batch(prompts)
    length = inputs["input_ids"].shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    inputs["attention_mask"] = (causal & inputs["attention_mask"].bool()[:, None])[:, None]
    with rk.apply(case.model, rk.Policy((), reducer=reducer)):
        case.model(**inputs)
    check(case, prompts, [text for text, _ in reducer.seen])


@torch.no_grad()
def test_images_without_their_prompt_are_refused():
    case = load_shallow("llava")
    prompt = case.prompt(1, 4, 9, seed=1)
    inputs = case.batch([prompt])
    embeds = case.model.model.get_input_embeddings()(inputs["input_ids"])
    refused = pytest.raises(NotImplementedError, match=r"^reducer needs the text of the prompt in which images stand")
    with rk.apply(case.model, rk.Policy((), reducer=CDPruner(0.5))):
        with refused:
            case.model.get_image_features(inputs["pixel_values"])
        with refused:
            case.model(inputs_embeds=embeds, pixel_values=inputs["pixel_values"])
        with refused:  # another number of images than there is room for
            case.model(**inputs | {"pixel_values": inputs["pixel_values"].repeat(2, 1, 1, 1)})
        assert case.model(**inputs).logits.isfinite().all()


@pytest.mark.parametrize(
    ("images", "rows"),
    [
        ([3, 4], [0, 2]),
        ([3, 2, 2], [0, 2, 2]),
        ([1, 2, 4], [0, 0, 2]),
        ([7], None),  # over two rows
        ([3], None),
        ([3, 4, 1], None),
        ([0, 3, 4], None),
    ],
)
def test_rows_are_found_by_counts(images, rows):
    ids = torch.tensor([[9, 9, 9, 1, 1], [1, 1, 1, 1, 9], [1, 9, 9, 9, 9]])
    valid = torch.ones_like(ids, dtype=torch.bool)
    valid[1, 4] = False
    assert PromptText(ids, ids != 9, valid).rows_of(images, 9) == rows


def test_a_row_s_text_is_embedded_once():
    prompt = PromptText(torch.tensor([[5, 9, 6], [9, 7, 8]]), torch.tensor([[1, 0, 1], [0, 1, 1]]).bool(), None)
    table, calls = torch.nn.Embedding(10, 4), []
    table.register_forward_hook(lambda *given: calls.append(given[1][0].tolist()))
    first, second, third = prompt.embedded([0, 0, 1], table)
    assert first is second
    assert third.shape == (2, 4)
    assert calls == [[5, 6], [7, 8]]
    assert not third.requires_grad


def test_later_prompts_are_not_ranked_by_earlier_text():
    """Nothing of a call that failed, or ended, is text of the next one."""
    case, reducer = load_shallow("llava"), Texts()
    first, second = case.prompt(1, 4, 9, seed=1), case.prompt(1, 5, 6, seed=2)

    def fail(layer, args):
        raise RuntimeError("a layer failed")

    with rk.apply(case.model, rk.Policy((), reducer=reducer)), torch.no_grad():
        handle = decoder_of(case.model).layers[1].register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="a layer failed"):
            case.model(**case.batch([first]))
        handle.remove()
        reducer.seen.clear()
        case.model.generate(**case.batch([second]), **GREEDY)
        check(case, [second], [text for text, _ in reducer.seen])
        with pytest.raises(NotImplementedError, match=r"^reducer needs the text"):
            case.model.get_image_features(case.batch([first])["pixel_values"])
