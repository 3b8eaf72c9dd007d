"""Gemma's families, whose masks and rotary embeddings differ between kinds of layers, against the slow way."""

import copy

import pytest
import torch
import transformers

import reroute_kernels as rk
from reroute_kernels.models.adapter import cache_name, cache_of
from reroute_kernels.models.masks import part_of_mask
from tests.models.families import OTHERS, load
from tests.models.handed_features import WINDOW
from tests.models.prompts import ACTIONS, IMAGE, policy, selections
from tests.models.slow_way import SlowWay, decoder_of, layer_types
from tests.models.test_ways import WAYS, Refused

STAGES = (rk.Stage(1, 0.4), rk.Stage(3, 0.3), rk.Stage(5, 0.2))
SEE_IMAGES = tuple(name for name in ("gemma3", "gemma4", "gemma4_unified") if name in OTHERS)
HAS_GEMMA4 = pytest.mark.skipif("gemma4" not in OTHERS, reason="this transformers has no Gemma 4")
CALLS = ("prompt", "contiguous positions", "later turn of text", "several tokens on a cache")


@pytest.fixture(params=SEE_IMAGES)
def family(request):
    return load(request.param)


@pytest.mark.parametrize("title", CALLS)
@pytest.mark.parametrize("name", [name for name in SEE_IMAGES if name != "gemma4_unified"])
def test_ways_of_calling(name, title):
    WAYS[title](load(name))


@pytest.mark.parametrize("title", ["padding right", "flash attention", "static cache", "later turn with an image"])
@pytest.mark.parametrize("name", ["gemma3", "paligemma"])
def test_refused_ways_of_calling(name, title):
    if (name, title) == ("paligemma", "padding right"):
        pytest.skip("its padding may stand on either side")
    with pytest.raises(Refused):
        WAYS[title](load(name))


def seen_by(kwargs):
    """(M, M) bool, the keys that each query of a layer sees; it is causal without a mask."""
    mask, queries = kwargs["attention_mask"], kwargs["hidden_states"].shape[1]
    return torch.ones(queries, queries, dtype=torch.bool).tril() if mask is None else mask[0, 0]


def masks_of(model, inputs, this):
    """The mask that each layer is handed, (L, L) bool, and the positions of the tokens that run there."""
    masks = []
    handles = [
        layer.self_attn.register_forward_pre_hook(
            lambda _, args, kwargs: masks.append(seen_by(kwargs)), with_kwargs=True
        )
        for layer in decoder_of(model).layers
    ]
    try:
        with rk.apply(model, this) as routing, torch.no_grad():
            model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    length = inputs["input_ids"].shape[1]
    rows, starts = torch.arange(length), [stage.layer for stage in this.schedule]
    visual = inputs["input_ids"][0] == IMAGE
    for layer_idx, mask in enumerate(masks):
        if layer_idx in starts:
            selected = routing.trace.stages[starts.index(layer_idx)].selected[0]
            rows = torch.tensor(sorted({*selected.tolist(), *torch.arange(length)[~visual].tolist()}))
        yield layer_idx, mask, rows


@pytest.mark.parametrize("action", ACTIONS)
def test_what_a_token_sees(family, action):
    """Tokens before it and those of its own image, by positions in the full sequence; in some layers, in a window."""
    inputs = family.batch([family.prompt(2, 6, 15, seed=1)])
    visual = inputs["input_ids"][0] == IMAGE
    image = (visual & ~visual.roll(1)).cumsum(dim=0).masked_fill(~visual, 0)
    kinds = layer_types(decoder_of(family.model))
    for layer_idx, mask, rows in masks_of(family.model, inputs, policy(action, STAGES)):
        query, key = rows[:, None], rows
        same = (image[query] == image[key]) & (image[query] > 0)
        near = query - key < WINDOW
        assert (same & (key > query)).any()  # tokens of an image see others behind them
        if kinds[layer_idx] == "full_attention":
            assert torch.equal(mask, (key <= query) | (same & (family.name != "gemma4")))
            continue
        assert torch.equal(mask & near, ((key <= query) | same) & near)
        # Whether the window limits an image, too, differs between versions of transformers.
        far = mask & ~near
        assert torch.equal(far, torch.zeros_like(far)) or torch.equal(far, same & ~near)


@torch.no_grad()
def test_images_and_rotary_embeddings_matter(family):
    """The tests above would see causal masks, and tables of another kind of layer."""
    model, inputs = family.model, family.batch([family.prompt(1, 6, 15, seed=1)])
    with rk.apply(model, policy(schedule=STAGES)) as routing:
        expected = model(**inputs).logits
        # Gemma 4 could not run with the tables of another kind of layer, whose heads have another size.
        for name in ("cuts_masks", "rotates_by_kind")[: 1 + (family.name == "gemma3")]:
            owner = routing._layers if name == "cuts_masks" else routing._adapter
            setattr(owner, name, False)
            assert (model(**inputs).logits - expected).abs().max() > 1e-2
            setattr(owner, name, True)
        torch.testing.assert_close(model(**inputs).logits, expected)


@torch.no_grad()
def check_a_call(model, inputs, this):
    """The routed call selects as the slow way does, and gives its logits."""
    with SlowWay(model, this) as slow:
        expected = model(**inputs).logits
    with rk.apply(model, this) as routing:
        logits = model(**inputs).logits
    assert selections(routing.trace) == slow.selected
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


def test_without_types_of_tokens_images_are_causal(family):
    """As in the model: it makes masks of images by the types of tokens alone."""
    inputs = family.batch([family.prompt(1, 6, 15, seed=1)])
    for name in ("token_type_ids", "mm_token_type_ids"):
        inputs.pop(name, None)
    check_a_call(family.model, inputs, policy(schedule=STAGES))


@torch.no_grad()
def test_attention_implementations_agree(family):
    """sdpa takes boolean masks, eager additive ones, flex attention functions."""
    model = copy.deepcopy(family.model)
    prompts = [family.prompt(1, 6, 15, seed=1), family.prompt(2, 4, 9, seed=2)]
    found = []
    with torch.compiler.set_stance("force_eager"):
        for implementation in ("sdpa", "eager", "flex_attention"):
            model.set_attn_implementation(implementation)
            with rk.apply(model, policy(schedule=STAGES)):
                found.append(model(**family.batch(prompts)).logits[:, -1])
    for logits in found[1:]:
        torch.testing.assert_close(logits, found[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("form", ["sdpa", "eager", "flex_attention"])
@pytest.mark.parametrize("places", [None, torch.tensor([[0, 3], [2, 0]])], ids=["in-order", "apart"])
def test_parts_of_masks(form, places):
    """Each key is seen that is seen in the full sequence; a row without a token sees itself, and no one sees it."""
    torch.manual_seed(0)
    full = torch.rand(2, 1, 6, 6) < 0.6
    full |= torch.eye(6, dtype=torch.bool)
    queries = torch.tensor([[1, 4], [3, -1]])
    cached = queries if places is None else torch.tensor([[1, 2, 3, 4], [-1, 0, 3, 5]])
    like, keys = torch.zeros(1, dtype=torch.float16), cached.shape[1] + 1
    given = full
    if form == "eager":
        given = torch.zeros(full.shape).masked_fill(~full, torch.finfo(torch.float32).min)
    if form == "flex_attention":
        given = torch.nn.attention.flex_attention.create_block_mask(
            lambda sample, head, query, key: full[sample, 0, query, key], 2, None, 6, 6, device="cpu"
        )
    mask = part_of_mask(form, given, queries, cached, keys, like, places)
    for sample in range(2):
        for query in range(2):
            own = query if places is None else int(places[sample, query])
            row, columns = int(queries[sample, query]), [*cached[sample].tolist(), -1]
            expected = [
                key == own or (column >= 0 and bool(full[sample, 0, row, column])) for key, column in enumerate(columns)
            ]
            if form == "flex_attention":
                seen = [bool(mask.mask_mod(*map(torch.tensor, (sample, 0, query, key)))) for key in range(keys)]
            else:
                seen = (mask if form == "sdpa" else mask == 0)[sample, 0, query].tolist()
            assert seen == expected if row >= 0 else seen[own]


def test_models_that_are_refused(family):
    model = copy.deepcopy(family.model)
    with pytest.raises(NotImplementedError, match="needs full attention in all layers from the first decision on"):
        rk.apply(model, rk.Policy(STAGES, "freeze"))
    with pytest.raises(NotImplementedError, match=r"full attention, of this \w+ 1, 3, 5; got layer 2 of 'sliding"):
        rk.apply(model, policy(schedule=(rk.Stage(2, 0.5),)))
    with pytest.raises(NotImplementedError, match="cuda_graph needs full attention"):
        rk.apply(model, policy(schedule=STAGES), cuda_graph="require")
    decoder_of(model).config.layer_types = ["full_attention"] * 6
    with pytest.raises(NotImplementedError, match="cuda_graph needs a model whose tokens see those before them alone"):
        rk.apply(model, policy(schedule=STAGES), cuda_graph="require")
    decoder_of(model).config._attn_implementation = "flash_attention_2"
    with pytest.raises(NotImplementedError, match="for a model in which the tokens of an image see each other"):
        rk.apply(model, policy(schedule=STAGES))
    decoder_of(model).config.use_bidirectional_attention = all_tokens = True if family.name == "gemma3" else "all"
    with pytest.raises(NotImplementedError, match=f"got use_bidirectional_attention={all_tokens!r}"):
        rk.apply(model, policy(schedule=STAGES))


def test_frozen_tokens_where_all_layers_of_the_stages_have_full_attention(family):
    """They are read by the tokens of their image, too, that stand before them."""
    inputs = family.batch([family.prompt(2, 6, 15, seed=1)])
    check_a_call(family.model, inputs, rk.Policy([rk.Stage(5, 0.3)], "freeze"))


@torch.no_grad()
def test_a_classifier_around_gemma3():
    """Routed by the outer model or by the Gemma 3 in it, which is what the automatic class makes of its folder."""
    family = load("shieldgemma2")
    config = transformers.ShieldGemma2Config(**family.model.config.to_dict())
    model = transformers.ShieldGemma2ForImageClassification(config).eval()
    model.model = copy.deepcopy(family.model)
    model.yes_token_index, model.no_token_index = 7, 8
    inputs = family.batch([family.prompt(1, 6, 15, seed=1)])
    this, plain = policy(schedule=STAGES), model(**inputs).logits
    with SlowWay(model.model, this) as slow:
        expected = model(**inputs).logits
    for routed in (model, model.model):
        with rk.apply(routed, this) as routing:
            logits = model(**inputs).logits
        assert selections(routing.trace) == slow.selected
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    assert not torch.equal(logits, plain)
    assert torch.equal(model(**inputs).logits, plain)


# Gemma 4 with inputs of each layer for each token, and layers that reuse keys


@pytest.fixture
def small():
    """Decides at the second layer and the fourth, whose keys and values others reuse."""
    return load("gemma4-e")


@HAS_GEMMA4
@pytest.mark.parametrize("title", ["greedy", "later turn of text", "later turn with an image"])
def test_ways_of_calling_with_reused_keys(small, title):
    """`generate` asks for the last logits alone, for which the model would leave out the other tokens."""
    WAYS[title](small)


@HAS_GEMMA4
@torch.no_grad()
def test_inputs_of_layers_follow_their_tokens(small):
    """The rows of the tokens that run, in every layer of a stage."""
    model, inputs, given = small.model, small.batch([small.prompt(1, 6, 15, seed=1)]), {}
    layers = decoder_of(model).layers

    def noted(layer_idx):
        return lambda _, args: given.setdefault(layer_idx, []).append(args[1])

    model(**inputs)
    with rk.apply(model, policy(schedule=STAGES[:2])) as routing:
        handles = [layer.register_forward_pre_hook(noted(layer_idx)) for layer_idx, layer in enumerate(layers)]
        routed = model(**inputs)
        kept = [stage.selected[0].tolist() for stage in routing.trace.stages]
    plain = model(**inputs)
    for handle in handles:
        handle.remove()
    assert not torch.equal(routed.logits, plain.logits)
    text = (inputs["input_ids"][0] != IMAGE).nonzero().flatten().tolist()
    for layer_idx in range(1, len(layers)):
        first, second = given[layer_idx]
        rows = sorted({*text, *kept[layer_idx >= 3]})
        assert torch.equal(first, second[:, rows])


@HAS_GEMMA4
@pytest.mark.parametrize("layer", [5, 7])
def test_decisions_behind_layers_whose_keys_are_reused_are_refused(small, layer):
    with pytest.raises(NotImplementedError, match=rf"reuse, of this \w+ at 1, 3; got layer {layer}"):
        rk.apply(small.model, policy(schedule=(rk.Stage(1, 0.5), rk.Stage(layer, 0.5))))


# PaliGemma, in which all of a prompt sees all of it


@pytest.mark.parametrize("title", ["padding right", "eager attention", "later turn of text"])
def test_ways_of_calling_with_prefixes(title):
    WAYS[title](load("paligemma"))


@pytest.mark.parametrize("action", [*ACTIONS, "freeze"])
@pytest.mark.parametrize("typed", [True, False])
@torch.no_grad()
def test_prefixes_with_and_without_types_of_tokens(action, typed):
    """Without them layers are handed no mask, and rows without a token must be hidden from the others all the same."""
    family = load("paligemma")
    prompts = [family.prompt(1, 6, 44, seed=1), family.prompt(2, 6, 15, seed=2)]
    this = rk.Policy(STAGES, action)

    def call(*prompts):
        inputs = family.batch(list(prompts))
        if not typed:
            del inputs["token_type_ids"]
        return family.model(**inputs).logits

    with rk.apply(family.model, this) as routing:
        together = call(*prompts)
        found = [selections(routing.trace, row) for row in range(2)]
    for row, prompt in enumerate(prompts):
        with SlowWay(family.model, this) as slow:
            alone = call(prompt)
        assert found[row] == slow.selected
        torch.testing.assert_close(together[row], alone[0], atol=1e-4, rtol=0)


@torch.no_grad()
def test_positions_of_a_prefix_begin_at_one():
    """Where the first layer lacks tokens, by whose cache the model would count them."""
    model, inputs = load("paligemma").model, load("paligemma").batch([load("paligemma").prompt(1, 6, 15, seed=1)])
    length = inputs["input_ids"].shape[1] + 3
    later = {"input_ids": torch.tensor([[7, 8, 9]]), "attention_mask": torch.ones(1, length, dtype=torch.int64)}

    def call():
        return model(**later, **{cache_name(model): cache_of(model(**inputs, use_cache=True))}).logits

    expected = call()
    with rk.apply(model, policy(schedule=(rk.Stage(0, 1.0),))):
        torch.testing.assert_close(call(), expected, atol=1e-4, rtol=0)


def test_a_text_model_that_caps_its_logits_is_refused():
    model = copy.deepcopy(load("paligemma").model)
    model.model.language_model.config.model_type = "gemma2"
    with pytest.raises(NotImplementedError, match="text model of type gemma, got 'gemma2'"):
        rk.apply(model, policy(schedule=STAGES))
