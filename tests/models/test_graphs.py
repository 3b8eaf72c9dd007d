"""A routed model in one graph: prompts of text run as without routing, all else is refused by name."""

import pytest
import torch
from torch._dynamo.exc import Unsupported

import reroute_kernels as rk
from tests.models.conftest import hooks
from tests.models.families import load_shallow
from tests.models.test_lifecycle import TINY, tiny_llava

ONE_GRAPH = "cannot be one graph on a routed model, because how many tokens run depends on input_ids"
EXPORTED = "a routed model can be exported .* with input_ids of text alone"
NO_IMAGES = "input_ids of a routed model must hold no visual tokens in a graph that was made for text"
GREEDY = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(autouse=True)
def _forget_graphs():
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def _tiny():
    return tiny_llava()


@pytest.fixture
def model(_tiny):
    return _tiny[0]


@pytest.fixture
def inputs(_tiny):
    """A prompt with an image, in the middle of it."""
    return {**_tiny[1], "attention_mask": torch.ones_like(_tiny[1]["input_ids"])}


@pytest.fixture
def text():
    ids = torch.tensor([[1, 8, 9, 5, 6]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class Logits(torch.nn.Module):
    """The model as a graph can hold it: tensors in, one tensor out."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask, pixel_values=None):
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "pixel_values": pixel_values}
        return self.model(**inputs, use_cache=False).logits


def traced(model, inputs):
    return torch.jit.trace(Logits(model), example_kwarg_inputs=inputs, strict=False, check_trace=False)


def exported(model, inputs, strict=False):
    return torch.export.export(Logits(model), (), inputs, strict=strict).module()


def compiled(model, inputs):
    return torch.compile(Logits(model), backend="eager", fullgraph=True)


WAYS = {
    "compiled": compiled,
    "exported": exported,
    "exported-strictly": lambda model, inputs: exported(model, inputs, strict=True),
    "traced": traced,
}


@pytest.mark.parametrize("way", [way for way in WAYS if way != "traced"])
@torch.no_grad()
def test_text_in_one_graph(model, inputs, text, way):
    expected = WAYS[way](model, text)(**text)
    image = {name: inputs[name][:, : text[name].shape[1]] for name in text}
    with rk.apply(model, TINY):
        graph = WAYS[way](model, text)
        assert torch.equal(graph(**text), expected)
        with pytest.raises(RuntimeError, match=NO_IMAGES):
            graph(**image)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
@torch.no_grad()
def test_text_traced(model, text):
    """TorchScript drops the assertions of a graph, so that only the traced input is checked."""
    try:
        expected = traced(model, text)(**text)
    except IndexError:
        pytest.skip("a model of this version of transformers cannot be traced")
    with rk.apply(model, TINY):
        assert torch.equal(traced(model, text)(**text), expected)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
@torch.no_grad()
def test_images_in_one_graph(model, inputs, way):
    message = {"compiled": ONE_GRAPH}.get(way, EXPORTED)
    error = Unsupported if way in ("compiled", "exported-strictly") else NotImplementedError
    ran = []
    handle = model.model.language_model.layers[0].register_forward_pre_hook(lambda *_: ran.append(1))
    try:
        with rk.apply(model, TINY), pytest.raises(error, match=message):
            WAYS[way](model, inputs)(**inputs)
    finally:
        handle.remove()
    assert not ran
    assert not hooks(model)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_in_one_graph(model, inputs, text, cache):
    """As many compile `forward`: text is generated as ever, the first call of a prompt with images is refused."""
    settings = {**GREEDY, **({"cache_implementation": cache} if cache == "static" else {})}
    expected = model.generate(**text, **settings)
    with rk.apply(model, TINY) as routing:
        model.forward = torch.compile(model.forward, backend="eager", fullgraph=True)
        try:
            assert torch.equal(model.generate(**text, **settings), expected)
            with pytest.raises(Unsupported, match=ONE_GRAPH):
                model.generate(**inputs, **settings)
        finally:
            del model.forward
        assert routing.trace is None


@pytest.mark.parametrize("queries", [1, 3])
@torch.no_grad()
def test_tokens_on_a_routed_cache_in_one_graph(model, inputs, queries):
    step = {"input_ids": torch.arange(30, 30 + queries)[None]}
    with rk.apply(model, TINY):
        cache = model(**inputs, use_cache=True).past_key_values
        with pytest.raises(Unsupported, match=ONE_GRAPH):
            torch.compile(model, backend="eager", fullgraph=True)(**step, past_key_values=cache)


@torch.no_grad()
def test_text_in_one_graph_beside_a_reducer(text):
    model = load_shallow("llava").model
    expected = compiled(model, text)(**text)
    with rk.apply(model, rk.Policy(TINY.schedule, reducer=rk.reducers.Nuwa(keep=0.5, per_cell=1))):
        assert torch.equal(compiled(model, text)(**text), expected)
