"""Every way of calling on every model, against the same call done the slow way.

By default the three families that differ most are called in every way, the others in three. With `--support-record` all
families are called in every way, and the outcomes become the table of docs/models.md. With `--all-types` the types that
tests hand the features of their images are called in every way, too.
"""

import contextlib
import copy
import inspect
import json
import re
import tempfile
from functools import cache, partial
from pathlib import Path
from unittest import mock

import pytest
import torch
import transformers
from torch import nn

import reroute_kernels as rk
from reroute_kernels.models.adapter import cache_name
from reroute_kernels.models.checkpointing import recomputes_hooks
from reroute_kernels.rankings import LastQuery
from tests.models.families import MODELS, OTHERS, load, load_shallow
from tests.models.prompts import ACTIONS, IMAGE, Prompt, selections
from tests.models.slow_way import SlowWay, decoder_of, layer_types
from tests.models.tensor_parallel_worker import on_two_ranks

GREEDY = {
    "max_new_tokens": 8,
    "do_sample": False,
    "eos_token_id": None,
    "pad_token_id": 0,
    "return_dict_in_generate": True,
    "output_logits": True,
}
MODELS_IN_EVERY_WAY = ("llava", "qwen2_5_vl", "qwen3_vl")
WAYS_OF_EVERY_MODEL = ("prompt", "padding left", "greedy", "contiguous positions")
NEEDS_CHECKPOINT = ("tensor parallelism",)
"""Ways that load a model from files, which do not hold what hands features to it."""
RECORDS = sorted((Path(__file__).parents[2] / "bench" / "results" / "models").glob("*.json"))
WAYS = {}
DESCRIPTIONS = {}


def way(title, description):
    def add(function):
        WAYS[title], DESCRIPTIONS[title] = function, description
        return function

    return add


class Refused(Exception):
    """A way of calling that raised the expected error; the message holds it."""


class NotOffered(Exception):
    """Something that the model or transformers itself does not do; the message is one of `NOT_OFFERED`."""


OFFLOAD = "CPU offload", "disk offload"
BEAMS = "beam search", "num_return_sequences"
CACHES = "static cache", "offloaded cache"
NOT_OFFERED = (
    # Reasons that the model or transformers states as such, with the ways of calling that they stand in.
    ("no video input of its own", ["video"], None),
    ("transformers: Chunked prefill cannot split the raw multimodal inputs", ["prefill in chunks"], None),
    ("transformers: Cannot use prefill chunking without a cache", ["prefill in chunks"], None),
    ("transformers: assisted generation is not supported with stateful models", ["assisted decoding"], None),
    (r"transformers: You passed `inputs_embeds` to `.generate\(\)`", ["inputs_embeds"], None),
    (r"transformers: \w+ does not support an attention implementation through torch's flex", ["flex attention"], None),
    # Others, with the models that they are known of.
    (
        "transformers: Sizes of tensors must match",  # before 5.23
        ["prefill in chunks"],
        "ernie4_5_vl_moe glm4v glm4v_moe glm46v glm_ocr paddleocr_vl qwen2_vl qwen2_5_vl qwen3_vl qwen3_vl_moe qwen3_5 "
        "qwen3_5_moe",
    ),
    # Features by layer, and beside those of the images.
    ("transformers: 'pooler_output'", ["prefill in chunks"], "granite4_vision"),
    ("transformers: 'NoneType' object is not subscriptable", ["prefill in chunks"], "ovis2"),
    # Masks of several turns on convolutions.
    ("transformers: The size of tensor a", ["later turn with an image"], "lfm2_vl"),
    # Older ones split the pixels of the prompts for their beams; those of handed features are too few, or lack sizes.
    ("transformers: split_with_sizes expects", BEAMS, "ernie4_5_vl_moe glm_ocr paddleocr_vl"),
    ("transformers: The number of image tokens does not match", BEAMS, "video_llama_3"),
    # Kinds of tokens beside guessed ones.
    ("transformers: The shape of the mask", ["assisted decoding"], "ernie4_5_vl_moe"),
    ("transformers: the prompt sees what is guessed", ["assisted decoding"], "paligemma"),
    # Weights of modules that are read beside them; images that `generate` encodes outside of any forward.
    (
        "transformers: Cannot copy out of meta tensor",
        OFFLOAD,
        "granite_docling lfm2_vl llava_next qwen3_vl qwen3_vl_moe qwen3_5 qwen3_5_moe",
    ),
    (
        r"transformers: Tensor\.item\(\) cannot be called on meta tensors",
        OFFLOAD,
        "glm4v glm4v_moe glm46v granite_docling idefics3",
    ),
    (
        "transformers: Tensor on device (meta|cpu) is not on the expected device (meta|cpu)",
        OFFLOAD,
        "gemma4-e glm4v glm4v_moe glm46v glmga llava_onevision",
    ),
    (r"transformers: it is given a Qwen3_5(Moe)?DynamicCache", CACHES, "qwen3_5 qwen3_5_moe"),
    (r"transformers: it is given a Lfm2HybridConvCache", CACHES, "lfm2_vl"),
    ("transformers: no plan that splits its heads", ["tensor parallelism"], "qwen3_vl"),
    ("transformers: aten.mm.default got mixed torch.Tensor and DTensor", ["tensor parallelism"], "aya_vision"),
    ("transformers: You set `ignore_mismatched_sizes` to `False`", ["tensor parallelism"], "qwen3_vl_moe"),  # split
)
"""Reasons, with the ways of calling and the models that they stand for; None: for any that states it."""


def expect_known(name: str, title: str, reason: object) -> None:
    """Fail for what the unrouted model does not do, unless `NOT_OFFERED` states it of this model and way of calling."""
    assert any(
        re.match(pattern, str(reason)) and title in ways and (names is None or name in names.split())
        for pattern, ways, names in NOT_OFFERED
    ), f"{name} does not do this unrouted either, which is not known: {reason}"


def pytest_generate_tests(metafunc):
    if {"name", "title"} <= set(metafunc.fixturenames):
        every = metafunc.config.getoption("--support-record")
        cells = [
            (name, title)
            for name in MODELS
            for title in WAYS
            if every or name in MODELS_IN_EVERY_WAY or title in WAYS_OF_EVERY_MODEL
        ]
        if metafunc.config.getoption("--all-types"):
            cells += [(name, title) for name in OTHERS for title in WAYS if title not in NEEDS_CHECKPOINT]
        compiled = [cell for cell in cells if cell[1] == "torch.compile"]  # which take longest
        marked = [pytest.param(*cell, marks=pytest.mark.rest if cell in compiled[1:] else ()) for cell in cells]
        metafunc.parametrize(("name", "title"), marked, ids=["-".join(cell).replace(" ", "_") for cell in cells])


def test_way_of_calling(name, title, record_property):
    case, said = load(name), "works"
    try:
        WAYS[title](case)
    except Refused as refused:
        said = f"refused: {refused}"
    except NotOffered as reason:
        expect_known(name, title, reason)
        said = f"not offered: {reason}"
    finally:
        torch._dynamo.reset()
    if name in MODELS:
        record_property("cell", (name, list(WAYS).index(title), title, DESCRIPTIONS[title], said))


@pytest.mark.parametrize("record", RECORDS, ids=lambda path: path.stem)
def test_committed_record_has_every_cell(record, pytestconfig):
    """The records of `make test-matrix` are of these models and ways, and nothing failed."""
    if pytestconfig.getoption("--support-record"):
        pytest.skip("the record is being written")
    cells = json.loads(record.read_text())["cells"]
    assert {name: set(ways) for name, ways in cells.items()} == {name: set(WAYS) for name in MODELS}
    outcomes = {outcome.split(":")[0] for ways in cells.values() for outcome in ways.values()}
    assert outcomes == {"works", "refused", "not offered"}


# Helpers that the ways share


def deciding_layers(case):
    """Layers of full attention, up to the first one whose keys later layers read."""
    decoder = decoder_of(case.model)
    kinds = layer_types(decoder)
    caching = len(kinds) - (getattr(decoder.config, "num_kv_shared_layers", None) or 0)
    last = min({kind: number for number, kind in enumerate(kinds[:caching])}.values())  # the last one of each kind
    able = [number for number, kind in enumerate(kinds) if kind == "full_attention"]
    return able if caching == len(kinds) else [number for number in able if number <= last]


def schedule(case):
    """Decisions that leave the first attention layer whole, so that transformers can count a conversation by it."""
    kinds = layer_types(decoder_of(case.model))
    first = next(number for number, kind in enumerate(kinds) if kind != "linear_attention")
    layers = [number for number in deciding_layers(case) if number > first]
    layers = layers if len(layers) < 4 else [layers[0], layers[len(layers) // 3], layers[2 * len(layers) // 3]]
    return tuple(rk.Stage(layer, keep) for layer, keep in zip(layers, (0.4, 0.3, 0.2), strict=False))


def policies(case, **choices):
    return [rk.Policy(schedule(case), action, **choices) for action in ACTIONS]


def hybrid(case):
    """Whether layers of the stages depend on the last tokens of a row."""
    return set(layer_types(decoder_of(case.model))) != {"full_attention"}


def sees_images(case):
    """Whether the tokens of an image see each other."""
    config = decoder_of(case.model).config
    named = getattr(config, "use_bidirectional_attention", None) == "vision"
    return named or config.model_type in ("gemma", "gemma3_text")


def refusal(match, call, model):
    """Run a call that must be refused, before the first layer runs."""
    ran = []
    handle = decoder_of(model).layers[0].register_forward_pre_hook(lambda *_: ran.append(True))
    try:
        with pytest.raises((NotImplementedError, ValueError), match=match) as caught:
            call()
    finally:
        handle.remove()
    assert not ran
    raise Refused(str(caught.value))


@torch.no_grad()
def offered(call):
    """Result of a call on the unrouted model, if transformers does it at all."""
    try:
        return call()
    except Exception as error:
        first_line = str(error).partition("\n")[0]
        raise NotOffered(f"transformers: {first_line}") from error


def one_image(case):
    return case.prompt(1, 6, 15, seed=1)


def two_images(case):
    return case.prompt(2, 4, 9, seed=2)


def text_only(case):
    return case.prompt(0, 4, 30, seed=3)


def equal(actual, expected, atol=1e-4):
    """Compare the results of two calls: tokens exactly, logits closely."""
    if hasattr(expected, "sequences"):
        assert actual.sequences.tolist() == expected.sequences.tolist()
        actual, expected = torch.stack(actual.logits), torch.stack(expected.logits)
    elif hasattr(expected, "logits"):
        actual, expected = actual.logits, expected.logits
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


@torch.no_grad()
def compare(case, call, model=None, visual=None, routed=None, routed_call=None, every_policy=True, **choices):
    """Both actions of one call, routed and done the slow way.

    Args:
        call: gives an output of the model or of generate.
        model: in place of the family's.
        visual: for calls without ids.
        routed, routed_call: the model to apply the policy to and the call of it, if they are others.
        choices: of the policies, beside their schedules and actions.
    """
    model = case.model if model is None else model
    for this in policies(case, **choices)[: None if every_policy else 1]:
        torch.manual_seed(0)
        with SlowWay(model, this, visual) as slow:
            expected = call()
        torch.manual_seed(0)
        with rk.apply(model if routed is None else routed, this) as routing:
            actual = (routed_call or call)()
        assert slow.selected
        assert all(selections(routing.trace, row) == slow.selected for row in range(len(routing.trace.visual_counts)))
        equal(actual, expected)


def generate(case, prompts, **settings):
    return lambda: case.model.generate(**case.batch(prompts), **{**GREEDY, **settings})


def compare_batch(case, side="left", routed_in=lambda case: contextlib.nullcontext(), choices=None, **settings):
    """A batch of different prompts against each of them alone, through a call and through generate."""
    prompts = [one_image(case), two_images(case), text_only(case)]
    together = case.batch(prompts, side)
    length = together["input_ids"].shape[1]
    for this in policies(case, **(choices or {})):
        with rk.apply(case.model, this) as routing, torch.no_grad(), routed_in(case):
            logits = case.model(**together).logits
            trace = routing.trace
            answers = case.model.generate(**together, **{**GREEDY, **settings})
        for row, prompt in enumerate(prompts):
            begin = length - len(prompt) if side == "left" else 0
            with SlowWay(case.model, this) as slow, torch.no_grad():
                expected = case.model(**case.batch([prompt])).logits[0]
                answer = case.model.generate(**case.batch([prompt]), **GREEDY)
            if len(trace.stages[0].selected[row]):
                assert selections(trace, row, begin) == slow.selected
            else:
                assert not slow.selected
            torch.testing.assert_close(logits[row, begin + len(prompt) - 1], expected[-1], atol=1e-4, rtol=0)
            assert answers.sequences[row, length:].tolist() == answer.sequences[0, len(prompt) :].tolist()
            torch.testing.assert_close(
                torch.stack(answers.logits)[:, row], torch.stack(answer.logits)[:, 0], atol=1e-4, rtol=0
            )


def three_axes(case, inputs):
    """Positions of a conversation for families that take them from the sizes of its images, else none."""
    core = case.model.model
    if not hasattr(core, "get_rope_index"):
        return None
    names = ("input_ids", "mm_token_type_ids", "image_grid_thw", "video_grid_thw", "target_sizes", "attention_mask")
    return core.get_rope_index(**{name: inputs[name] for name in names if name in inputs})[0].long()


def joined(case, parts):
    """A conversation of prompts and generated tokens: its arguments as one prompt."""
    features = [part.features for part in parts if part.features]
    return Prompt(torch.cat([part.ids for part in parts]), case._merged(features, dim=1))


# The ways


@way("prompt", "one forward call: decisions at several layers, at the first that may decide, and at all of them")
def _(case):
    layers = deciding_layers(case)
    prompts = [one_image(case), two_images(case)]
    for prompt in prompts:
        compare(case, lambda prompt=prompt: case.model(**case.batch([prompt])))
    # From the first layer that may decide, and in all of them.
    for stages in ((layers[0],), tuple(layers)):
        for action in ACTIONS:
            this = rk.Policy([rk.Stage(layer, 0.5 / (1 + place)) for place, layer in enumerate(stages)], action)
            with SlowWay(case.model, this) as slow, torch.no_grad():
                expected = case.model(**case.batch(prompts[:1])).logits
            with rk.apply(case.model, this) as routing, torch.no_grad():
                equal(case.model(**case.batch(prompts[:1])).logits, expected)
            assert selections(routing.trace) == slow.selected


@way("padding left", "three prompts (one image, two, none) in one batch: a forward call and `generate`")
def _(case):
    compare_batch(case, "left")


@way("padding right", "the same, padded on the other side")
def _(case):
    if hybrid(case):
        inputs = case.batch([one_image(case), two_images(case)], "right")
        with rk.apply(case.model, policies(case)[0]):
            refusal("attention_mask must put padding on the left", lambda: case.model(**inputs), case.model)
    compare_batch(case, "right")


@way("several images", "two images of different sizes in a prompt")
def _(case):
    compare(case, generate(case, [two_images(case)]))


@way("contiguous positions", "`generate` where tokens are numbered by what runs in a stage, also of a padded batch")
def _(case):
    compare(case, generate(case, [two_images(case)]), positions="contiguous")
    compare_batch(case, choices={"positions": "contiguous"})


@way("ranking by the layer before", "`generate` where the layer before a decision ranks for it, also of a padded batch")
def _(case):
    ranking = LastQuery("previous")
    if hybrid(case):
        with pytest.raises(NotImplementedError, match="must decide after layers with full attention") as caught:
            rk.apply(case.model, policies(case, ranking=ranking)[0])
        raise Refused(str(caught.value))
    compare(case, generate(case, [two_images(case)]), ranking=ranking)
    compare_batch(case, choices={"ranking": ranking})


@way("video", "a video in a prompt")
def _(case):
    if not case.has_video:
        assert "pixel_values_videos" not in inspect.signature(case.model.forward).parameters
        raise NotOffered("no video input of its own: frames come as images")
    compare(case, generate(case, [case.prompt(0, 6, 15, seed=1, video=True)]))


@way("inputs_embeds", "embeddings and pixel values in place of ids")
def _(case):
    inputs = case.batch([two_images(case)])
    ids = inputs.pop("input_ids")
    if (positions := three_axes(case, {"input_ids": ids, **inputs})) is not None:
        inputs["position_ids"] = positions
    inputs.pop("mm_token_type_ids", None)
    inputs["inputs_embeds"] = case.model.get_input_embeddings()(ids).detach()
    compare(case, lambda: case.model(**inputs), visual=ids[0] == IMAGE)
    offered(lambda: case.model.generate(**inputs, **{**GREEDY, "max_new_tokens": 1}))
    compare(case, lambda: case.model.generate(**inputs, **GREEDY), visual=ids[0] == IMAGE)
    for name in [name for name in inputs if name.startswith(("pixel", "image"))]:
        inputs.pop(name)
    with rk.apply(case.model, policies(case)[0]), pytest.raises(ValueError, match="input_ids must be given"):
        case.model(**inputs)  # nothing tells which tokens are visual


@way("greedy", "`generate`")
def _(case):
    compare(case, generate(case, [one_image(case)]))


@way("sampling", "`generate(do_sample=True)`, with the same random numbers")
def _(case):
    compare(case, generate(case, [one_image(case)], do_sample=True, temperature=0.8, top_k=20))


@way("beam search", "`generate(num_beams=3)`, also of a batch")
def _(case):
    offered(generate(case, [one_image(case)], num_beams=3))
    compare(case, generate(case, [one_image(case)], num_beams=3))
    # Some versions repeat the tiles of an image one by one, not image by image, for the beams.
    tiles = case.name.startswith(("aya", "internvl")) or case.name in OTHERS
    prompts = [one_image(case), case.prompt(1, 4, 20, seed=2) if tiles else two_images(case)]
    with rk.apply(case.model, policies(case)[0]):
        together = generate(case, prompts, num_beams=3)().sequences[:, -8:].tolist()
    for prompt, tokens in zip(prompts, together, strict=True):
        with SlowWay(case.model, policies(case)[0]):
            assert tokens == generate(case, [prompt], num_beams=3)().sequences[0, -8:].tolist()


@way("num_return_sequences", "three samples, and two of four beams")
def _(case):
    offered(generate(case, [one_image(case)], do_sample=True, num_return_sequences=3))
    compare(case, generate(case, [one_image(case)], do_sample=True, num_return_sequences=3))
    compare(case, generate(case, [one_image(case)], num_beams=4, num_return_sequences=2))


@way("later turn of text", "more text on the cache that `generate` returned")
def _(case):
    first, text = one_image(case), torch.randint(3, 400, (1, 7), generator=torch.Generator().manual_seed(0))

    def call():
        turn = case.model.generate(**case.batch([first]), **GREEDY)
        conversation = torch.cat([turn.sequences, text], dim=1)
        mask = torch.ones_like(conversation)
        inputs = {"input_ids": conversation, "attention_mask": mask}
        if "mm_token_type_ids" in case.batch([first]):
            inputs["mm_token_type_ids"] = (conversation == IMAGE).long()
        return case.model.generate(**inputs, past_key_values=turn.past_key_values, **GREEDY)

    compare(case, call)


@way(
    "later turn with an image",
    "a prompt with an image on the cache of one with text, and of one with an image; a batch",
)
def _(case):
    image, longer = case.prompt(1, 3, 8, seed=7), case.prompt(2, 5, 12, seed=8)
    if sees_images(case):
        with rk.apply(case.model, policies(case)[0]), torch.no_grad():
            text, inputs = case.batch([text_only(case)]), case.batch([image])
            cache = case.model(**text, use_cache=True).past_key_values
            inputs["attention_mask"] = torch.cat([text["attention_mask"], inputs["attention_mask"]], dim=1)
            call = partial(case.model, **inputs, **{cache_name(case.model): cache})
            refusal("must be empty where a prompt brings images to a model in which", call, case.model)
    for begin in (text_only(case), one_image(case)):
        compare(case, partial(turns, case, [begin], [image]))
    turn = [text_only(case), one_image(case), two_images(case)], [case.prompt(1, 3, 8, s) for s in (7, 8, 9)]
    offered(lambda: turns(case, *turn))
    compare_turns(case, *turn)
    if hybrid(case):  # padding between two turns is part of a window and of a recurrent state, routed or not
        return
    short, long = case.prompt(0, 2, 3, seed=4), case.prompt(0, 4, 30, seed=3)
    compare_turns(case, [short, long], [image, longer])  # on a cache that nothing routed, with padding in it
    compare_turns(case, [one_image(case), two_images(case)], [long, short], [longer, image])
    compare_turns(case, [short, one_image(case)], [longer, image], [image, longer], [short, long])


def compare_turns(case, *prompts):
    """Several turns of a batch, each padded on the left, against those of each sample alone."""
    lengths = [max(map(len, turn)) for turn in prompts]
    for this in policies(case):
        with rk.apply(case.model, this) as routing, torch.no_grad():
            together, trace = turns(case, *prompts), routing.trace
        for row, own in enumerate(zip(*prompts, strict=True)):
            with SlowWay(case.model, this) as slow, torch.no_grad():
                alone = turns(case, *([turn] for turn in own))
            # The latest turn with images is the one that was traced.
            number = max(number for number, turn in enumerate(own) if turn.features)
            shift = sum(lengths[: number + 1]) - sum(map(len, own[: number + 1]))
            assert selections(trace, row, shift) == slow.selected
            torch.testing.assert_close(together[row], alone[0], atol=1e-4, rtol=0)


def turns(case, *prompts, cache=None):
    """Logits of each sample's last token and of four more, after turns on one cache; padded on the left."""
    inputs = [case.batch(turn) for turn in prompts]
    mask = torch.cat([turn["attention_mask"] for turn in inputs], dim=1)
    positions = [three_axes(case, case.batch([joined(case, own)])) for own in zip(*prompts, strict=True)]
    if positions[0] is None:
        at = (mask.cumsum(dim=1) - 1).clamp(min=0)
        after = at[:, -1:] + 1
    else:
        at = torch.zeros(3, *mask.shape, dtype=torch.int64)
        for row, places in enumerate(positions):
            at[:, row, mask[row].bool()] = places[:, 0]
        after = at.amax(dim=(0, 2))[None, :, None].expand(3, -1, -1) + 1
    if cache is None and case.name == "granite4_vision":  # which makes none itself
        cache = transformers.DynamicCache(config=case.model.config.get_text_config())
    begin = 0
    for turn in inputs:
        end = begin + turn["input_ids"].shape[1]
        turn.pop("mm_token_type_ids", None)
        turn |= {"attention_mask": mask[:, :end], "position_ids": at[..., begin:end]}
        output = case.model(**turn, past_key_values=cache, use_cache=True)
        begin, cache = end, output.past_key_values
    logits = [output.logits[:, -1:]]
    for step in range(4):
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        more = {"input_ids": logits[-1].argmax(-1), "attention_mask": mask, "position_ids": after + step}
        logits.append(case.model(**more, past_key_values=cache).logits)
    return torch.cat(logits, dim=1)


@way("several tokens on a cache", "five new tokens at once, one, five")
def _(case):
    tokens = torch.randint(3, 400, (1, 5), generator=torch.Generator().manual_seed(0))

    def call():
        cache = case.model(**case.batch([one_image(case)]), use_cache=True).past_key_values
        return torch.cat(
            [case.model(input_ids=part, past_key_values=cache).logits for part in (tokens, tokens[:, :1], tokens)],
            dim=1,
        )

    compare(case, call)


@way("assisted decoding", "`generate(prompt_lookup_num_tokens=3)`, whose first call holds guesses")
def _(case):
    prompt = one_image(case)
    prompt.ids[-6:] = torch.tensor([7, 8, 9, 7, 8, 9])  # the earlier text is guessed again
    lengths = []
    settings = {**GREEDY, "max_new_tokens": 40, "eos_token_id": 511, "suppress_tokens": [511]}

    def call(**more):
        handle = decoder_of(case.model).register_forward_pre_hook(
            lambda module, args, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
        )
        try:
            return case.model.generate(**case.batch([prompt]), **settings, **more)
        finally:
            handle.remove()

    def assisted():
        return call(prompt_lookup_num_tokens=3, max_matching_ngram_size=1)

    cache = offered(assisted).past_key_values
    if type(cache).__name__ in rk.models.ADAPTERS[case.model.config.model_type].cache_types:
        with rk.apply(case.model, policies(case)[0]):
            refusal("must be a DynamicCache for assisted decoding", assisted, case.model)
    if decoder_of(case.model).config.model_type == "gemma":
        raise NotOffered("transformers: the prompt sees what is guessed")
    lengths.clear()
    compare(case, call, routed_call=assisted)
    guesses = [length for length in lengths if length > len(prompt)]
    assert guesses  # the first call held guessed tokens
    assert any(1 < length < len(prompt) for length in lengths)  # and later ones


@way("static cache", '`generate(cache_implementation="static")`, also of a padded batch')
def _(case):
    call = generate(case, [one_image(case)], cache_implementation="static")
    if (kind := type(offered(call).past_key_values).__name__) != "StaticCache":
        raise NotOffered(f"transformers: it is given a {kind}")
    if hybrid(case) or sees_images(case):
        reason = f"{cache_name(case.model)} must be a DynamicCache|attention_mask must have two dimensions for a model"
        with rk.apply(case.model, policies(case)[0]):
            refusal(reason, call, case.model)
    compare(case, generate(case, [one_image(case)]), routed_call=call)
    compare_batch(case, "left", cache_implementation="static")
    config = case.model.config.get_text_config()
    prompts = [two_images(case)], [text_only(case)]
    compare(
        case,
        lambda: turns(case, *prompts),
        routed_call=lambda: turns(case, *prompts, cache=transformers.StaticCache(config=config, max_cache_len=500)),
    )


@way("offloaded cache", '`generate(cache_implementation="offloaded")`; on a CPU with stand-ins for the streams')
def _(case):
    """Without a GPU its streams are stand-ins, and offloaded tensors stay in place."""
    call = generate(case, [one_image(case)])
    offloaded = generate(case, [one_image(case)], cache_implementation="offloaded")
    with contextlib.ExitStack() as stack:
        if not torch.cuda.is_available():
            for name in ("torch.Stream", "torch.cuda.default_stream"):
                stack.enter_context(mock.patch(name, return_value=mock.MagicMock()))
        cache = offered(offloaded).past_key_values
        if not getattr(cache, "offloading", False):
            raise NotOffered(f"transformers: it is given a {type(cache).__name__} that stays")
        compare(case, call, routed_call=offloaded)  # offloads, as the unrouted call did


@contextlib.contextmanager
def attention(case, implementation):
    try:
        offered(lambda: case.model.set_attn_implementation(implementation))
        yield
    finally:
        try:
            case.model.set_attn_implementation("sdpa")
        except ValueError:  # the tower of one does not support it, and keeps what it has
            decoder_of(case.model).set_attn_implementation("sdpa")


@way("eager attention", '`attn_implementation="eager"`: `generate`, also of a padded batch')
def _(case):
    with attention(case, "eager"):
        compare(case, generate(case, [one_image(case)]))
        compare_batch(case)


@way("flex attention", '`attn_implementation="flex_attention"`, the same')
def _(case):
    with torch.compiler.set_stance("force_eager"), attention(case, "flex_attention"):
        offered(lambda: case.model(**case.batch([one_image(case)])))
        compare(case, generate(case, [one_image(case)]))
        compare_batch(case)


def flash_attention_stand_in(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Flash attention in plain PyTorch: causal from the last key on, among keys that a mask (B, K) lets through."""
    positions = kwargs.get("position_ids")
    if positions is not None and query.shape[0] == 1:  # taken for several packed sequences if they do not count by one
        assert (positions.diff() == 1).all()
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    queries, keys = query.shape[2], key.shape[2]
    seen = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)[None, None]
    if attention_mask is not None:
        assert attention_mask.shape == (query.shape[0], keys)
        seen = seen & attention_mask[:, None, None].bool()
    mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    weights = (query @ key.transpose(2, 3) * scaling + mask).softmax(dim=-1)
    return (weights @ value).transpose(1, 2), None


@contextlib.contextmanager
def flash_attention(case):
    """In the decoder; its kernels run on GPUs only, so that a stand-in takes their place."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    config = decoder_of(case.model).config
    ALL_ATTENTION_FUNCTIONS["flash_attention_2"] = flash_attention_stand_in
    config._attn_implementation = "flash_attention_2"
    try:
        yield
    finally:
        config._attn_implementation = "sdpa"
        del ALL_ATTENTION_FUNCTIONS["flash_attention_2"]


@way("flash attention", '`attn_implementation="flash_attention_2"`, the same; with a stand-in for its kernels')
def _(case):
    this = policies(case)[0]
    if "sliding_attention" in layer_types(decoder_of(case.model)) or sees_images(case):
        with rk.apply(case.model, this), flash_attention(case):
            call = partial(case.model, **case.batch([one_image(case)]))
            refusal("attn_implementation must not be flash attention", call, case.model)
    compare_batch(case, routed_in=flash_attention)


def in_dtype(case, dtype):
    model = copy.deepcopy(case.model).to(dtype)
    inputs = case.batch([one_image(case)])
    inputs = {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}
    compare(case, lambda: model.generate(**inputs, **GREEDY), model=model)


@way("float16", "`generate` in float16")
def _(case):
    in_dtype(case, torch.float16)


@way("bfloat16", "`generate` in bfloat16")
def _(case):
    in_dtype(case, torch.bfloat16)


@way("torch.compile", "the forward of a model that was compiled before it was routed")
def _(case):
    case = load_shallow(case.name)
    inputs = case.batch([one_image(case)])
    compiled = torch.compile(case.model, backend="eager")
    with torch.no_grad():
        unrouted = compiled(**inputs).logits  # before it is routed

    def routed_call():
        expected = case.model(**inputs).logits
        routed = compiled(**inputs)
        torch.testing.assert_close(routed.logits, expected, atol=1e-5, rtol=0)
        assert not torch.allclose(routed.logits, unrouted, atol=1e-3)
        return routed

    compare(case, lambda: case.model(**inputs), routed_call=routed_call, every_policy=False)
    if case.name == MODELS_IN_EVERY_WAY[0]:  # forgetting what was compiled is no matter of the family
        with torch.no_grad():
            assert torch.equal(compiled(**inputs).logits, unrouted)


def asks_for(case, name):
    with rk.apply(case.model, policies(case)[0]):
        refusal(f"{name} must be off", lambda: case.model(**case.batch([one_image(case)]), **{name: True}), case.model)


@way("output_hidden_states", "asked for in a routed prompt")
def _(case):
    asks_for(case, "output_hidden_states")


@way("output_attentions", "asked for in a routed prompt")
def _(case):
    asks_for(case, "output_attentions")


@way("logits_to_keep", "the last, the last five, and a tensor of places")
def _(case):
    inputs = case.batch([one_image(case)])
    for keep in (1, 5, torch.tensor([3, 40])):
        compare(case, lambda keep=keep: case.model(**inputs, logits_to_keep=keep), every_policy=False)


def with_lora(case):
    """A copy whose query and value projections are LoRA's, not without effect."""
    import peft

    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=4, target_modules=r".*(language_model|text_model)\.layers\.\d+\.self_attn\.(q|q_b|v)_proj"
    )
    model = peft.get_peft_model(copy.deepcopy(case.model), config).eval()
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(0, 0.1)
    return model


@way("PEFT", "a model with LoRA layers, wrapped by PEFT: `generate`")
def _(case):
    model, inputs = with_lora(case), case.batch([one_image(case)])
    compare(case, lambda: model.generate(**inputs, **GREEDY), model=model.get_base_model(), routed=model)


class Int8Linear(nn.Module):
    """A linear layer that holds no floating-point weight."""

    def __init__(self, linear):
        super().__init__()
        scale = linear.weight.detach().abs().amax(dim=1, keepdim=True) / 127
        self.register_buffer("packed", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x):
        return nn.functional.linear(x, self.packed * self.scale, self.bias)


@way("quantized", "modules without floating-point weights in place of all linear layers: `generate`")
def _(case):
    model = copy.deepcopy(case.model)
    for layer in decoder_of(model).layers:
        for parent in list(layer.modules()):
            for name, child in list(parent.named_children()):
                if type(child) is nn.Linear:
                    setattr(parent, name, Int8Linear(child))
    assert any(isinstance(module, Int8Linear) for module in decoder_of(model).layers[1].self_attn.children())
    compare(case, lambda: model.generate(**case.batch([one_image(case)]), **GREEDY), model=model)


@way("training", "gradients of LoRA weights, and steps that lower the loss")
def _(case):
    model, inputs = with_lora(case).train(), case.batch([one_image(case)])
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, -100)
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    this = policies(case)[0]

    def gradients():
        model.zero_grad()
        loss = model(**inputs, labels=labels).loss
        loss.backward()
        return loss.item(), {name: weight.grad.clone() for name, weight in weights.items() if weight.grad is not None}

    with SlowWay(model.get_base_model(), this):
        expected_loss, expected = gradients()
    optimizer = torch.optim.SGD(weights.values(), lr=0.01)
    with rk.apply(model, this) as routing:
        loss, actual = gradients()
        assert routing.trace is not None
        assert loss == pytest.approx(expected_loss, abs=1e-4)
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-3)
        for _step in range(3):
            optimizer.step()
            later, _ = gradients()
    assert later < loss


def offloaded(case, put):
    model, inputs = put(copy.deepcopy(case.model)), case.batch([two_images(case)])
    assert any(weight.is_meta for weight in decoder_of(model).layers[1].parameters())
    try:
        offered(lambda: model.generate(**inputs, **GREEDY))
        calls = [lambda each=each: each.generate(**inputs, **GREEDY) for each in (case.model, model)]
    except NotOffered as reason:  # some encode images outside of any forward, so that nothing loads weights
        expect_known(case.name, "CPU offload", reason)
        model = put(copy.deepcopy(case.model))
        offered(lambda: model(**inputs))
        calls = [lambda each=each: each(**inputs) for each in (case.model, model)]
    compare(case, calls[0], routed=model, routed_call=calls[1])


@way("CPU offload", "`accelerate.cpu_offload`: `generate`, or a call where transformers does not do that")
def _(case):
    import accelerate

    offloaded(case, lambda model: accelerate.cpu_offload(model, "cpu"))


@way("disk offload", "`accelerate.disk_offload`, the same")
def _(case):
    import accelerate

    with tempfile.TemporaryDirectory() as folder:
        offloaded(case, lambda model: accelerate.disk_offload(model, folder, "cpu"))


@cache
def split_over_two_ranks(names):
    """Results of two tensor-parallel ranks for one prompt on each model."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Path(folder, "checkpoints")
        for name in names:
            case, stages = load(name), schedule(load(name))
            case.model.save_pretrained(checkpoints / name)
            job = {
                "inputs": case.batch([two_images(case)]),
                "layers": [stage.layer for stage in stages],
                "keeps": [stage.keep for stage in stages],
            }
            torch.save(job, checkpoints / name / "job.pt")
        return on_two_ranks(Path(folder), str(checkpoints))


@way("tensor parallelism", '`from_pretrained(tp_plan="auto")` on two processes: a call and `generate`')
def _(case):
    names = MODELS_IN_EVERY_WAY if case.name in MODELS_IN_EVERY_WAY else tuple(MODELS)
    first, second = (rank[case.name] for rank in split_over_two_ranks(names))
    if "error" in first:
        raise NotOffered(f"transformers: {first['error']}")
    if first["key_heads"] == case.model.config.get_text_config().num_key_value_heads:
        raise NotOffered("transformers: no plan that splits its heads")
    assert first == second
    inputs = case.batch([two_images(case)])
    for this in policies(case):
        with SlowWay(case.model, this) as slow, torch.no_grad():
            logits = case.model(**inputs).logits[:, -1]
            tokens = case.model.generate(**inputs, **GREEDY).sequences[:, -8:].tolist()
        assert first[this.action]["selected"] == [slow.selected]
        assert first[this.action]["tokens"] == tokens
        torch.testing.assert_close(torch.tensor(first[this.action]["logits"]), logits, atol=1e-4, rtol=0)


@way("gradient checkpointing", "in training")
def _(case):
    model, inputs = copy.deepcopy(case.model).train(), case.batch([one_image(case)])
    plain = copy.deepcopy(model)
    model.gradient_checkpointing_enable()

    def gradients(each):
        each(**inputs, use_cache=False).logits[:, -1].logsumexp(-1).sum().backward()
        return {name: weight.grad for name, weight in each.named_parameters() if weight.grad is not None}

    with rk.apply(model, policies(case)[0]):
        if recomputes_hooks(decoder_of(model).layers[1]):
            refusal("gradient checkpointing must be off", lambda: gradients(model), model)
        actual = gradients(model)
    with rk.apply(plain, policies(case)[0]) as routing:
        expected = gradients(plain)
        assert routing.trace is not None
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-3)


@way("prefill in chunks", "`generate(prefill_chunk_size=16)`")
def _(case):
    call = generate(case, [one_image(case)], prefill_chunk_size=16)
    offered(call)
    with rk.apply(case.model, policies(case)[0]):
        refusal("prefill_chunk_size must be None", call, case.model)
