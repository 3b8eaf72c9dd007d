"""Frozen tokens, read in a stage that they do not run in: tiny models against the slow way, however they are called."""

import copy

import pytest
import torch
import transformers

import reroute_kernels as rk
from reroute_kernels.models import CudaGraphs
from reroute_kernels.models.adapter import cache_of
from reroute_kernels.models.checkpointing import recomputes_hooks
from reroute_kernels.models.layers import RoutedLayers
from reroute_kernels.rankings import AllText, KeyNorm, LastQuery
from reroute_kernels.reducers import Nuwa
from tests.models import static_prefills
from tests.models.conftest import no_layer_runs
from tests.models.families import MODELS, load
from tests.models.prompts import cached_lengths, offset, selections
from tests.models.slow_way import SlowWay, decoder_of, layer_types
from tests.models.test_rankings import assert_scores

SCHEDULE = (rk.Stage(1, 0.4), rk.Stage(3, 0.3), rk.Stage(4, 0.2))
GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
ALL_FULL = [name for name in MODELS if name not in ("aya_vision", "qwen3_5", "qwen3_5_moe")]


def frozen(**others):
    return rk.Policy(**{"schedule": SCHEDULE, "action": "freeze", **others})


@pytest.fixture(params=["llava", "qwen2_5_vl", "qwen3_vl"])
def family(request):
    return load(request.param)


@pytest.fixture
def inputs(family):
    return family.batch([family.prompt(2, 6, 15, seed=1)])


@pytest.fixture
def own(family):
    """A copy of the model, to be changed."""
    return copy.deepcopy(family.model)


def turn_after(family, inputs, count=3):
    """Arguments of a turn of text on a cache."""
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, count), value=1)
    ids = torch.arange(7, 7 + count).expand(len(mask), -1)
    turn = {"input_ids": ids, "attention_mask": mask}
    if rk.models.ADAPTERS[family.model.config.model_type].position_axes == 3:
        turn["position_ids"] = (mask.cumsum(dim=1) - 1)[None, :, -count:].expand(3, -1, -1)
    return turn


def assert_same_cache(actual, expected):
    for ours, theirs in zip(actual.layers, expected.layers, strict=True):
        torch.testing.assert_close(ours.keys, theirs.keys, atol=1e-4, rtol=0)
        torch.testing.assert_close(ours.values, theirs.values, atol=1e-4, rtol=0)


def check(model, inputs, policy):
    with SlowWay(model, policy) as slow, torch.no_grad():
        expected = model(**inputs, use_cache=True)
        answer = model.generate(**inputs, **GREEDY)
    with rk.apply(model, policy) as routing, torch.no_grad():
        output = model(**inputs, use_cache=True)
        assert selections(routing.trace) == slow.selected
        assert_scores(routing.trace, inputs, slow.scores)
        assert model.generate(**inputs, **GREEDY).tolist() == answer.tolist()
        without = model(**inputs, use_cache=False)
    for each in (output, without):
        torch.testing.assert_close(each.logits, expected.logits, atol=1e-4, rtol=0)
    assert_same_cache(cache_of(output), cache_of(expected))
    assert set(cached_lengths(cache_of(output))) == {inputs["input_ids"].shape[1]}


@pytest.mark.parametrize("name", ALL_FULL)
def test_equals_the_slow_way(name):
    family = load(name)
    check(family.model, family.batch([family.prompt(2, 6, 15, seed=1)]), frozen())


@pytest.mark.parametrize("ranking", [LastQuery("previous"), AllText(), KeyNorm("previous")], ids=repr)
def test_rankings(family, inputs, ranking):
    check(family.model, inputs, frozen(ranking=ranking))


@pytest.mark.parametrize("layers", [(0, 1, 2), (0, 5)], ids=str)
def test_decisions_at_the_first_layer(family, inputs, layers):
    """Where DeepStack adds features, frozen tokens receive them, and write their keys anew."""
    keeps = (0.4, 0.3, 0.2)
    check(family.model, inputs, frozen(schedule=[rk.Stage(*each) for each in zip(layers, keeps, strict=False)]))


def test_eager_attention(own, inputs):
    own.set_attn_implementation("eager")
    check(own, inputs, frozen())


@torch.no_grad()
def test_flex_attention():
    family = load("llava")
    model, inputs = copy.deepcopy(family.model), family.batch([family.prompt(2, 6, 15, seed=1)])
    model.set_attn_implementation("flex_attention")
    with rk.apply(family.model, frozen()):
        expected = family.model(**inputs).logits
    with rk.apply(model, frozen()), torch.compiler.set_stance("force_eager"):
        torch.testing.assert_close(model(**inputs).logits, expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_keeping_all_is_the_unrouted_model(family, inputs):
    expected = family.model(**inputs).logits
    with rk.apply(family.model, frozen(schedule=[rk.Stage(1, 1.0), rk.Stage(3, 1.0)])):
        torch.testing.assert_close(family.model(**inputs).logits, expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_it_differs_from_the_other_actions(family, inputs):
    with rk.apply(family.model, frozen()):
        logits = family.model(**inputs).logits[:, -1]
    for policy in (None, rk.Policy(SCHEDULE), rk.Policy(SCHEDULE, "remove")):
        if policy is None:
            other = family.model(**inputs).logits[:, -1]
        else:
            with rk.apply(family.model, policy):
                other = family.model(**inputs).logits[:, -1]
        assert (other - logits).abs().max() > 1e-3


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.filterwarnings("ignore:.*right-padding.*")
@torch.no_grad()
def test_a_padded_batch_equals_its_samples(family, side, first):
    """The prompt, a later turn of text, and `generate`."""
    prompts = [family.prompt(1, 6, 15, seed=1), family.prompt(2, 4, 9, seed=2), family.prompt(0, 4, 30, seed=3)]
    policy, model = frozen(schedule=(rk.Stage(first, 0.4), *SCHEDULE[1:])), family.model
    inputs = family.batch(prompts, side)
    with rk.apply(model, policy) as routing:
        output = model(**inputs, use_cache=True)
        trace, length = routing.trace, output.logits.shape[1]
        later = model(**turn_after(family, inputs), past_key_values=cache_of(output)).logits
        tokens = model.generate(**inputs, **GREEDY)[:, -6:]
        for row, prompt in enumerate(prompts):
            single = family.batch([prompt])
            alone = model(**single, use_cache=True)
            begin = offset(prompt, length, side)
            ours = output.logits[row, begin : begin + len(prompt)]
            torch.testing.assert_close(ours, alone.logits[0], atol=1e-4, rtol=0)
            if prompt.features:
                assert selections(trace, row, begin) == selections(routing.trace)
            after = model(**turn_after(family, single), past_key_values=cache_of(alone)).logits[0]
            if side == "left" or "position_ids" not in turn_after(family, single):  # given ones are replaced there
                torch.testing.assert_close(later[row], after, atol=1e-4, rtol=0)
            assert tokens[row].tolist() == model.generate(**single, **GREEDY)[0, -6:].tolist()


@torch.no_grad()
def test_later_turns(family, inputs):
    """Text, then another image, on a cache that is as long in all layers."""
    image = family.batch([family.prompt(1, 2, 5, seed=4)])
    turn = turn_after(family, inputs)
    length = turn["attention_mask"].shape[1]
    mask = torch.nn.functional.pad(turn["attention_mask"], (0, image["input_ids"].shape[1]), value=1)
    image |= {"attention_mask": mask}
    if "position_ids" in turn:
        image["position_ids"] = torch.arange(length, mask.shape[1]).expand(3, 1, -1)

    def talk():
        logits, cache = [], None
        for each in (inputs, turn, image, turn_after(family, {"attention_mask": mask})):
            output = family.model(**each, past_key_values=cache, use_cache=True)
            cache = cache_of(output)
            logits.append(output.logits)
        return logits, cache

    with SlowWay(family.model, frozen()):
        expected, cache = talk()
    with rk.apply(family.model, frozen()):
        logits, ours = talk()
    for one, other in zip(logits, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=0)
    assert_same_cache(ours, cache)


@pytest.mark.parametrize(
    "options", [{"num_beams": 2}, {"prompt_lookup_num_tokens": 3}, {"cache_implementation": "static"}]
)
@torch.no_grad()
def test_ways_of_generating(family, inputs, options):
    with SlowWay(family.model, frozen()):
        expected = family.model.generate(**inputs, **GREEDY, **({} if "num_beams" not in options else options))
    with rk.apply(family.model, frozen()):
        assert torch.equal(family.model.generate(**inputs, **GREEDY, **options), expected)
    vars(family.model).pop("_cache", None)


@torch.no_grad()
def test_a_reducer_before(family):
    """Tokens that it leaves are frozen and cached; those that it dropped are gone."""
    if family.name == "qwen3_vl":
        pytest.skip("supports no reducer")
    inputs = family.batch([family.prompt(1, 6, 15, seed=1), family.prompt(1, 4, 9, seed=2)])
    policy = frozen(reducer=Nuwa(keep=0.6, per_cell=3))
    with rk.apply(family.model, policy) as routing:
        together = family.model(**inputs, use_cache=True)
        assert {*cached_lengths(cache_of(together))} == {routing.trace.reduction.tokens}
        alone = family.model(**family.batch([family.prompt(1, 4, 9, seed=2)])).logits
    torch.testing.assert_close(together.logits[1, -1], alone[0, -1], atol=1e-4, rtol=0)
    everything = frozen(schedule=[rk.Stage(2, 1.0)], reducer=policy.reducer)
    with rk.apply(family.model, everything):
        expected = family.model(**inputs).logits[:, -1]
    with rk.apply(family.model, rk.Policy((), reducer=policy.reducer)):
        torch.testing.assert_close(family.model(**inputs).logits[:, -1], expected, atol=1e-4, rtol=0)


def gradient(model, inputs):
    model(**inputs).logits[0, -1].logsumexp(0).backward()
    return decoder_of(model).layers[3].self_attn.v_proj.weight.grad


def test_gradients(own, inputs):
    """By hand every layer from the decision on runs on all tokens, and leaves the frozen ones what they were."""
    plain = copy.deepcopy(own)
    with rk.apply(own, frozen(schedule=[rk.Stage(2, 0.4)])) as routing:
        actual = gradient(own, inputs)
    runs = torch.zeros(1, inputs["input_ids"].shape[1], 1, dtype=torch.bool)
    runs[0, routing.trace.stages[0]._kept[0]] = True
    for layer in decoder_of(plain).layers[2:]:
        layer.register_forward_hook(lambda layer, args, output: torch.where(runs, output, args[0]))
    expected = gradient(plain, inputs)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-3)
    assert expected.abs().max() > 1e-3


@torch.no_grad()
def test_a_cache_of_another_policy(family, inputs):
    with rk.apply(family.model, frozen()):
        cache = cache_of(family.model(**inputs, use_cache=True))
    with (
        rk.apply(family.model, rk.Policy(SCHEDULE)),
        pytest.raises(ValueError, match="got a cache filled under freeze:1"),
    ):
        family.model(**turn_after(family, inputs), past_key_values=cache)


# Refused by name


@pytest.mark.parametrize(("name", "kind"), [("aya_vision", "sliding_attention"), ("qwen3_5", "linear_attention")])
def test_layers_without_full_attention_are_refused(name, kind):
    model = load(name).model
    able = [number for number, each in enumerate(layer_types(decoder_of(model))) if each == "full_attention"]
    with pytest.raises(NotImplementedError, match=f"action 'freeze' needs full attention .*, got '{kind}' at layer"):
        rk.apply(model, frozen(schedule=[rk.Stage(able[0], 0.5)]))


def test_adapters_that_do_not_tell_what_is_cached_are_refused():
    class Unrotated(rk.Adapter):
        def ranking(self, *args, **kwargs):
            return super().ranking(*args, **kwargs)._replace(cos=None, sin=None)

    class Told(Unrotated):
        def rotated_keys(self, layer, states, cos, sin):
            return self.keys(layer.self_attn, states)

    model = load("llava").model
    RoutedLayers(Unrotated(model), rk.Policy(SCHEDULE))
    RoutedLayers(Told(model), frozen())
    with pytest.raises(NotImplementedError, match=r"tells how layers cache .*, got Unrotated"):
        RoutedLayers(Unrotated(model), frozen())


def test_flash_attention_is_refused(own):
    decoder_of(own).config._attn_implementation = "flash_attention_2"
    with pytest.raises(NotImplementedError, match="must not be flash attention under the action 'freeze'"):
        rk.apply(own, frozen())


def test_gradient_checkpointing_is_refused(own, inputs):
    own.train().gradient_checkpointing_enable()
    refused = pytest.raises(NotImplementedError, match="gradient checkpointing must be off")
    with rk.apply(own, frozen()), no_layer_runs(own), refused:
        own(**inputs, use_cache=False)
    if not recomputes_hooks(decoder_of(own).layers[1]):  # as before transformers 5.23
        with rk.apply(own, frozen()), torch.no_grad():
            own(**inputs)  # which is not checkpointed


def test_graphs_are_refused(monkeypatch, family):
    static_prefills.use(monkeypatch)
    with pytest.raises(NotImplementedError, match="cuda_graph needs the action 'reroute' or 'remove', got 'freeze'"):
        rk.apply(family.model, frozen(), cuda_graph=CudaGraphs(require=True))


def test_quantized_caches_are_refused(family, inputs):
    class Other(transformers.DynamicCache):
        pass

    refused = pytest.raises(NotImplementedError, match="must be a DynamicCache or StaticCache, got Other")
    with rk.apply(family.model, frozen()), no_layer_runs(family.model), refused:
        family.model(**inputs, past_key_values=Other())
