"""Ways of calling: generation modes, several calls on one model, and caches."""

import copy
import threading

import pytest
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, StoppingCriteria

import reroute_kernels as rk
from tests.models.prompts import ACTIONS, batch, cached_lengths, policy, selections

GREEDY = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def decode(model, inputs, steps, cache=None):
    """Greedy tokens, fed back one at a time, and the cache."""
    output = model(**inputs, past_key_values=cache, use_cache=True)
    cache, tokens = output.past_key_values, [output.logits[:, -1:].argmax(-1)]
    for _ in range(steps - 1):
        tokens.append(model(input_ids=tokens[-1], past_key_values=cache).logits[:, -1:].argmax(-1))
    return torch.cat(tokens, dim=1)[0].tolist(), cache


@pytest.mark.parametrize("action", ACTIONS)
@torch.no_grad()
def test_generate_equals_manual_decoding(model, inputs, action):
    with rk.apply(model, policy(action)) as routing:
        generated = model.generate(**inputs, **GREEDY)[0, -10:].tolist()
        selected = selections(routing.trace)
        routing.trace = None
        manual, _ = decode(model, {**inputs, "position_ids": positions_of(model, inputs)}, 10)
        assert selections(routing.trace) == selected
    assert generated == manual


def positions_of(model, inputs):
    """Positions that decoding may continue from by counting, on every family."""
    if "image_grid_thw" not in inputs:
        return torch.arange(inputs["input_ids"].shape[1])[None]
    names = ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")
    positions, _ = model.model.get_rope_index(**{name: inputs[name] for name in names})
    return positions


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize(
    "mode",
    [
        {"do_sample": True, "temperature": 0.8, "top_k": 20},
        {"num_beams": 3, "do_sample": False},
        {"num_beams": 4, "num_return_sequences": 2, "do_sample": False},
        {"num_return_sequences": 3, "do_sample": True},
        {"use_cache": False, "do_sample": False},
    ],
    ids=["sample", "beams", "beams-return-2", "sample-return-3", "no-cache"],
)
def test_generation_modes_route_and_keep_everything_matches(model, inputs, mode, action):
    """At keep = 1 every mode equals the unrouted model; below, it routes."""
    settings = {**GREEDY, **mode}
    everything = policy(action, (rk.Stage(2, 1.0), rk.Stage(6, 1.0)))
    torch.manual_seed(3)
    expected = model.generate(**inputs, **settings)
    with rk.apply(model, everything):
        torch.manual_seed(3)
        assert torch.equal(model.generate(**inputs, **settings), expected)
    with rk.apply(model, policy(action)) as routing:
        torch.manual_seed(3)
        tokens = model.generate(**inputs, **settings)
    assert tokens.shape == expected.shape
    assert len(routing.trace.stages) == 3


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.filterwarnings("ignore:.*right-padding.*")
def test_beams_on_a_ragged_batch_equal_the_prompts_alone(model, prompt, side):
    prompts = [prompt(1, 4, 9, seed=1), prompt(2, 7, 20, seed=2)]
    settings = {**GREEDY, "num_beams": 3}
    with rk.apply(model, policy()):
        single = [model.generate(**batch([one]), **settings)[0, -10:].tolist() for one in prompts]
        together = model.generate(**batch(prompts, side), **settings)[:, -10:].tolist()
    assert together == single


@torch.no_grad()
def test_several_new_tokens_on_a_cache_equal_one_at_a_time(model, inputs):
    with rk.apply(model, policy()):
        tokens, _ = decode(model, inputs, 6)
        for implementation in ("sdpa", "eager"):
            model.set_attn_implementation(implementation)
            output = model(**inputs, use_cache=True)
            together = model(input_ids=torch.tensor([tokens[:5]]), past_key_values=output.past_key_values).logits
            assert together.argmax(-1)[0].tolist() == tokens[1:6]


@pytest.mark.parametrize("action", ACTIONS)
def test_second_turn_on_a_kept_cache(model, inputs, action):
    """More text after a generated answer, on the cache that generate returned."""
    with rk.apply(model, policy(action)):
        first = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
        cache = first.past_key_values
        text = torch.randint(3, 400, (1, 7), generator=torch.Generator().manual_seed(0))
        conversation = torch.cat([first.sequences, text], dim=1)
        mask = torch.ones_like(conversation)
        # One call for all new tokens against one call per token.
        one_by_one, at_once = copy.deepcopy(cache), copy.deepcopy(cache)
        new = conversation[:, inputs["input_ids"].shape[1] + 9 :]
        with torch.no_grad():
            for place in range(new.shape[1]):
                last = model(input_ids=new[:, place : place + 1], past_key_values=one_by_one).logits[0, -1]
            again = model(input_ids=new, past_key_values=at_once).logits[0, -1]
        # Several rows at once are summed in another order than one, in every layer.
        torch.testing.assert_close(again, last, atol=1e-4, rtol=0)
        answer = model.generate(input_ids=conversation, attention_mask=mask, past_key_values=cache, **GREEDY)
    assert answer.shape[1] == conversation.shape[1] + 10


@torch.no_grad()
def test_state_follows_a_copied_cache(model, inputs):
    with rk.apply(model, policy()):
        output = model(**inputs, use_cache=True)
        copied = copy.deepcopy(output.past_key_values)
        step = {"input_ids": torch.tensor([[7]])}
        expected = model(**step, past_key_values=output.past_key_values).logits
        assert torch.equal(model(**step, past_key_values=copied).logits, expected)


CROPPED = {
    "dynamic": lambda config, room: transformers.DynamicCache(config=config),
    "static": lambda config, room: transformers.StaticCache(config, max_cache_len=room),
}


@pytest.mark.parametrize("kind", CROPPED)
@torch.no_grad()
def test_cropped_cache_continues_where_it_was(model, inputs, kind):
    cache = CROPPED[kind](model.config.get_text_config(), inputs["input_ids"].shape[1] + 6)
    if not hasattr(cache.layers[0] if cache.layers else transformers.cache_utils.DynamicLayer, "crop"):
        pytest.skip("transformers crops static caches from 5.24 on")
    with rk.apply(model, policy()):
        tokens, cache = decode(model, inputs, 6, cache)
        cache.crop(-3)
        again = []
        token = tokens[2]
        for _ in range(3):
            token = model(input_ids=torch.tensor([[token]]), past_key_values=cache).logits[0, -1].argmax().item()
            again.append(token)
        assert again == tokens[3:]


def test_guesses_on_a_static_cache(model, inputs):
    """Transformers crops tokens that were guessed wrongly. A static cache that it makes has no room for guesses."""
    cache = transformers.StaticCache(model.config.get_text_config(), max_cache_len=inputs["input_ids"].shape[1] + 20)
    if not hasattr(cache.layers[0], "crop"):
        pytest.skip("transformers crops static caches from 5.24 on")
    settings = {**GREEDY, "eos_token_id": -1}  # guesses are searched for its token
    with rk.apply(model, policy()) as routing:
        expected = model.generate(**inputs, **settings)
        routing.trace = None
        tokens = model.generate(**inputs, **settings, prompt_lookup_num_tokens=3, past_key_values=cache)
        assert torch.equal(tokens, expected)
        assert routing.trace is not None


def test_generate_after_a_plain_forward(model, inputs, others):
    with rk.apply(model, policy()):
        expected = model.generate(**inputs, **GREEDY)
        with torch.no_grad():
            model(**others, use_cache=True)
        assert torch.equal(model.generate(**inputs, **GREEDY), expected)


@pytest.mark.parametrize("number", [0, 2, 3, 11], ids=lambda number: f"layer-{number}")
def test_generate_after_an_exception_inside_a_layer(model, inputs, others, number):
    class Failure(Exception):
        pass

    def fail(*_):
        raise Failure

    with rk.apply(model, policy()):
        expected = model.generate(**inputs, **GREEDY)
        handle = model.model.language_model.layers[number].mlp.register_forward_pre_hook(fail)
        with pytest.raises(Failure):
            model.generate(**others, **GREEDY)
        handle.remove()
        assert torch.equal(model.generate(**inputs, **GREEDY), expected)


def test_text_only_prompt_after_an_exception_runs_untouched(model, inputs, prompt):
    text = batch([prompt(0, 9, 4, seed=5)])
    expected = model.generate(**text, **GREEDY)

    def fail(*_):
        raise KeyboardInterrupt

    with rk.apply(model, policy()):
        handle = model.model.language_model.layers[5].mlp.register_forward_pre_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            model.generate(**inputs, **GREEDY)
        handle.remove()
        assert torch.equal(model.generate(**text, **GREEDY), expected)


def test_two_threads_on_one_model(model, prompt):
    """Same lengths, so that a model which keeps positions of its latest call cannot mix them up itself."""
    prompts = [batch([prompt(1, 5, 12, seed=seed)]) for seed in (1, 2)]
    with rk.apply(model, policy()):
        expected = [model.generate(**inputs, **GREEDY).tolist() for inputs in prompts]
        for _ in range(3):
            results, start = [None, None], threading.Barrier(2)

            def run(number, results=results, start=start):
                start.wait()
                results[number] = model.generate(**prompts[number], **GREEDY).tolist()

            threads = [threading.Thread(target=run, args=(number,)) for number in (0, 1)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert results == expected


@torch.no_grad()
def test_reused_cache_after_reset(model, inputs, prompt):
    text = batch([prompt(0, 9, 4, seed=5)])
    expected = model(**text, use_cache=True).logits
    with rk.apply(model, policy()):
        cache = model(**inputs, use_cache=True).past_key_values
        cache.reset()
        if cached_lengths(cache)[0]:
            pytest.skip("this version zeroes a dynamic cache instead of emptying it")
        assert torch.equal(model(**text, past_key_values=cache).logits, expected)


@torch.no_grad()
def test_inputs_embeds_with_image_features_route(model, inputs):
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    features = {name: value for name, value in inputs.items() if name not in ("input_ids", "mm_token_type_ids")}
    if "image_grid_thw" in features:
        features["position_ids"] = positions_of(model, inputs)
    with rk.apply(model, policy()) as routing:
        expected = model(
            **{**inputs, **({"position_ids": features["position_ids"]} if "position_ids" in features else {})}
        )
        selected = selections(routing.trace)
        routing.trace = None
        output = model(**features, inputs_embeds=embeds)
        assert selections(routing.trace) == selected
    assert torch.equal(output.logits, expected.logits)


@torch.no_grad()
def test_no_mask_is_made_without_padding(model, inputs):
    masks = []
    layer = model.model.language_model.layers[6]

    def record(module, args, kwargs):
        masks.append(kwargs["attention_mask"])

    with rk.apply(model, policy()):
        handle = layer.register_forward_pre_hook(record, with_kwargs=True)
        try:
            decode(model, inputs, 4)
        finally:
            handle.remove()
    assert masks == [None] * 4


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("first", [0, 2], ids=["decision-at-layer-0", "decision-at-layer-2"])
@pytest.mark.parametrize("together", [True, False], ids=["one-call", "call-by-call"])
@torch.no_grad()
def test_new_tokens_with_padding_among_them(prompt, family, model, side, first, together):
    """A sample that sits out two steps continues as if it had been alone."""
    if family != "llava":
        pytest.skip("its positions on three axes are not counted by hand here")
    prompts = [prompt(1, 6, 20, seed=3), prompt(1, 6, 14, seed=4)]
    inputs = batch(prompts, side)
    tokens, valid = torch.tensor([[9, 8, 7], [0, 0, 7]]), torch.tensor([[1, 1, 1], [0, 0, 1]])
    lengths = inputs["attention_mask"].sum(dim=1, keepdim=True)
    positions = lengths + (valid.cumsum(dim=1) - 1).clamp(min=0)
    begin = (inputs["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
    with rk.apply(model, policy(schedule=(rk.Stage(first, 0.3), rk.Stage(6, 0.2)))):
        cache = model(**inputs, position_ids=begin, use_cache=True).past_key_values
        for chunk in [slice(0, 3)] if together else [slice(step, step + 1) for step in range(3)]:
            mask = torch.cat([inputs["attention_mask"], valid[:, : chunk.stop]], dim=1)
            step = {"input_ids": tokens[:, chunk], "attention_mask": mask, "position_ids": positions[:, chunk]}
            logits = model(**step, past_key_values=cache).logits
        alone = model(**batch(prompts[1:]), use_cache=True).past_key_values
        step = {"input_ids": torch.tensor([[7]]), "position_ids": torch.tensor([[len(prompts[1])]])}
        expected = model(**step, past_key_values=alone).logits
    torch.testing.assert_close(logits[1, -1], expected[0, -1], atol=1e-4, rtol=0)


@torch.no_grad()
def test_decoding_after_a_prompt_that_ends_in_an_image(model, prompt):
    """The position that follows is the one behind the image, not the one behind its last token."""
    inputs = prompt(1, 9, 0, seed=7)
    inputs.ids = inputs.ids[: int((inputs.ids == 500).nonzero()[-1]) + 1]
    logits = []
    for this in (None, policy(schedule=(rk.Stage(0, 1.0),))):
        routing = rk.apply(model, this) if this else None
        cache = model(**batch([inputs]), use_cache=True).past_key_values
        logits.append(model(input_ids=torch.tensor([[7]]), past_key_values=cache).logits)
        if routing:
            routing.remove()
    torch.testing.assert_close(*logits, atol=1e-5, rtol=0)


@torch.no_grad()
def test_sample_that_sits_a_later_image_out(family, model, prompt):
    """Its row of the later turn is padding; it goes on from the turn before."""
    if family != "llava":
        pytest.skip("its positions on three axes are not counted by hand here")
    firsts, later = [prompt(1, 5, 12, seed=1), prompt(1, 5, 12, seed=2)], prompt(1, 3, 6, seed=3)
    earlier, second = batch(firsts), batch([later])
    length, added = len(firsts[0]), len(later)
    ids = torch.cat([second["input_ids"], torch.zeros_like(second["input_ids"])])
    new = (ids > 0).long()
    mask = torch.cat([earlier["attention_mask"], new], dim=1)
    places = torch.cat([torch.arange(length, length + added)[None], torch.full((1, added), length)])
    inputs = {"input_ids": ids, "pixel_values": second["pixel_values"], "attention_mask": mask, "position_ids": places}
    with rk.apply(model, policy()) as routing:
        cache = model(**earlier, use_cache=True).past_key_values
        model(**inputs, past_key_values=cache)
        assert routing.trace.visual_counts == [196, 0]
        step = {
            "input_ids": torch.tensor([[7], [7]]),
            "attention_mask": torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1),
            "position_ids": torch.tensor([[length + added], [length]]),
        }
        logits = model(**step, past_key_values=cache).logits
        alone = model(**batch(firsts[1:]), use_cache=True).past_key_values
        expected = model(input_ids=torch.tensor([[7]]), past_key_values=alone).logits
    torch.testing.assert_close(logits[1], expected[0], atol=1e-4, rtol=0)


@torch.no_grad()
def test_call_from_inside_the_generation_of_another_model(model, inputs):
    """How that one generates says nothing about this call."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    torch.manual_seed(0)
    other = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=32))
    selected = []

    class Asks(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            model(**inputs)
            selected.append(selections(routing.trace))
            return torch.tensor([False])

    with rk.apply(model, policy()) as routing:
        model(**inputs)
        expected = selections(routing.trace)
        ids = torch.tensor([[3, 4, 5, 6, 3, 4, 5]])
        settings = {"prompt_lookup_num_tokens": 3, "max_new_tokens": 8, "eos_token_id": 31, "pad_token_id": 0}
        other.generate(ids, **settings, stopping_criteria=[Asks()])
    assert selected
    assert selected == [expected] * len(selected)


@torch.no_grad()
def test_cached_rows_without_a_token_do_not_rank(family, model, prompt, monkeypatch):
    """The rows that fill up shorter samples, in a batch whose samples kept different numbers of tokens."""
    if family != "llava":
        pytest.skip("its positions on three axes are not counted by hand here")
    masks = []
    route_tokens = rk.ops.route_tokens

    def remember(attention, *selection, **options):
        masks.append(attention.past_mask)
        return route_tokens(attention, *selection, **options)

    firsts = batch([prompt(1, 5, 12, seed=1), prompt(2, 7, 20, seed=2)])
    second = batch([prompt(1, 3, 6, seed=3), prompt(1, 3, 6, seed=4)])
    second["attention_mask"] = torch.cat([firsts["attention_mask"], second["attention_mask"]], dim=1)
    with rk.apply(model, policy()) as routing:
        cache = model(**firsts, use_cache=True).past_key_values
        text = firsts["attention_mask"].sum(1) - torch.tensor(routing.trace.visual_counts)
        kept = [[len(rows) for rows in stage.selected] for stage in routing.trace.stages]
        monkeypatch.setattr(rk.ops, "route_tokens", remember)
        model(**second, past_key_values=cache)
    assert [mask.sum(dim=1).tolist() for mask in masks] == [(text + torch.tensor(stage)).tolist() for stage in kept]


@pytest.mark.parametrize("first", [0, 2], ids=["decision-at-layer-0", "decision-at-layer-2"])
@torch.no_grad()
def test_padding_among_new_tokens_whose_positions_nobody_gives(family, model, prompt, first):
    """They count it, as in the unrouted model, also if the cache cannot tell how long the conversation is."""
    if family != "llava":
        pytest.skip("it must be given positions beside a mask")
    inputs = batch([prompt(1, 6, 20, seed=3), prompt(1, 6, 14, seed=4)])
    new = torch.tensor([[1, 1, 1], [0, 0, 1]])
    mask = torch.cat([inputs["attention_mask"], new], dim=1)
    step = {"input_ids": torch.tensor([[9, 8, 7], [0, 0, 7]]), "attention_mask": mask}
    logits = []
    for this in (None, policy(schedule=(rk.Stage(first, 1.0),))):
        routing = rk.apply(model, this) if this else None
        cache = model(**inputs, use_cache=True).past_key_values
        logits.append(model(**step, past_key_values=cache).logits[new.bool()])
        if routing:
            routing.remove()
    torch.testing.assert_close(*logits, atol=1e-4, rtol=0)
