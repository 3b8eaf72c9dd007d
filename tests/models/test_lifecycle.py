"""State that a routing holds and leaves: applied, replaced, copied, saved, interrupted, dropped; and its cost."""

import copy
import gc
import pickle
import queue
import threading
import weakref
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

import reroute_kernels as rk
from tests.models.conftest import hooks
from tests.models.prompts import GOLDEN, IMAGE, policy, selections

GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
OTHER = policy("remove", (rk.Stage(3, 0.3), rk.Stage(7, 0.15)))


def load(family):
    """A model of its own, for changes that the shared one must not have."""
    return transformers.AutoModelForImageTextToText.from_pretrained(GOLDEN / family, dtype=torch.float32).eval()


def tiny_llava(layers=3):
    """A model of its own whose calls take milliseconds, with a prompt of an image of four tokens."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**sizes, num_hidden_layers=1, image_size=8, patch_size=4),
        text_config=transformers.LlamaConfig(
            **sizes, num_hidden_layers=layers, vocab_size=IMAGE + 1, bos_token_id=1, eos_token_id=2
        ),
        image_token_index=IMAGE,
    )
    inputs = {"input_ids": torch.tensor([[1, *[IMAGE] * 4, 5, 6, 7]]), "pixel_values": torch.randn(1, 3, 8, 8)}
    return transformers.LlavaForConditionalGeneration(config).eval(), inputs


TINY = rk.Policy([rk.Stage(1, 0.5), rk.Stage(2, 0.25)])


# Applied, replaced and removed


def test_second_routing_of_one_model(model):
    with rk.apply(model, policy()), pytest.raises(ValueError, match=r"must not be routed already.*replace=True"):
        rk.apply(model, policy())
    with rk.apply(model, policy()):
        pass


@torch.no_grad()
def test_replacing_a_routing(model, inputs):
    with rk.apply(model, OTHER) as routing:
        expected = model(**inputs).logits
        count = len(hooks(model))
    replaced = rk.apply(model, policy())
    model(**inputs)
    seen = replaced.trace
    with rk.apply(model, OTHER, replace=True) as routing:
        assert len(hooks(model)) == count
        assert torch.equal(model(**inputs).logits, expected)
        assert routing.trace.policy == OTHER
        assert replaced.trace is seen
        replaced.remove()  # is removed: nothing happens
        assert torch.equal(model(**inputs).logits, expected)
        with pytest.raises(ValueError, match="must not be routed already"):
            rk.apply(model, policy())


@torch.no_grad()
def test_replace_on_a_model_without_a_routing(model, inputs):
    with rk.apply(model, policy()):
        expected = model(**inputs).logits
    with rk.apply(model, policy(), replace=True):
        assert torch.equal(model(**inputs).logits, expected)


@torch.no_grad()
def test_refused_replacement_leaves_the_routing_at_work(model, inputs):
    with rk.apply(model, policy()) as routing:
        expected = model(**inputs).logits
        with pytest.raises(ValueError, match="below layer 12"):
            rk.apply(model, policy(schedule=(rk.Stage(40, 0.5),)), replace=True)
        with pytest.raises(TypeError, match="replace must be a bool, got 'yes'"):
            rk.apply(model, OTHER, replace="yes")
        routing.trace = None
        assert torch.equal(model(**inputs).logits, expected)
        assert routing.trace is not None


@torch.no_grad()
def test_cache_of_a_replaced_policy_is_refused(model, inputs):
    step = {"input_ids": torch.tensor([[7]])}
    with rk.apply(model, policy()):
        cache = model(**inputs, use_cache=True).past_key_values
        with rk.apply(model, OTHER, replace=True), pytest.raises(ValueError, match="filled under this policy"):
            model(**step, past_key_values=cache)
        with rk.apply(model, policy()):
            model(**step, past_key_values=cache)


@torch.no_grad()
def test_two_policies_one_after_another_equal_fresh_models(model, family, inputs, others):
    fresh = {}
    for this in (policy(), OTHER):
        other = load(family)
        with rk.apply(other, this):
            fresh[this.action] = [other(**given).logits for given in (inputs, others)]
            fresh[this.action].append(other.generate(**inputs, **GREEDY))
    for this in (policy(), OTHER, policy()):
        with rk.apply(model, this):
            results = [model(**given).logits for given in (inputs, others)]
            results.append(model.generate(**inputs, **GREEDY))
        assert all(map(torch.equal, results, fresh[this.action]))


@torch.no_grad()
def test_two_models_at_once(model, inputs):
    other = copy.deepcopy(model)
    expected = {}
    for this in (policy(), OTHER):
        with rk.apply(model, this):
            expected[this.action] = model.generate(**inputs, **GREEDY)
    with rk.apply(model, policy()) as first, rk.apply(other, OTHER) as second:
        for _ in range(2):
            first.trace = second.trace = None
            assert torch.equal(model.generate(**inputs, **GREEDY), expected["reroute"])
            assert second.trace is None
            assert torch.equal(other.generate(**inputs, **GREEDY), expected["remove"])
            assert (first.trace.policy, second.trace.policy) == (policy(), OTHER)
    assert not hooks(other)


# Moved, copied and saved


@pytest.mark.parametrize("first", ["apply", "to"])
@pytest.mark.parametrize("target", [torch.bfloat16, torch.device("cpu")], ids=["bfloat16", "cpu"])
@torch.no_grad()
def test_applied_before_and_after_moving(model, inputs, first, target):
    results = []
    for applied_first in (True, False):
        other = copy.deepcopy(model)
        if not applied_first:
            other.to(target)
        with rk.apply(other, policy()) as routing:
            if applied_first:
                other.to(target)
            given = {**inputs, "pixel_values": inputs["pixel_values"].to(other.dtype)}
            results.append((other(**given).logits, selections(routing.trace), other.generate(**given, **GREEDY)))
    (logits, selected, tokens), (other_logits, other_selected, other_tokens) = results
    assert logits.dtype == other.dtype
    assert torch.equal(logits, other_logits)
    assert selected == other_selected
    assert torch.equal(tokens, other_tokens)


@torch.no_grad()
def test_moved_to_a_dtype_that_is_not_supported(model, inputs):
    other = copy.deepcopy(model)
    given = {**inputs, "pixel_values": inputs["pixel_values"].double()}
    with rk.apply(other, policy()):
        other.double()
        with pytest.raises(ValueError, match=r"float32, float16 or bfloat16, got .* torch\.float64"):
            other(**given)


def test_deep_copy_and_pickle_of_a_routed_model(model):
    with rk.apply(model, policy()):
        with pytest.raises(TypeError, match="a routed model cannot be copied: remove"):
            copy.deepcopy(model)
        with pytest.raises(TypeError, match="a routed model cannot be pickled: remove"):
            pickle.dumps(model)


@torch.no_grad()
def test_deep_copy_of_a_model_that_was_routed(model, inputs):
    expected = model(**inputs).logits
    with rk.apply(model, policy()):
        routed = model(**inputs).logits
    other = copy.deepcopy(model)
    assert not hooks(other)
    assert torch.equal(other(**inputs).logits, expected)
    with rk.apply(other, policy()):
        assert torch.equal(other(**inputs).logits, routed)
        assert torch.equal(model(**inputs).logits, expected)


@pytest.mark.parametrize("copied", ["before", "after"])
@torch.no_grad()
def test_shallow_copy_takes_no_second_routing(model, inputs, copied):
    """It shares every module with the model but the outermost, so that both are routed or none."""
    expected = model(**inputs).logits
    other = copy.copy(model) if copied == "before" else None
    with rk.apply(model, policy()):
        routed, count = model(**inputs).logits, len(hooks(model))
        other = other if other is not None else copy.copy(model)
        with pytest.raises(ValueError, match="must not be routed already"):
            rk.apply(other, policy())
        assert torch.equal(other(**inputs).logits, routed)
        assert len(hooks(model)) == count
        with rk.apply(other, policy(), replace=True):
            assert len(hooks(model)) == count
            assert torch.equal(model(**inputs).logits, routed)
    for either in (model, other):
        assert not hooks(either)
        assert torch.equal(either(**inputs).logits, expected)


def saved(model, folder: Path) -> dict[str, bytes]:
    model.save_pretrained(folder)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@torch.no_grad()
def test_saving_a_routed_model_saves_the_plain_one(model, inputs, tmp_path):
    expected = saved(model, tmp_path / "plain")
    keys, logits = list(model.state_dict()), model(**inputs).logits
    with rk.apply(model, policy()):
        model.generate(**inputs, **GREEDY)
        assert list(model.state_dict()) == keys
        assert saved(model, tmp_path / "routed") == expected
    other = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "routed").eval()
    assert not hooks(other)
    assert torch.equal(other(**inputs).logits, logits)
    with rk.apply(other, policy()), rk.apply(model, policy()):
        assert torch.equal(other(**inputs).logits, model(**inputs).logits)


# Exceptions, interrupts, generators and threads


@pytest.mark.parametrize("raised", [ZeroDivisionError, KeyboardInterrupt, GeneratorExit, SystemExit])
@torch.no_grad()
def test_body_that_raises_leaves_the_plain_model(model, inputs, raised):
    expected = model(**inputs).logits
    weights = {name: value.clone() for name, value in model.state_dict().items()}

    def body():
        with rk.apply(model, policy()):
            model(**inputs)
            raise raised

    with pytest.raises(raised):
        body()
    assert not hooks(model)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(**inputs).logits, expected)


class Raises:
    """Raises in the MLP of a decoder layer, and remembers the tensors that it was called with."""

    def __init__(self, model, number, raised):
        self.raised, self.seen = raised, []
        layer = model.model.language_model.layers[number]
        self.handles = [
            layer.register_forward_pre_hook(self.remember, with_kwargs=True),
            layer.mlp.register_forward_pre_hook(self.fail),
        ]

    def remember(self, layer, args, kwargs):
        tensors = [*args, *kwargs["position_embeddings"]]
        self.seen += [weakref.ref(tensor) for tensor in tensors]

    def fail(self, *_):
        raise self.raised

    def during(self, call) -> None:
        """Make a call, which is interrupted, and let go of the exception."""
        try:
            call()
        except self.raised:
            pass
        else:
            raise AssertionError("the call was not interrupted")
        finally:
            for handle in self.handles:
                handle.remove()

    def alive(self) -> int:
        gc.collect()
        return sum(reference() is not None for reference in self.seen)


@pytest.mark.parametrize("number", [0, 2, 6, 11], ids=lambda number: f"layer-{number}")
@pytest.mark.parametrize("raised", [ZeroDivisionError, KeyboardInterrupt])
@torch.no_grad()
def test_tensors_of_an_interrupted_call_are_freed(model, inputs, raised, number):
    with rk.apply(model, policy()):
        expected = model(**inputs).logits
        failure = Raises(model, number, raised)
        failure.during(lambda: model(**inputs, use_cache=True))
        assert failure.seen
        if raised is KeyboardInterrupt:  # after which PyTorch runs no hook: the next call lets go of it
            assert torch.equal(model(**inputs).logits, expected)
        assert failure.alive() == 0
        assert torch.equal(model(**inputs).logits, expected)


@torch.no_grad()
def test_interrupted_decode_step(model, inputs):
    with rk.apply(model, policy()):
        cache = model(**inputs, use_cache=True).past_key_values
        spare = copy.deepcopy(cache)
        step = {"input_ids": torch.tensor([[7]])}
        expected = model(**step, past_key_values=spare).logits
        spare = copy.deepcopy(cache)
        failure = Raises(model, 6, KeyboardInterrupt)
        failure.during(lambda: model(**step, past_key_values=spare))
        with pytest.raises(ValueError, match="a call on it failed"):
            model(**step, past_key_values=spare)
        assert failure.alive() == 0
        assert torch.equal(model(**step, past_key_values=cache).logits, expected)


@torch.no_grad()
def test_generator_that_is_not_exhausted(model, inputs):
    """A generator that decodes inside the block takes the hooks off when it is closed or collected."""

    def tokens():
        with rk.apply(model, policy()):
            output = model(**inputs, use_cache=True)
            while True:
                token = output.logits[:, -1:].argmax(-1)
                yield token.item()
                output = model(input_ids=token, past_key_values=output.past_key_values)

    expected = model(**inputs).logits
    running = tokens()
    first = [next(running) for _ in range(3)]
    assert hooks(model)
    running.close()
    assert not hooks(model)
    assert torch.equal(model(**inputs).logits, expected)
    running = tokens()
    assert [next(running) for _ in range(3)] == first
    del running
    gc.collect()
    assert not hooks(model)


class Streamer:
    """Hands tokens from the thread that generates to the one that reads."""

    def __init__(self):
        self.tokens = queue.Queue()

    def put(self, tokens):
        self.tokens.put(tokens)

    def end(self):
        self.tokens.put(None)


def test_generation_streamed_from_a_thread(model, inputs):
    with rk.apply(model, policy()) as routing:
        expected = model.generate(**inputs, **GREEDY)[0].tolist()
        for _ in range(2):
            streamer, streamed = Streamer(), []
            thread = threading.Thread(target=model.generate, kwargs={**inputs, **GREEDY, "streamer": streamer})
            thread.start()
            while (tokens := streamer.tokens.get(timeout=60)) is not None:
                streamed += tokens.flatten().tolist()
            thread.join()
            assert streamed == expected
        assert not routing._running.stack


# Dropped


@pytest.mark.parametrize("removed", [True, False], ids=["removed", "applied"])
@pytest.mark.parametrize("interrupted", [False, True], ids=["whole-calls", "interrupted"])
def test_everything_is_collected(removed, interrupted):
    model, inputs = tiny_llava()
    routing = rk.apply(model, TINY)
    output = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
    if interrupted:
        Raises(model, 1, KeyboardInterrupt).during(partial(model, **inputs))
    if removed:
        routing.remove()
    parts = [model, model.model.language_model, model.lm_head.weight, routing, routing.trace, output.past_key_values]
    parts += [output.past_key_values.layers[1].keys]
    references = [weakref.ref(part) for part in parts]
    del model, routing, output, parts
    gc.collect()
    assert [reference() for reference in references] == [None] * len(references)


def test_handle_alone_keeps_its_model_and_a_model_its_routing():
    model, inputs = tiny_llava()
    reference = weakref.ref(rk.apply(model, TINY))
    gc.collect()
    assert reference() is not None, "the routing of a model that is in use was collected"
    model.generate(**inputs, **GREEDY)
    reference().remove()
    gc.collect()
    assert reference() is None


def test_dropped_cache_frees_its_tensors(model, inputs):
    with rk.apply(model, policy()):
        output = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
        cache = output.past_key_values
        references = [weakref.ref(part) for layer in cache.layers for part in (layer, layer.keys, layer.values)]
        references.append(weakref.ref(cache))
        del output, cache
        gc.collect()
        assert not any(reference() is not None for reference in references)


def test_a_thousand_generations_leave_nothing_behind():
    model, inputs = tiny_llava()
    text = {"input_ids": torch.tensor([[1, 5, 6, 7]])}
    settings = {**GREEDY, "max_new_tokens": 2}

    def alive() -> tuple[int, int]:
        gc.collect()
        objects = gc.get_objects()
        return sum(issubclass(type(item), torch.Tensor) for item in objects), len(objects)

    with rk.apply(model, TINY) as routing:
        for number in range(1050):
            if number == 50:
                tensors, objects = alive()
            model.generate(**(text if number % 10 == 5 else inputs), **settings)
        assert len(routing.trace.stages) == 2
        tensors_after, objects_after = alive()
    assert tensors_after == tensors
    assert objects_after - objects < 100, "a tenth of an object per generation"


# Operations that the hooks add


class Operations(TorchDispatchMode):
    """Counts operators dispatched below autograd, views and allocations among them."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.counts[str(operation)] += 1
        return operation(*args, **(kwargs or {}))


def operations(call) -> Counter:
    with Operations() as counter:
        call()
    return counter.counts


@pytest.mark.parametrize("generates", [False, True], ids=["call", "generate"])
@torch.no_grad()
def test_text_costs_what_finding_no_image_costs(generates):
    """Once a prompt, whatever the layers, and nothing at the tokens that follow."""
    added = []
    for layers in (3, 8):
        model, inputs = tiny_llava(layers=layers)
        text = {"input_ids": inputs["input_ids"].clamp(max=399)}
        call = partial(model.generate, **GREEDY) if generates else model
        expected = operations(lambda call=call, text=text: call(**text))
        with rk.apply(model, TINY):
            routed = operations(lambda call=call, text=text: call(**text))
        assert not expected - routed
        added.append(routed - expected)
    assert added[0] == added[1]
    assert sum(added[0].values()) < 30


def decode_operations(model, inputs, masked) -> Counter:
    """Operations of one new token on the cache of a prompt."""
    length = inputs["input_ids"].shape[1]
    step = {"input_ids": torch.tensor([[7]])}
    if masked:
        step.update(attention_mask=torch.ones(1, length + 1), position_ids=torch.tensor([[length]]))
    cache = model(**inputs, use_cache=True).past_key_values
    return operations(lambda: model(**step, past_key_values=cache))


@pytest.mark.parametrize("masked", [False, True], ids=["no-mask", "mask-of-ones"])
@torch.no_grad()
def test_decode_step_dispatches_what_the_unrouted_model_does(model, inputs, masked):
    expected = decode_operations(model, inputs, masked)
    with rk.apply(model, policy()):
        assert decode_operations(model, inputs, masked) == expected


@torch.no_grad()
def test_eager_decode_step_makes_one_mask_a_stage(model, inputs):
    """Without a mask eager attention does less than in the unrouted model, which adds a mask of zeros."""
    model.set_attn_implementation("eager")
    unmasked, masked = (decode_operations(model, inputs, given) for given in (False, True))
    added = []
    for layers in ((1,), (5,), (11,), (1, 2), (3, 9)):
        with rk.apply(model, policy(schedule=tuple(rk.Stage(layer, 0.4) for layer in layers))):
            assert not decode_operations(model, inputs, False) - unmasked
            added.append(decode_operations(model, inputs, True) - masked)
    assert added[0] == added[1] == added[2]
    assert added[3] == added[4]
    # Work common to the stages is done once.
    assert sum(added[0].values()) < sum(added[3].values()) < 2 * sum(added[0].values())


def added_operations(model, inputs, *schedule) -> Counter:
    """Operators that a routed prefill dispatches beside those of the unrouted one."""
    unrouted = operations(lambda: model(**inputs, use_cache=True))
    with rk.apply(model, policy(schedule=schedule)):
        routed = operations(lambda: model(**inputs, use_cache=True))
    assert not unrouted - routed
    return routed - unrouted


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_operations_of_a_routed_prefill_do_not_grow_with_its_stages(model, inputs, attention):
    """Every layer runs the model's own operations, routed or not; beside them there are only those of decisions."""
    model.set_attn_implementation(attention)
    longer = added_operations(model, inputs, rk.Stage(1, 0.4))
    assert longer
    for layer in (5, 11):
        assert added_operations(model, inputs, rk.Stage(layer, 0.4)) == longer  # 11 routed layers, 7, 1
    several = added_operations(model, inputs, rk.Stage(1, 0.4), rk.Stage(2, 0.3), rk.Stage(3, 0.2))
    for layers in ((1, 6, 11), (2, 5, 8), (9, 10, 11)):
        schedule = (rk.Stage(layer, keep) for layer, keep in zip(layers, (0.4, 0.3, 0.2), strict=True))
        assert added_operations(model, inputs, *schedule) == several


@torch.no_grad()
def test_operations_of_a_decision():
    """Decisions after the second cost as much as the second, so that nothing accumulates over a schedule either."""
    model, inputs = tiny_llava(layers=8)
    totals = [
        sum(added_operations(model, inputs, *(rk.Stage(layer, 0.5) for layer in layers)).values())
        for layers in ((1,), (1, 3), (1, 3, 5), (1, 3, 5, 7))
    ]
    assert totals[2] - totals[1] == totals[3] - totals[2]


@torch.no_grad()
def test_layers_of_a_stage_share_their_positions(model, inputs):
    """Rotary tables and positions on several axes are laid out once a stage, not once a layer."""
    handed, handles = [], []

    def remember(layer, args, kwargs):
        handed.append((kwargs["position_embeddings"][0], kwargs["position_ids"]))

    with rk.apply(model, policy(schedule=(rk.Stage(2, 0.4), rk.Stage(7, 0.2)))):
        for layer in model.model.language_model.layers:
            handles.append(layer.register_forward_pre_hook(remember, with_kwargs=True))
        model(**inputs)
    for handle in handles:
        handle.remove()
    for stage in (slice(2, 7), slice(7, 12)):
        for tensors in zip(*handed[stage], strict=True):
            assert len(set(map(id, tensors))) == 1
    assert handed[6][0] is not handed[7][0]
