"""A prompt that is scored together with its answer is ranked as the prompt alone."""

import copy
import inspect

import peft
import pytest
import torch

import reroute_kernels as rk
from reroute_kernels.models.adapter import CACHE_NAMES, cache_of
from reroute_kernels.models.answers import Answers
from tests.models.families import load, load_shallow
from tests.models.prompts import ACTIONS, IMAGE, Prompt, offset, selections
from tests.models.slow_way import decoder_of

LAST, TEXT = rk.rankings.LastQuery, rk.rankings.AllText
RANKINGS = {
    "last": LAST(),
    "last-four": LAST(queries=4),
    "all-text": TEXT(),
    "previous": LAST("previous"),
    "previous-all-text": TEXT("previous", query_reduction="max"),
}
FAMILIES = ("aya_vision", "llava", "qwen2_5_vl", "qwen3_5", "qwen3_vl_moe")
ANSWERS = (5, 2, 7, 3)  # tokens of each sample's answer


def policy_of(case, action="reroute", ranking=RANKINGS["last"], positions="original"):
    kinds = getattr(case.model.config.get_text_config(), "layer_types", None) or ()
    layers = (3, 5) if "linear_attention" in kinds else (1, 3, 5) if "sliding_attention" in kinds else (1, 2, 4)
    stages = [rk.Stage(layer, keep) for layer, keep in zip(layers, (0.5, 0.3, 0.2), strict=False)]
    return rk.Policy(stages, action, ranking, positions)


def on_cache(model, cache):
    parameters = inspect.signature(model.forward).parameters
    return {name: cache for name in CACHE_NAMES if name in parameters}


def samples(case):
    """(prompt, answer) of one image, of two, of text alone, and of an answer right behind an image."""
    generator = torch.Generator().manual_seed(7)
    prompts = [case.prompt(1, 4, 6, seed=1), case.prompt(2, 3, 9, seed=2), case.prompt(0, 5, 6, seed=3)]
    captioned = case.prompt(1, 4, 0, seed=4)
    prompts.append(Prompt(captioned.ids[: int((captioned.ids == IMAGE).nonzero()[-1]) + 1], captioned.features))
    return [
        (prompt, torch.randint(3, 400, (count,), generator=generator))
        for prompt, count in zip(prompts, ANSWERS, strict=True)
    ]


def joined(prompt, answer):
    return Prompt(torch.cat([prompt.ids, answer]), prompt.features)


def one_labelled(case):
    """A prompt with its answer, and its labels."""
    prompt, answer = samples(case)[0]
    inputs = case.batch([joined(prompt, answer)])
    labels = inputs["input_ids"].clone()
    labels[:, : -len(answer)] = -100
    return inputs, labels


def told(way, routing, labels, starts):
    """Arguments of the call that tell where answers begin; or the routing is told."""
    if way == "labels":
        return {"labels": labels}
    routing.answers_from = starts if len(starts) > 1 else int(starts)
    return {}


def together(case, routing, pairs, side, way):
    """Logits at each sample's answer and at the token before it, and the selections of one call."""
    whole = [joined(*pair) for pair in pairs]
    inputs = case.batch(whole, side)
    length = inputs["input_ids"].shape[1]
    begins = [offset(sample, length, side) for sample in whole]
    starts = torch.tensor([begin + len(prompt) for begin, (prompt, _) in zip(begins, pairs, strict=True)])
    labels = torch.full_like(inputs["input_ids"], -100)
    for row, (start, (_, answer)) in enumerate(zip(starts.tolist(), pairs, strict=True)):
        labels[row, start : start + len(answer)] = answer
    logits = case.model(**inputs, **told(way, routing, labels, starts)).logits
    spans = [slice(start - 1, start + len(answer)) for start, (_, answer) in zip(starts.tolist(), pairs, strict=True)]
    return [row[span] for row, span in zip(logits, spans, strict=True)], [
        selections(routing.trace, row, begin) for row, begin in enumerate(begins)
    ]


def in_turn(case, routing, prompt, answer):
    """The same results of a sample alone: its prompt, and then its answer on the cache. Text alone is not routed."""
    if not prompt.features:
        whole = case.model(**case.batch([joined(prompt, answer)]))
        return whole.logits[0, len(prompt) - 1 :], [[] for _ in routing.policy.schedule]
    positions = positions_of(case, joined(prompt, answer))
    first = case.model(**case.batch([prompt]), use_cache=True)
    logits, cache = [first.logits[0, -1:]], on_cache(case.model, cache_of(first))
    for place, token in enumerate(answer, len(prompt)):  # layers with states take one at a time in every version
        step = {} if positions is None else {"position_ids": positions[..., place : place + 1]}
        logits.append(case.model(input_ids=token[None, None], **step, **cache).logits[0])
    return torch.cat(logits), selections(routing.trace)


def positions_of(case, sample):
    """The model's arguments for its decoder; not every version continues the positions behind images."""
    found = []
    hook = decoder_of(case.model).register_forward_pre_hook(
        lambda decoder, args, kwargs: found.append(kwargs.get("position_ids")), with_kwargs=True
    )
    try:
        with torch.no_grad():
            case.model(**case.batch([sample]))
    finally:
        hook.remove()
    return None if found[0] is None or found[0].ndim < 3 else found[0][-3:]


def check(case, policy, side="left", way="labels", pairs=None):
    pairs = samples(case) if pairs is None else pairs
    with rk.apply(case.model, policy) as routing:
        logits, selected = together(case, routing, pairs, side, way)
        routing.answers_from = None
        for row, pair in enumerate(pairs):
            expected, chosen = in_turn(case, routing, *pair)
            assert selected[row] == chosen, f"sample {row}"
            assert (logits[row] - expected).abs().max() <= 1e-4, f"sample {row}"


# Padding on the right is refused if layers have windows or states.
PADDED = [(family, side) for family in FAMILIES for side in ("left", "right")]
PADDED = [each for each in PADDED if each not in (("aya_vision", "right"), ("qwen3_5", "right"))]


@pytest.mark.parametrize("way", ["labels", "answers_from"])
@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize(("family", "side"), PADDED)
@torch.no_grad()
def test_answers_in_a_padded_batch(family, side, action, way):
    case = load(family)
    check(case, policy_of(case, action), side, way)


@pytest.mark.parametrize("way", ["labels", "answers_from"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_answer_of_one_sample(family, way):
    case = load(family)
    check(case, policy_of(case), way=way, pairs=samples(case)[:1])


@pytest.mark.parametrize("ranking", RANKINGS)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("action", ACTIONS)
@torch.no_grad()
def test_rankings(action, side, ranking):
    case = load("llava")
    check(case, policy_of(case, action, RANKINGS[ranking]), side)


@pytest.mark.parametrize("family", ["aya_vision", "llava", "qwen2_5_vl"])
@pytest.mark.parametrize("action", ACTIONS)
@torch.no_grad()
def test_contiguous_positions(action, family):
    case = load(family)
    check(case, policy_of(case, action, positions="contiguous"))


@pytest.mark.parametrize("action", ACTIONS)
@torch.no_grad()
def test_reducer(action):
    case = load("llava")
    policy = rk.Policy(policy_of(case).schedule, action, reducer=rk.reducers.Nuwa(keep=0.5, per_cell=1))
    pair = samples(case)[0]
    with rk.apply(case.model, policy) as routing:
        (logits,), (selected,) = together(case, routing, [pair], "left", "labels")
        reduced = routing.trace.reduction.selected[0]
        expected = case.model(**case.batch([pair[0]]), use_cache=True)
        assert torch.equal(reduced, routing.trace.reduction.selected[0])
        assert selected == selections(routing.trace)
        assert (logits[0] - expected.logits[0, -1]).abs().max() <= 1e-4
        mask = torch.ones(1, sum(map(len, pair)), dtype=torch.int64)
        cache = on_cache(case.model, cache_of(expected))
        later = case.model(input_ids=pair[1][None], attention_mask=mask, **cache).logits[0]
        assert (logits[1:] - later).abs().max() <= 1e-4


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_gradients_are_those_of_the_prompt_and_then_its_answer(family, action):
    case = load(family)
    pair = samples(case)[0]
    weights = dict(case.model.model.language_model.named_parameters())

    def gradients(logits):
        loss = torch.nn.functional.cross_entropy(logits[:-1], pair[1])
        found = torch.autograd.grad(loss, weights.values(), allow_unused=True)
        return {name: gradient for name, gradient in zip(weights, found, strict=True) if gradient is not None}

    with rk.apply(case.model, policy_of(case, action)) as routing:
        actual = gradients(together(case, routing, [pair], "left", "labels")[0][0])
        expected = gradients(in_turn(case, routing, *pair)[0])
    assert len(actual) > 6
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-3)


@torch.no_grad()
def test_labels_through_peft():
    case = load("llava")
    model = peft.get_peft_model(copy.deepcopy(case.model), peft.LoraConfig(target_modules=["q_proj"]))
    (pair,) = samples(case)[:1]
    with rk.apply(case.model, policy_of(case)) as routing:
        _, (chosen,) = together(case, routing, [pair], "left", "labels")
    inputs = case.batch([joined(*pair)])
    labels = inputs["input_ids"].clone()
    labels[:, : -len(pair[1])] = -100
    with rk.apply(model, policy_of(case)) as routing:
        model(**inputs, labels=labels)
        assert selections(routing.trace) == chosen
        model(**inputs)
        assert selections(routing.trace) != chosen


# Beginnings of answers by labels

V, N = IMAGE, -100
LABELLED = {
    "an answer": ([5, V, V, 6, 7, 8, 9], [N, N, N, N, N, 8, 9], 5),
    "an image and its caption": ([5, V, V, 6, 7, 8, 9], [N, N, N, 6, 7, 8, 9], 3),
    "two turns": ([5, V, V, 6, 7, 8, 9], [N, N, N, N, 7, N, 9], 4),
    "two turns with images": ([V, 5, 6, V, V, 7, 8], [N, N, 6, N, N, N, 8], 6),
    "a turn before the image": ([5, 6, V, V, 7, 8, 9], [N, 6, N, N, N, 8, 9], 5),
    "all text": ([5, 6, V, V, 7, 8, 9], [5, 6, N, N, 7, 8, 9], 7),
    "everything": ([5, 6, V, V, 7, 8, 9], [5, 6, V, V, 7, 8, 9], 7),
    "nothing": ([5, 6, V, V, 7, 8, 9], [N] * 7, 7),
    "text without an image": ([5, 6, 7, 8, 9, 5, 6], [N, N, N, 8, 9, 5, 6], 7),
}


def test_where_labels_say_that_an_answer_begins():
    ids, labels, expected = (torch.tensor(rows) for rows in zip(*LABELLED.values(), strict=True))
    starts = Answers(labels).starts(ids == IMAGE, None)
    assert dict(zip(LABELLED, starts.tolist(), strict=True)) == dict(zip(LABELLED, expected.tolist(), strict=True))


def test_labels_at_padding_are_no_answer():
    ids = torch.tensor([[0, 5, V, V, 6, 7, 8], [5, V, V, 6, 7, 0, 0]])
    labels = torch.tensor([[0, N, N, N, N, 7, 8], [N, N, N, N, N, 0, 0]])
    valid = torch.tensor([[0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0]]).bool()
    assert Answers(labels).starts(ids == IMAGE, valid).tolist() == [5, 7]


@torch.no_grad()
def test_text_that_is_scored_as_a_whole_is_ranked_as_without_labels():
    case = load("llava")
    inputs = case.batch([samples(case)[0][0]])
    with rk.apply(case.model, policy_of(case)) as routing:
        expected = case.model(**inputs).logits
        chosen = selections(routing.trace)
        assert torch.equal(case.model(**inputs, labels=inputs["input_ids"]).logits, expected)
        assert selections(routing.trace) == chosen


@torch.no_grad()
def test_labels_are_of_one_call():
    """Labels hold for one call: neither a later call nor one inside it, of the model without its head, takes them."""
    case = load("llava")
    inputs, labels = one_labelled(case)
    inside = []

    def call(*_):
        if not inside:
            inside.append(None)
            inside[0] = case.model.model(**inputs).last_hidden_state

    with rk.apply(case.model, policy_of(case)) as routing:
        plain = case.model(**inputs).logits
        expected = case.model.model(**inputs).last_hidden_state
        scored = case.model(**inputs, labels=labels).logits
        assert not torch.equal(scored, plain)
        handle = case.model.model.language_model.layers[3].register_forward_pre_hook(call)
        try:
            assert torch.equal(case.model(**inputs, labels=labels).logits, scored)
        finally:
            handle.remove()
        assert torch.equal(inside[0], expected)
        with pytest.raises(ValueError, match="labels must be of shape"):
            case.model(**inputs, labels=labels[:, 1:])
        with pytest.raises(TypeError):
            case.model(labels=labels, no_such_argument=1, pixel_values=inputs["pixel_values"], input_ids=1)
        assert torch.equal(case.model.model(**inputs).last_hidden_state, expected)
        assert routing.answers_from is None


@torch.no_grad()
def test_answers_from_holds_until_it_is_set_anew():
    case = load("llava")
    (pair,) = samples(case)[:1]
    inputs = case.batch([joined(*pair)])
    with rk.apply(case.model, policy_of(case)) as routing:
        plain = case.model(**inputs).logits
        routing.answers_from = len(pair[0])
        scored = case.model(**inputs).logits
        assert not torch.equal(scored, plain)
        assert torch.equal(case.model(**inputs, labels=inputs["input_ids"]).logits, scored)
        routing.answers_from = torch.tensor([len(pair[0])])
        assert torch.equal(case.model(**inputs).logits, scored)
        routing.answers_from = inputs["input_ids"].shape[1] + 9
        assert torch.equal(case.model(**inputs).logits, plain)
        routing.answers_from = None
        assert torch.equal(case.model(**inputs).logits, plain)


@torch.no_grad()
def test_prompt_alone_ranks_where_generate_has_no_cache():
    case = load("llava")
    inputs = case.batch([samples(case)[0][0]])
    arguments = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with rk.apply(case.model, policy_of(case)) as routing:
        expected = case.model.generate(**inputs, **arguments)
        chosen = selections(routing.trace)
        routing.answers_from = inputs["input_ids"].shape[1]
        assert torch.equal(case.model.generate(**inputs, **arguments, use_cache=False), expected)
        assert selections(routing.trace) == chosen


@pytest.mark.parametrize(
    ("position", "error", "message"),
    [
        (0, ValueError, "answers_from must be 1 or more, got 0"),
        (-3, ValueError, "answers_from must be 1 or more, got -3"),
        (True, TypeError, "answers_from must be None, an integer or a tensor of them, got True"),
        ("3", TypeError, "answers_from must be None, an integer or a tensor of them, got '3'"),
        (torch.tensor([3.0]), TypeError, "answers_from must be .*, got torch.float32"),
        (torch.ones(1, 2, dtype=torch.int64), ValueError, r"of shape \(B,\), got a tensor of shape \(1, 2\)"),
    ],
    ids=["zero", "negative", "bool", "string", "float", "two-dimensions"],
)
def test_positions_that_are_refused(position, error, message):
    case = load("llava")
    with rk.apply(case.model, policy_of(case)) as routing:
        with pytest.raises(error, match=message):
            routing.answers_from = position
        assert routing.answers_from is None


@torch.no_grad()
def test_positions_that_do_not_fit_the_call():
    case = load("llava")
    inputs = case.batch([joined(*pair) for pair in samples(case)[:2]])
    ran = []
    handle = case.model.model.language_model.layers[0].register_forward_pre_hook(lambda *_: ran.append(None))
    try:
        with rk.apply(case.model, policy_of(case)) as routing:
            for position, message in (
                (torch.tensor([300, 300, 300]), "must hold a position for each of 2 samples, got 3"),
                (20, "must be positions behind the last visual token of each sample, got ones with 572 visual tokens"),
            ):
                routing.answers_from = position
                with pytest.raises(ValueError, match=message):
                    case.model(**inputs)
    finally:
        handle.remove()
    assert not ran


@torch.no_grad()
def test_one_transfer_with_labels(transfers):
    case = load("llava")
    pairs = samples(case)
    inputs = case.batch([joined(*pair) for pair in pairs])
    labels = inputs["input_ids"].masked_fill(torch.arange(inputs["input_ids"].shape[1]) < 410, -100)

    def run():
        transfers.clear()
        case.model(**inputs, labels=labels)
        return len(transfers)

    unrouted = run()
    with rk.apply(case.model, policy_of(case)):
        assert run() == unrouted + 1


@torch.no_grad()
def test_labels_of_a_compiled_model():
    case = load_shallow("internvl-llama")
    inputs, labels = one_labelled(case)
    try:
        with rk.apply(case.model, rk.Policy([rk.Stage(1, 0.5), rk.Stage(2, 0.3)])) as routing:
            expected = case.model(**inputs, labels=labels).loss
            chosen = selections(routing.trace)
            compiled = torch.compile(case.model, backend="eager")
            assert (compiled(**inputs, labels=labels).loss - expected).abs() <= 1e-4
            assert selections(routing.trace) == chosen
            compiled(**inputs)
            assert selections(routing.trace) != chosen
    finally:
        torch._dynamo.reset()
