"""Graphs of prefills on a CPU: which calls they refuse, how many are held, and what is left when they go."""

import contextlib
import copy
import functools
import pickle
import threading
import warnings

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

import reroute_kernels as rk
from reroute_kernels.models import CudaGraphs, graphs
from reroute_kernels.models.adapter import cache_name
from tests.models import static_prefills
from tests.models.conftest import hooks
from tests.models.families import load
from tests.models.slow_way import decoder_of
from tests.models.test_lifecycle import TINY, tiny_llava


@pytest.fixture
def runs(monkeypatch):
    """The runs of the static code, in order."""
    return static_prefills.use(monkeypatch)


@pytest.fixture
def tiny():
    """A model of its own, with a prompt."""
    return tiny_llava()


class Middle:
    """A ranking that is not of the library."""

    def rank(self, candidates):
        return -(candidates.ordinals - 2).abs().float()


@pytest.fixture
def model(tiny):
    return tiny[0]


@pytest.fixture
def inputs(tiny):
    return {**tiny[1], "attention_mask": torch.ones_like(tiny[1]["input_ids"]), "use_cache": True}


# Refused, or run without a graph


@contextlib.contextmanager
def nothing_attends(model):
    """Asserts that no layer runs, without a hook, which would be a reason itself."""
    kind, ran = type(decoder_of(model).layers[0].self_attn), []
    original = kind.forward
    kind.forward = lambda *args, **kwargs: ran.append(True) or original(*args, **kwargs)
    try:
        yield
    finally:
        kind.forward = original
    assert not ran


def refuses(model, call, message, this=TINY, at_apply=False):
    """A call warns once and runs as without graphs; where they are required it is refused before the first layer."""
    message = f"cuda_graph needs {message}"
    with rk.apply(model, this):
        expected = call()
    with rk.apply(model, this, cuda_graph=True) as routing:
        with pytest.warns(RuntimeWarning, match=f"a prefill runs without a CUDA graph: {message}"):
            assert torch.equal(call(), expected)
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            assert torch.equal(call(), expected)
        assert len(routing.graphs) == 0
        assert routing.trace is not None
    if at_apply:
        with pytest.raises(NotImplementedError, match=message):
            rk.apply(model, this, cuda_graph="require")
    else:
        required = rk.apply(model, this, cuda_graph="require")
        with required, nothing_attends(model), pytest.raises(NotImplementedError, match=message):
            call()
    assert "forward" not in vars(decoder_of(model))


@torch.no_grad()
def test_a_device_without_cuda(model, inputs):
    refuses(model, lambda: model(**inputs).logits, "a model on a CUDA device, got cpu", at_apply=True)
    message = "cuda_graph needs a model on a CUDA device, got cpu"
    with rk.apply(model, TINY, cuda_graph=True) as routing, pytest.raises(NotImplementedError, match=message):
        routing.capture(lengths=[16], visual=[4])


@pytest.mark.parametrize("name", ["aya_vision", "qwen3_5"])
@torch.no_grad()
def test_layers_without_full_attention(name, runs):
    case = load(name)
    inputs = case.batch([case.prompt(1, 6, 15, seed=1)])
    message = "full attention in all layers, got layer 0 of '(sliding|linear)_attention'"
    this = rk.Policy([rk.Stage(1, 0.5), rk.Stage(3, 0.3)])
    refuses(case.model, lambda: case.model(**inputs).logits, message, this, at_apply=True)


@torch.no_grad()
def test_rankings_of_others(model, inputs, runs):
    this = rk.Policy(TINY.schedule, ranking=Middle())
    message = "a ranking of reroute_kernels.rankings other than TextRaters, got <.*Middle"
    refuses(model, lambda: model(**inputs).logits, message, this, at_apply=True)


@torch.no_grad()
def test_layers_that_something_is_put_around(model, inputs, runs):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    layers = decoder_of(model).layers
    layers[1] = checkpoint_wrapper(layers[1])
    message = "decoder layers that nothing is put around, got CheckpointWrapper"
    refuses(model, lambda: model(**inputs).logits, message, at_apply=True)


@torch.no_grad()
def test_adapters_of_peft(model, inputs, runs):
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"])).eval()
    message = r"a decoder without adapters of PEFT \(merge_and_unload\), got a Linear"
    refuses(model, lambda: wrapped(**inputs).logits, message, at_apply=True)
    merged = wrapped.merge_and_unload()
    with rk.apply(merged, TINY, cuda_graph="require"):
        merged(**inputs)
    assert runs


@torch.no_grad()
def test_experts_that_ask_the_device(runs):
    case = load("qwen3_vl_moe")
    inputs, config = case.batch([case.prompt(1, 6, 15, seed=1)]), decoder_of(case.model).config
    before, config._experts_implementation = config._experts_implementation, "eager"
    try:
        message = "experts_implementation to be batched_mm, grouped_mm, got 'eager'"
        refuses(case.model, lambda: case.model(**inputs).logits, message, at_apply=True)
    finally:
        config._experts_implementation = before


@torch.no_grad()
def test_flex_attention(model, inputs, runs, monkeypatch):
    model.set_attn_implementation("flex_attention")
    with pytest.raises(NotImplementedError, match=r"attn_implementation .* got 'flex_attention'"):
        rk.apply(model, TINY, cuda_graph="require")
    assert not hooks(model)


@torch.no_grad()
def test_contiguous_positions_of_a_rotary_embedding_that_depends_on_the_length(model, inputs, runs, monkeypatch):
    monkeypatch.setattr(decoder_of(model).rotary_emb, "rope_type", "dynamic")
    this = rk.Policy(TINY.schedule, positions="contiguous")
    monkeypatch.setattr(decoder_of(model).rotary_emb, "max_seq_len_cached", 2048, raising=False)
    message = "a rotary embedding of fixed frequencies where positions are contiguous, got 'dynamic'"
    refuses(model, lambda: model(**inputs).logits, message, this, at_apply=True)


def test_gradients(model, inputs, runs):
    refuses(model, lambda: model(**inputs).logits, "torch.no_grad or torch.inference_mode around a call")


@torch.no_grad()
def test_training_mode(model, inputs, runs):
    model.train()
    refuses(model, lambda: model(**inputs).logits, r"a model in evaluation mode \(model.eval\), got training mode")


@torch.no_grad()
def test_autocast(model, inputs, runs):
    def call():
        with torch.autocast("cpu", torch.bfloat16):
            return model(**inputs).logits

    refuses(model, call, "autocast to be off, got it on")


@torch.no_grad()
def test_flop_counters(model, inputs, runs):
    def call():
        with FlopCounterMode(display=False) as counter:
            logits = model(**inputs).logits
        assert counter.get_total_flops()
        return logits

    refuses(model, call, "a call outside of modes that are told of every operation, got one inside")


@torch.no_grad()
def test_compiled_models(model, inputs, runs):
    def call():
        torch._dynamo.reset()
        return torch.compile(model, backend="eager")(**inputs).logits

    try:
        with rk.apply(model, TINY, cuda_graph=True) as routing:
            expected = model(**inputs).logits
            routing.graphs.clear()
            with pytest.warns(RuntimeWarning, match="cuda_graph needs a call that torch.compile does not compile"):
                torch.testing.assert_close(call(), expected, atol=1e-5, rtol=0)
            assert len(routing.graphs) == 0
    finally:
        torch._dynamo.reset()


@torch.no_grad()
def test_offloaded_layers(model, inputs, runs):
    accelerate = pytest.importorskip("accelerate")
    accelerate.cpu_offload(model, execution_device="cpu")
    message = "a model on a CUDA device, got meta"
    with rk.apply(model, TINY, cuda_graph=True), pytest.warns(RuntimeWarning, match=message):
        model(**inputs)
    assert not runs


@torch.no_grad()
def test_placed_layers(model, inputs, runs):
    hooks = pytest.importorskip("accelerate.hooks")
    hooks.add_hook_to_module(decoder_of(model).layers[1], hooks.AlignDevicesHook(execution_device="cpu"))
    message = "modules of the decoder with the forward of their class, got a LlamaDecoderLayer with another"
    with rk.apply(model, TINY, cuda_graph=True), pytest.warns(RuntimeWarning, match=message):
        model(**inputs)
    assert not runs


def wrapped(forward, called=None):
    """The same function in another one."""

    @functools.wraps(forward)
    def around(*args, **kwargs):
        if called is not None:
            called.append(True)
        return forward(*args, **kwargs)

    return around


@pytest.mark.parametrize("of", ["decoder", "layer", "norm"])
@torch.no_grad()
def test_a_forward_that_someone_replaced(model, inputs, runs, of):
    decoder = decoder_of(model)
    module = {"decoder": decoder, "layer": decoder.layers[1].mlp, "norm": decoder.norm}[of]
    message = f"of their class, got a {type(module).__name__} with another"
    mine = module.forward = wrapped(module.forward)
    with rk.apply(model, TINY, cuda_graph="require"), pytest.raises(NotImplementedError, match=message):
        model(**inputs)
    assert module.forward is mine
    del module.forward
    with rk.apply(model, TINY, cuda_graph="require"):
        model(**inputs)
        if of != "decoder":
            module.forward = wrapped(module.forward)
            with pytest.raises(NotImplementedError, match=message):
                model(**inputs)
            del module.forward
    assert len(runs) == 1


@pytest.mark.parametrize("of", ["layer", "projection", "norm"])
@torch.no_grad()
def test_hooks_of_others(model, inputs, runs, of):
    decoder = decoder_of(model)
    module = {"layer": decoder.layers[2], "projection": decoder.layers[0].self_attn.k_proj, "norm": decoder.norm}[of]
    seen = []
    handle = module.register_forward_hook(lambda *_: seen.append(True))
    message = f"a decoder without forward hooks of others, got one on a {type(module).__name__}"
    refuses(model, lambda: model(**inputs).logits, message)
    assert seen
    handle.remove()
    with rk.apply(model, TINY, cuda_graph="require"):
        model(**inputs)
        with module.register_forward_pre_hook(lambda *_: None), pytest.raises(NotImplementedError, match="hooks of"):
            model(**inputs)
        model(**inputs)
    assert len(runs) == 2


@torch.no_grad()
def test_hooks_on_every_module(model, inputs, runs):
    with torch.nn.modules.module.register_module_forward_hook(lambda *_: None):
        refuses(model, lambda: model(**inputs).logits, "a decoder without forward hooks of others, got one on a Module")


@torch.no_grad()
def test_hooks_on_the_decoder_run(model, inputs, runs):
    seen = []
    handle = decoder_of(model).register_forward_hook(lambda *_: seen.append(True))
    with rk.apply(model, TINY, cuda_graph="require"), handle:
        model(**inputs)
    assert (len(seen), len(runs)) == (1, 1)


@torch.no_grad()
def test_an_image_on_a_filled_cache(model, inputs, runs):
    def call():
        cache = model(input_ids=torch.tensor([[5, 6]]), use_cache=True).past_key_values
        mask = torch.nn.functional.pad(inputs["attention_mask"], (2, 0), value=1)
        return model(**{**inputs, "attention_mask": mask}, past_key_values=cache).logits

    with rk.apply(model, TINY):
        expected = call()
    message = f"an empty {cache_name(model.model)}, got one with tokens"
    with rk.apply(model, TINY, cuda_graph=True), pytest.warns(RuntimeWarning, match=message):
        assert torch.equal(call(), expected)
    with rk.apply(model, TINY, cuda_graph="require"), pytest.raises(NotImplementedError, match="got one with tokens"):
        call()
    assert not runs


@torch.no_grad()
def test_other_caches(model, inputs, runs):
    def call():
        cache = transformers.StaticCache(config=model.config.text_config, max_cache_len=32)
        return model(**inputs, past_key_values=cache).logits

    refuses(model, call, f"{cache_name(model.model)} to be a DynamicCache on the device, got StaticCache")


@torch.no_grad()
def test_answers(model, inputs, runs):
    labels = inputs["input_ids"].clone()
    labels[:, :6] = -100
    refuses(model, lambda: model(**inputs, labels=labels).logits, "a prompt whose last token ranks, got tokens behind")


@torch.no_grad()
def test_router_logits(runs):
    case = load("qwen3_vl_moe")
    inputs = case.batch([case.prompt(1, 6, 15, seed=1)])
    this = rk.Policy([rk.Stage(1, 0.5)])
    message = "a call without output_router_logits, which changes the decoder's work"
    refuses(case.model, lambda: case.model(**inputs, output_router_logits=True).logits, message, this)


@torch.no_grad()
def test_flash_attention_in_a_padded_batch(model, inputs, runs, monkeypatch):
    monkeypatch.setattr(graphs, "mask_format", lambda implementation: "flash_attention")
    inputs["attention_mask"][:, 0] = 0
    message = "prompts of one length under flash attention, got a padded batch"
    refuses(model, lambda: model(**inputs).logits, message)


@torch.no_grad()
def test_operations_that_cannot_be_captured(model, inputs, runs, monkeypatch):
    """The reason is that of the device, and it is not tried again."""
    tried = []

    def fails(prefill, pool):
        tried.append(prefill.key)
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setitem(graphs._RUNNERS, "cpu", (fails, object))
    message = "layers that can be captured, got RuntimeError: operation not permitted when stream is capturing"
    refuses(model, lambda: model(**inputs).logits, message)
    assert len(tried) == 2


@pytest.mark.parametrize("given", ["always", 1, None])
def test_argument(model, given):
    with pytest.raises(ValueError, match=f"cuda_graph must be False, True, .* got {given!r}"):
        rk.apply(model, TINY, cuda_graph=given)
    assert not hooks(model)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [("require", 1, TypeError), ("multiple", 1.5, TypeError), ("multiple", 0, ValueError), ("limit", -1, ValueError)],
)
def test_settings(name, value, error):
    with pytest.raises(error, match=f"{name} must be .* got {value}"):
        CudaGraphs(**{name: value})


@torch.no_grad()
def test_a_refused_replacement_leaves_the_routing_at_work(model, inputs, runs):
    with rk.apply(model, TINY, cuda_graph=True) as routing:
        model(**inputs)
        with pytest.raises(NotImplementedError, match="a ranking of"):
            rk.apply(model, rk.Policy(TINY.schedule, ranking=Middle()), replace=True, cuda_graph="require")
        assert len(routing.graphs) == 1
        model(**inputs)
    assert len(runs) == 2


# Held, dropped and captured ahead


def prompts(counts):
    """Prompts of the tiny model with so many text tokens behind the image."""
    for count in counts:
        _, inputs = tiny_llava()
        text = torch.arange(10, 10 + count)[None]
        yield {**inputs, "input_ids": torch.cat([inputs["input_ids"], text], dim=1)}


@torch.no_grad()
def test_graphs_are_bounded(model, runs):
    settings = CudaGraphs(require=True, multiple=8, limit=2)
    with rk.apply(model, TINY, cuda_graph=settings) as routing:
        assert (len(routing.graphs), routing.graphs.bytes, routing.graphs.keys) == (0, 0, [])
        for number, inputs in enumerate(prompts([0, 8, 0, 16])):
            model(**inputs)
            assert routing.graphs.keys[-1].length == [8, 16, 8, 24][number]
        assert [key.length for key in routing.graphs.keys] == [8, 24]
        assert routing.graphs.bytes > 0
        assert repr(routing.graphs).startswith("Graphs(2 held, ")
        routing.graphs.clear()
        assert (len(routing.graphs), routing.graphs.bytes) == (0, 0)
        model(**next(prompts([0])))
        assert len(routing.graphs) == 1
    assert len(routing.graphs) == 0


@torch.no_grad()
def test_captured_ahead(model, inputs, runs):
    with rk.apply(model, TINY) as routing:
        expected = model(**inputs).logits
        with pytest.raises(RuntimeError, match="with cuda_graph=True to capture prefills"):
            routing.capture(lengths=[8], visual=[4])
    with rk.apply(model, TINY, cuda_graph="require") as routing:
        keys = routing.capture(lengths=[8, 100], visual=[4, 7])
        assert routing.graphs.keys == keys
        assert [(key.length, key.visual) for key in keys] == [(64, (4,)), (64, (7,)), (128, (4,)), (128, (7,))]
        del runs[:]
        torch.testing.assert_close(model(**inputs).logits, expected, atol=1e-5, rtol=0)
        assert len(routing.graphs) == 4
        assert len(runs) == 1
        with pytest.raises(ValueError, match=r"visual must hold numbers, or one for each of 2 samples, got \(4,\)"):
            routing.capture(batch=2, lengths=[8], visual=[(4,)])
        with pytest.raises(ValueError, match="visual must stay below the length of the prompt, 8, got 8"):
            routing.capture(lengths=[8], visual=[8])
        assert routing.capture(batch=2, lengths=[8], visual=[(4, 0)], padded=True)[0].padded
    with pytest.raises(RuntimeError, match="to capture prefills"):
        routing.capture(lengths=[8], visual=[4])


@pytest.mark.parametrize("name", ["glm4v", "qwen2_vl", "qwen3_vl", "idefics3"])
@torch.no_grad()
def test_captured_ahead_in_other_families(name, runs):
    case = load(name)
    inputs = case.batch([case.prompt(1, 6, 15, seed=1)])
    with rk.apply(case.model, rk.Policy([rk.Stage(1, 0.5), rk.Stage(3, 0.25)]), cuda_graph="require") as routing:
        case.model(**inputs)
        (key,) = routing.graphs.keys
        routing.graphs.clear()
        assert routing.capture(lengths=[inputs["input_ids"].shape[1]], visual=key.visual) == [key]


@torch.no_grad()
def test_weights_that_moved(model, inputs, runs):
    """Graphs hold places of weights: what was captured before goes."""
    with rk.apply(model, TINY, cuda_graph="require") as routing:
        model(**inputs)
        layer = decoder_of(model).layers[1]
        for change in (
            lambda: setattr(layer.mlp, "up_proj", torch.nn.Linear(16, 16, bias=False)),
            lambda: model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True),
            lambda: setattr(layer.self_attn.k_proj.weight, "data", torch.randn(16, 16)),
        ):
            held = routing.graphs._held.copy()
            change()
            found = model(**inputs).logits
            assert len(routing.graphs) == 1
            assert not set(map(id, held.values())) & set(map(id, routing.graphs._held.values()))
            with rk.apply(copy.copy(model), TINY, replace=True):
                expected = model(**inputs).logits
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
            routing = rk.apply(model, TINY, cuda_graph="require")
            model(**inputs)
        routing.remove()


@torch.no_grad()
def test_attention_that_was_changed(model, inputs, runs):
    with rk.apply(model, TINY, cuda_graph="require") as routing:
        first = model(**inputs).logits
        model.set_attn_implementation("eager")
        torch.testing.assert_close(model(**inputs).logits, first, atol=1e-5, rtol=0)
        assert [key.form for key in routing.graphs.keys] == ["sdpa", "eager"]


@torch.no_grad()
def test_two_threads(model, inputs, runs):
    others = [{**inputs, "input_ids": inputs["input_ids"] + shift} for shift in (0, 0)]
    others[1]["input_ids"] = inputs["input_ids"].clone()
    others[1]["input_ids"][:, -1] = 20
    with rk.apply(model, TINY):
        expected = [model(**each).logits for each in others]
    found: list[list] = [[], []]

    @torch.no_grad()
    def work(number):
        for _ in range(10):
            found[number].append(model(**others[number]).logits)

    with rk.apply(model, TINY, cuda_graph="require") as routing:
        threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(routing.graphs) == 1
    for logits, wanted in zip(found, expected, strict=True):
        assert len(logits) == 10
        for each in logits:
            torch.testing.assert_close(each, wanted, atol=1e-5, rtol=0)


# Applied and removed


@torch.no_grad()
def test_removal_gives_the_decoder_its_forward_back(model, inputs, runs):
    decoder = decoder_of(model)
    expected, before = model(**inputs).logits, dict(vars(decoder))
    routing = rk.apply(model, TINY, cuda_graph=True)
    assert "forward" in vars(decoder)
    model(**inputs)
    routing.remove()
    routing.remove()
    assert vars(decoder) == before
    assert torch.equal(model(**inputs).logits, expected)
    assert len(runs) == 1
    copy.deepcopy(model)
    pickle.dumps(decoder)


@torch.no_grad()
def test_removal_gives_back_a_forward_of_the_instance(model, inputs):
    decoder = decoder_of(model)
    mine = decoder.forward = wrapped(decoder.forward)
    rk.apply(model, TINY, cuda_graph=True).remove()
    assert decoder.forward is mine


@torch.no_grad()
def test_removal_below_a_wrapper_that_came_later(model, inputs, runs):
    decoder, called = decoder_of(model), []
    expected = model(**inputs).logits
    routing = rk.apply(model, TINY, cuda_graph="require")
    wrapper = decoder.forward = wrapped(decoder.forward, called)
    model(**inputs)
    assert (len(called), len(runs)) == (1, 1)
    routing.remove()
    assert decoder.forward is wrapper
    assert torch.equal(model(**inputs).logits, expected)
    assert (len(called), len(runs)) == (2, 1)
    del decoder.forward


@torch.no_grad()
def test_a_routed_model_cannot_be_copied(model, runs):
    with rk.apply(model, TINY, cuda_graph=True):
        with pytest.raises(TypeError, match="a routed model cannot be copied"):
            copy.deepcopy(model)
        with pytest.raises(TypeError, match="cannot be pickled"):
            pickle.dumps(model)


@torch.no_grad()
def test_replaced_by_one_without_graphs(model, inputs, runs):
    rk.apply(model, TINY, cuda_graph=True)
    with rk.apply(model, TINY, replace=True) as routing:
        assert routing.graphs is None
        assert "forward" not in vars(decoder_of(model))
        model(**inputs)
    assert not runs


@torch.no_grad()
def test_an_error_inside_leaves_nothing(model, inputs, runs, monkeypatch):
    """Neither in the next call nor in the cache, which is no finished prompt's."""
    with rk.apply(model, TINY, cuda_graph="require") as routing:
        expected = model(**inputs).logits
        trace = routing.trace
        cache = transformers.DynamicCache(config=model.config.text_config)
        with monkeypatch.context() as patched:
            patched.setattr(graphs, "take_decisions", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                model(**inputs, past_key_values=cache)
        assert routing.trace is trace
        with pytest.raises(ValueError, match="must come from a finished call"):
            model(input_ids=torch.tensor([[7]]), past_key_values=cache)
        assert torch.equal(model(**inputs).logits, expected)
        assert not routing._running.stack


# Without a routing


@pytest.mark.parametrize("name", ["llava_next", "qwen2_vl", "qwen3_vl", "glm4v"])
@pytest.mark.parametrize("side", [None, "left", "right"], ids=str)
@torch.no_grad()
def test_unrouted(name, runs, side):
    case = load(name)
    first, *others = case.prompt(1, 6, 15, seed=1), case.prompt(2, 4, 9, seed=2)
    inputs = case.batch([first, *(others if side else ())], side or "left")
    settings = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    valid = inputs["attention_mask"].bool()
    expected = case.model(**inputs, use_cache=True)
    with rk.models.unrouted(case.model, cuda_graph="require") as handle:
        found = case.model(**inputs, use_cache=True)
        tokens = case.model.generate(**inputs, **settings)
        assert len(handle.graphs) == 1
        assert {key.visual for key in handle.graphs.keys} == {()}
        for layer, wanted in zip(found.past_key_values.layers, expected.past_key_values.layers, strict=True):
            for ours, theirs in ((layer.keys, wanted.keys), (layer.values, wanted.values)):
                ours, theirs = ours.transpose(1, 2)[valid], theirs.transpose(1, 2)[valid]
                torch.testing.assert_close(ours, theirs, atol=1e-5 * float(theirs.abs().max()), rtol=0)
    assert len(runs) == 2
    scale = float(expected.logits.abs().max())
    torch.testing.assert_close(found.logits[valid], expected.logits[valid], atol=1e-5 * scale, rtol=0)
    if side != "right":  # else it goes on from padding
        assert torch.equal(case.model.generate(**inputs, **settings), tokens)
    assert "forward" not in vars(decoder_of(case.model))


@torch.no_grad()
def test_unrouted_refuses(model, inputs, runs):
    with pytest.raises(ValueError, match="where nothing is routed, got False"):
        rk.models.unrouted(model, cuda_graph=False)
    with rk.apply(model, TINY), pytest.raises(ValueError, match="model must not be routed, got one that is"):
        rk.models.unrouted(model)
    mask = torch.ones(1, 1, 8, 8, dtype=torch.bool).tril()
    with rk.models.unrouted(model, cuda_graph="require"):
        with pytest.raises(NotImplementedError, match="an attention_mask of two dimensions where nothing is routed"):
            model(**{**inputs, "attention_mask": mask})
        cache = model(**inputs).past_key_values
        with pytest.raises(NotImplementedError, match="got one with tokens"):
            model(input_ids=torch.tensor([[7, 8]]), past_key_values=cache)
    assert len(runs) == 1
