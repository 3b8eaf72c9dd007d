"""Which calls are those of the loop in `generate`: only there are draft tokens and chunks of a prompt looked for."""

import contextlib
import copy
import threading

import pytest
import torch
from transformers import GenerationMixin, LogitsProcessor, PreTrainedModel, StoppingCriteria

import reroute_kernels as rk
from tests.models.families import first_layers
from tests.models.prompts import batch, policy, selections

GREEDY = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": 2, "pad_token_id": 0}
OF_FIRST_LAYERS = (rk.Stage(1, 0.4), rk.Stage(2, 0.2))
LOOKUP = {**GREEDY, "prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 2}


@pytest.fixture
def repeated(prompt):
    """A prompt in which prompt lookup finds draft tokens before the first call."""
    one = prompt(1, 5, 12, seed=1)
    one.ids = torch.cat([one.ids, one.ids[-9:-3]])
    return batch([one])


class Asker:
    """Makes a plain call of the model about another image, and keeps the logits of its last token."""

    def __init__(self, model, others):
        self.model, self.others, self.answers, self.asks = model, others, [], False

    @torch.no_grad()
    def ask(self, *_):
        if not self.asks:  # not in calls of its own
            self.asks = True
            self.answers.append(self.model(**self.others).logits[0, -1])
            self.asks = False


class AskingProcessor(LogitsProcessor):
    def __init__(self, asker):
        self.asker = asker

    def __call__(self, input_ids, scores):
        self.asker.ask()
        return scores


class ThreadedProcessor(AskingProcessor):
    def __call__(self, input_ids, scores):
        thread = threading.Thread(target=self.asker.ask)
        thread.start()
        thread.join()
        return scores


class AskingCriteria(StoppingCriteria):
    def __init__(self, asker):
        self.asker = asker

    def __call__(self, input_ids, scores, **kwargs):
        self.asker.ask()
        return torch.zeros(len(input_ids), dtype=torch.bool)


class AskingStreamer:
    """`put` is the method of the asker itself, decorated by torch: the loop calls it without a frame in between."""

    def __init__(self, asker):
        self.put, self.end = asker.ask, asker.ask


WHO = {
    "processor": lambda asker: {"logits_processor": [AskingProcessor(asker)]},
    "thread": lambda asker: {"logits_processor": [ThreadedProcessor(asker)]},
    "criteria": lambda asker: {"stopping_criteria": [AskingCriteria(asker)]},
    "streamer": lambda asker: {"streamer": AskingStreamer(asker)},
}


@pytest.mark.parametrize("who", WHO)
@torch.no_grad()
def test_plain_call_from_inside_assisted_decoding(model, repeated, others, who):
    with rk.apply(model, policy()):
        expected, tokens = model(**others).logits[0, -1], model.generate(**repeated, **LOOKUP)
        asker = Asker(model, others)
        asked = model.generate(**repeated, **LOOKUP, **WHO[who](asker))
    assert asker.answers
    assert all(torch.equal(answer, expected) for answer in asker.answers)
    assert torch.equal(asked, tokens)


@torch.no_grad()
def test_plain_call_from_a_hook_of_the_model(model, repeated, others):
    """Two calls of the model are under way then, of which the loop made the outer one."""
    with rk.apply(model, policy()):
        expected = model(**others).logits[0, -1]
        asker = Asker(model, others)
        handle = model.register_forward_pre_hook(asker.ask)
        try:
            model.generate(**repeated, **LOOKUP)
        finally:
            handle.remove()
    assert asker.answers
    assert all(torch.equal(answer, expected) for answer in asker.answers)


@torch.no_grad()
def test_generation_inside_a_generation(model, repeated, others):
    with rk.apply(model, policy()) as routing:
        expected = {}
        for name, settings in (("greedy", GREEDY), ("lookup", LOOKUP)):
            expected[name] = (model.generate(**others, **settings), selections(routing.trace))

        class Generates(LogitsProcessor):
            def __call__(self, input_ids, scores):
                for name, settings in (("greedy", GREEDY), ("lookup", LOOKUP)):
                    found.append((name, model.generate(**others, **settings), selections(routing.trace)))
                return scores

        found = []
        model.generate(**repeated, **LOOKUP, logits_processor=[Generates()])
    assert found
    for name, tokens, selected in found:
        assert torch.equal(tokens, expected[name][0])
        assert selected == expected[name][1]


# Models that share the decoder with the one that was routed, or wrap it


class Wrapper(PreTrainedModel, GenerationMixin):
    """A model of its own which hands every call on."""

    _supports_sdpa = True

    def __init__(self, model):
        super().__init__(model.config)
        self.inside = model
        self.generation_config = model.generation_config

    def prepare_inputs_for_generation(self, *args, **kwargs):
        return self.inside.prepare_inputs_for_generation(*args, **kwargs)

    def forward(self, input_ids=None, pixel_values=None, attention_mask=None, position_ids=None, **kwargs):
        given = {"attention_mask": attention_mask, "position_ids": position_ids, **kwargs}
        return self.inside(input_ids=input_ids, pixel_values=pixel_values, **given)


def subclassed(model):
    """As tools do that put a class of their own under a model; its `__call__` stands between the loop and torch."""

    class Called(type(model)):
        def __call__(self, *args, **kwargs):
            return super().__call__(*args, **kwargs)

    other = copy.copy(model)
    other.__class__ = Called
    return other


def compiled(model):
    other = copy.copy(model)
    other.forward = torch.compile(other.forward, backend="eager")
    return other


SHARED = {"copy": copy.copy, "subclass": subclassed, "wrapper": Wrapper, "compiled-forward": compiled}
MADE = [("copy", "before"), *((kind, "after") for kind in list(SHARED)[:-1])]
MADE += [pytest.param("compiled-forward", "after", marks=pytest.mark.rest)]
of_llava = pytest.mark.parametrize("family", ["llava"], indirect=True)


@of_llava
@pytest.mark.parametrize(("kind", "made"), MADE)
@torch.no_grad()
def test_draft_tokens_of_a_model_that_shares_the_decoder(model, repeated, kind, made):
    model = first_layers(model, 3)
    other = SHARED[kind](model) if made == "before" else None
    with rk.apply(model, policy(schedule=OF_FIRST_LAYERS)) as routing:
        tokens = model.generate(**repeated, **GREEDY)
        expected = selections(routing.trace)
        other = SHARED[kind](model) if other is None else other
        routing.trace = None
        assert torch.equal(other.generate(**repeated, **LOOKUP), tokens)
        assert routing.trace.length > repeated["input_ids"].shape[1], "no draft token stood in the first call"
        assert selections(routing.trace) == expected
    torch._dynamo.reset()


@of_llava
@pytest.mark.parametrize("kind", ["copy", "subclass", "compiled-forward"])
@torch.no_grad()
def test_chunks_of_a_model_that_shares_the_decoder(model, inputs, kind):
    length = inputs["input_ids"].shape[1]
    error, message = NotImplementedError, "prefill_chunk_size must be None for a routed prompt"
    if kind == "compiled-forward":  # some versions hand a chunk over without its image, as a text for the graph
        error, message = RuntimeError, f"{message}|must hold no visual tokens in a graph that was made for text"
    model = first_layers(model, 3)
    with rk.apply(model, policy(schedule=OF_FIRST_LAYERS)), pytest.raises(error, match=message):
        SHARED[kind](model).generate(**inputs, **GREEDY, prefill_chunk_size=length - 5)
    torch._dynamo.reset()


# Models that draft


def ran_layers(model, call) -> int:
    """How often the first layer of a decoder runs in a call that is refused, whose message is checked."""
    ran = []
    handle = model.model.language_model.layers[0].register_forward_pre_hook(lambda *_: ran.append(1))
    try:
        with pytest.raises(NotImplementedError, match="assistant_model must not be routed for a prompt with images"):
            call()
    finally:
        handle.remove()
    return len(ran)


@pytest.mark.parametrize("routed", ["draft", "both", "itself"])
@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sample"])
def test_routed_model_that_drafts(model, inputs, prompt, routed, do_sample):
    """Transformers hands it no image. A prompt of text it drafts as ever."""
    draft = model if routed == "itself" else copy.deepcopy(model)
    text, settings = batch([prompt(0, 9, 4, seed=5)]), {**GREEDY, "do_sample": do_sample}
    torch.manual_seed(0)
    expected = model.generate(**text, **settings, assistant_model=draft)
    with contextlib.ExitStack() as stack:
        for one in {"draft": [draft], "both": [model, draft], "itself": [model]}[routed]:
            stack.enter_context(rk.apply(one, policy()))
        assert not ran_layers(draft, lambda: model.generate(**inputs, **settings, assistant_model=draft))
        torch.manual_seed(0)
        assert torch.equal(model.generate(**text, **settings, assistant_model=draft), expected)


def test_model_assisted_by_one_that_is_not_routed(model, inputs):
    draft = copy.deepcopy(model)
    with rk.apply(model, policy()) as routing:
        expected = model.generate(**inputs, **GREEDY)
        selected, routing.trace = selections(routing.trace), None
        assert torch.equal(model.generate(**inputs, **GREEDY, assistant_model=draft), expected)
        assert selections(routing.trace) == selected
