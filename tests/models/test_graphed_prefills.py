"""Prefills of the static code that CUDA graphs hold, on a CPU: what they compute, and which calls they serve."""

import copy

import pytest
import torch

import reroute_kernels as rk
from reroute_kernels.models import CudaGraphs
from reroute_kernels.rankings import AllText, KeyNorm, LastQuery, Mixed, Random, Remembered, Uniform
from reroute_kernels.reducers import Nuwa
from tests.models import static_prefills
from tests.models.conftest import hooks
from tests.models.families import MODELS, load
from tests.models.prompts import ACTIONS, IMAGE, SCHEDULE, batch, cached_lengths, policy, selections
from tests.models.slow_way import decoder_of

STAGES = (rk.Stage(1, 0.4), rk.Stage(3, 0.3), rk.Stage(5, 0.2))
WITHOUT_FULL_ATTENTION = ("aya_vision", "qwen3_5", "qwen3_5_moe")
FAMILIES = [name for name in MODELS if name not in WITHOUT_FULL_ATTENTION]
GREEDY = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture
def runs(monkeypatch):
    """The runs of the static code, in order."""
    return static_prefills.use(monkeypatch)


@pytest.fixture
def case(request):
    """A tiny model, whose experts ask the device for nothing."""
    family = load(request.param)
    config = decoder_of(family.model).config
    before = getattr(config, "_experts_implementation", None)
    if "moe" in config.model_type:
        config._experts_implementation = "batched_mm"
    yield family
    if "moe" in config.model_type:
        config._experts_implementation = before
    assert not hooks(family.model)
    assert "forward" not in vars(decoder_of(family.model))


def assert_near(actual, expected):
    """Within 1e-5 of the largest value."""
    torch.testing.assert_close(actual, expected, atol=1e-5 * max(1.0, float(expected.abs().max())), rtol=0)


def assert_same_trace(actual, expected):
    assert [stage.tokens for stage in actual.stages] == [stage.tokens for stage in expected.stages]
    assert (actual.length, actual.visual_counts) == (expected.length, expected.visual_counts)
    for ours, theirs in zip(actual.stages, expected.stages, strict=True):
        assert torch.equal(ours._kept, theirs._kept)
        for mine, other in zip(ours.scores, theirs.scores, strict=True):
            torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-4, equal_nan=True)


def assert_same_cache(actual, expected, valid, kept, starts):
    """The same lengths, and the same keys and values wherever a token is."""
    assert cached_lengths(actual) == cached_lengths(expected)
    for layer_idx, (ours, theirs) in enumerate(zip(actual.layers, expected.layers, strict=True)):
        stage = sum(start <= layer_idx for start in starts) - 1
        rows = valid if stage < 0 else kept[stage] >= 0
        for mine, other in ((ours.keys, theirs.keys), (ours.values, theirs.values)):
            assert_near(mine.transpose(1, 2)[rows], other.transpose(1, 2)[rows])


@torch.no_grad()
def conversation(model, inputs, this, **options):
    """A prompt, a turn of three tokens on its cache, and `generate`; with what the prompt did."""
    with rk.apply(model, this, **options) as routing:
        prompt = model(**inputs, use_cache=True)
        trace, cache = routing.trace, copy.deepcopy(prompt.past_key_values)
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 3), value=1)
        turn = {"input_ids": torch.tensor([[7, 8, 9]]).expand(len(mask), -1), "attention_mask": mask}
        if rk.models.ADAPTERS[model.config.model_type].position_axes == 3:
            turn["position_ids"] = (mask.cumsum(dim=1) - 1)[None, :, -3:].expand(3, -1, -1)
        later = model(**turn, past_key_values=prompt.past_key_values)
        tokens = model.generate(**inputs, **GREEDY)
    return prompt.logits, trace, cache, later.logits, tokens


def check(model, inputs, this, runs, **options):
    """Compare the static code with the hooks, and return its first run."""
    valid = inputs["attention_mask"].bool()
    logits, trace, cache, later, tokens = conversation(model, inputs, this)
    assert not runs
    found = conversation(model, inputs, this, cuda_graph=CudaGraphs(require=True, **options))
    assert len(runs) == 2
    assert_same_trace(found[1], trace)
    starts = this.stage_layers
    stages = ([trace.reduction] if trace.reduction else []) + trace.stages
    assert_same_cache(found[2], cache, valid, [stage._kept for stage in stages], starts)
    assert_near(found[0][valid], logits[valid])
    assert_near(found[3], later)
    assert torch.equal(found[4], tokens)
    return runs[0]


@pytest.mark.parametrize("case", ["llava", "qwen3_vl"], indirect=True)
@pytest.mark.parametrize("align", ["stage", "proxy"])
def test_aligned(case, runs, align):
    inputs = case.batch([case.prompt(1, 6, 15, seed=1), case.prompt(2, 4, 9, seed=2)])
    check(case.model, inputs, rk.Policy(STAGES, align=align), runs)


@pytest.mark.parametrize("case", ["llava", "qwen3_vl"], indirect=True)
def test_recycled(case, runs):
    inputs = case.batch([case.prompt(1, 6, 15, seed=1), case.prompt(2, 4, 9, seed=2)])
    check(case.model, inputs, rk.Policy(STAGES, "remove", recycle=0.3), runs)


@pytest.mark.parametrize("case", FAMILIES, indirect=True)
@pytest.mark.parametrize("side", [None, "left", "right"], ids=str)
@pytest.mark.filterwarnings("ignore:.*right-padding.*")
def test_every_family(case, runs, side):
    prompts = [case.prompt(1, 6, 15, seed=1)]
    if side is not None:
        prompts += [case.prompt(2, 4, 9, seed=2), case.prompt(0, 4, 30, seed=3)]
    inputs = case.batch(prompts, side or "left")
    this = policy("reroute", STAGES)
    run = check(case.model, inputs, this, runs)
    key, length = run.prefill.key, inputs["input_ids"].shape[1]
    assert (key.batch, key.padded, key.length) == (len(prompts), side is not None, in_buckets(length))
    # The layers of a stage run what is not skipped, with the rows that fill the buckets up.
    lengths, tokens = [key.length] * STAGES[0].layer, [in_buckets(len(prompt)) for prompt in prompts]
    for begin, end, counts in zip(this.stage_layers, (3, 5, len(run.lengths)), rows_kept(this, key), strict=True):
        rows = [of - pool + count for of, pool, count in zip(tokens, key.pool, counts, strict=True)]
        lengths += [max(rows)] * (end - begin)
    assert run.lengths == lengths
    assert lengths[-1] < key.length


def in_buckets(length):
    return -(-length // 64) * 64


def rows_kept(this, key):
    """How many tokens each stage selects of each sample."""
    counts = [this.selected_counts(visual, pool) for visual, pool in zip(key.visual, key.pool, strict=True)]
    return list(zip(*counts, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_replays_on_a_gpu(device, name, dtype):
    """A replay equals the same code without a graph, whatever ran between; selections are those of the hooks."""
    case = load(name)
    model = copy.deepcopy(case.model).to(device, dtype)
    if "moe" in decoder_of(model).config.model_type:
        decoder_of(model).config._experts_implementation = "batched_mm"
    prompts = [case.prompt(1, 6, after, seed=seed) for seed, after in ((1, 15), (2, 12), (3, 9))]
    inputs = [{name: each.to(device) for name, each in case.batch([prompt]).items()} for prompt in prompts]
    for each in inputs:
        each |= {name: each[name].to(dtype) for name in each if each[name].is_floating_point()}
    this = policy("reroute", STAGES)
    with rk.apply(model, this) as routing:
        expected = [(model(**each, use_cache=True), routing.trace) for each in inputs]
    with rk.apply(model, this, cuda_graph="require") as routing:
        routing.capture(lengths=[64, 128, 192], visual=[expected[0][1].visual_counts[0]])
        found = [(model(**each, use_cache=True), routing.trace) for each in inputs]
        again = [model(**each, use_cache=True) for each in inputs]
        tokens = model.generate(**inputs[0], **GREEDY)
        assert routing.graphs.bytes > 0
        for (output, trace), repeated, (wanted, wanted_trace) in zip(found, again, expected, strict=True):
            assert torch.equal(output.logits, repeated.logits)
            assert cached_lengths(output.past_key_values) == cached_lengths(wanted.past_key_values)
            if dtype == torch.float32:
                assert selections(trace) == selections(wanted_trace)
                torch.testing.assert_close(output.logits, wanted.logits, atol=1e-3, rtol=1e-3)
        held = list(routing.graphs._held.values())
        for one in held:
            one.runner.replay()
            replayed = [tensor.clone() for tensor in one.prefill.result.tensors]
            one.prefill.run()
            torch.testing.assert_close(one.prefill.result.tensors, replayed)
    if dtype == torch.float32:
        with rk.apply(model, this):
            assert torch.equal(model.generate(**inputs[0], **GREEDY), tokens)


# Prompts


@pytest.mark.parametrize("difference", [-1, 0, 1])
@pytest.mark.parametrize("action", ACTIONS)
def test_edges_of_buckets(model, prompt, runs, action, difference):
    one = prompt(1, 5, 60, seed=1)
    after = 60 + 256 + difference - len(one) if len(one) > 128 else 60 + 128 + difference - len(one)
    one = prompt(1, 5, after, seed=1)
    run = check(model, batch([one]), policy(action), runs)
    assert run.prefill.key.length == in_buckets(len(one))
    assert (len(one) - difference) % 64 == 0


@pytest.mark.parametrize("multiple", [1, 10, 1000])
def test_other_buckets(model, inputs, runs, multiple):
    run = check(model, inputs, policy(), runs, multiple=multiple)
    assert run.prefill.key.length == -(-inputs["input_ids"].shape[1] // multiple) * multiple


@pytest.mark.parametrize(
    "ranking",
    [
        LastQuery(queries=3, head_reduction="max"),
        LastQuery("previous"),
        AllText(query_reduction="max"),
        AllText(),
        AllText("previous"),
        KeyNorm(),
        KeyNorm("previous"),
        Random(seed=3),
        Uniform(),
        Mixed(AllText(rotary=False), uniform=0.3),
        Remembered(AllText(), decay=0.7),
    ],
    ids=str,
)
@pytest.mark.parametrize("action", ACTIONS)
def test_every_ranking(model, prompt, runs, ranking, action):
    inputs = batch([prompt(1, 4, 9, seed=1), prompt(2, 7, 20, seed=2), prompt(0, 4, 30, seed=3)])
    check(model, inputs, rk.Policy(SCHEDULE, action, ranking), runs)


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("layers", [(0, 1, 2), (0, 4), (11,), (3, 4, 5, 6, 7)], ids=str)
def test_layers_of_decisions(model, inputs, runs, layers, action):
    stages = [rk.Stage(layer, 0.5 - 0.05 * number) for number, layer in enumerate(layers)]
    check(model, inputs, rk.Policy(stages, action), runs)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.filterwarnings("ignore:.*right-padding.*")
def test_contiguous_positions(model, prompt, runs, side):
    inputs = batch([prompt(1, 4, 9, seed=1), prompt(2, 7, 20, seed=2)], side)
    check(model, inputs, rk.Policy(SCHEDULE, positions="contiguous"), runs)


@pytest.mark.parametrize("schedule", [SCHEDULE, ()], ids=["and-decisions", "alone"])
@pytest.mark.parametrize("action", ACTIONS)
def test_reducers(model, prompt, runs, action, schedule):
    """The tokens that a reducer left are the pool."""
    this = rk.Policy(schedule, action, reducer=Nuwa(keep=0.5, per_cell=2))
    inputs = batch([prompt(1, 4, 9, seed=1)])
    run = check(model, inputs, this, runs)
    assert run.prefill.key.pool < run.prefill.key.visual


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("side", [None, "left", "right"], ids=str)
@pytest.mark.filterwarnings("ignore:.*right-padding.*")
def test_attention_implementations(model, prompt, runs, attention, side):
    model.set_attn_implementation(attention)
    prompts = [prompt(1, 4, 9, seed=1), prompt(2, 7, 20, seed=2)]
    inputs = batch(prompts[:1]) if side is None else batch(prompts, side)
    check(model, inputs, policy(), runs)


@pytest.mark.parametrize("name", ["qwen3_vl", "qwen2_vl", "llava_onevision"])
def test_videos(name, runs):
    case = load(name)
    check(case.model, case.batch([case.prompt(0, 6, 15, seed=1, video=True)]), policy("reroute", STAGES), runs)


@pytest.mark.parametrize("layers", [(0, 2), (2, 4), (4, 5)], ids=str)
@pytest.mark.parametrize("action", ACTIONS)
def test_features_that_are_added_between_layers(runs, layers, action):
    """By the routing before the last of them, by the decoder itself if the first decision stands behind."""
    case = load("qwen3_vl")
    stages = tuple(rk.Stage(layer, keep) for layer, keep in zip(layers, (0.4, 0.3), strict=True))
    run = check(case.model, case.batch([case.prompt(1, 6, 15, seed=1)]), policy(action, stages), runs)
    assert run.prefill.key.features == 3


def test_prompt_that_ends_in_an_image(model, prompt, runs):
    one = prompt(1, 9, 0, seed=7)
    one.ids = one.ids[: int((one.ids == IMAGE).nonzero()[-1]) + 1]
    run = check(model, batch([one]), policy(), runs)
    assert run.prefill.key.pool[0] == run.prefill.key.visual[0] - 1


@torch.no_grad()
def test_sample_without_a_token(model, prompt, runs, family):
    if family == "qwen2_5_vl":
        pytest.skip("its model numbers no tokens in an empty row")
    inputs = batch([prompt(1, 4, 9, seed=1), prompt(1, 4, 9, seed=2)])
    inputs["attention_mask"][1] = 0
    with rk.apply(model, policy()) as routing:
        expected, selected = model(**inputs).logits[0], selections(routing.trace)
    with rk.apply(model, policy(), cuda_graph="require") as routing:
        assert_near(model(**inputs).logits[0], expected)
        assert selections(routing.trace) == selected
    assert len(runs) == 1


@torch.no_grad()
def test_a_graph_follows_its_data(model, prompt, runs):
    """Prompts of one key, longer and shorter ones; what was handed out before stays as it was."""
    prompts = [batch([prompt(1, before, 9, seed=seed)]) for seed, before in ((1, 5), (2, 12), (3, 1))]
    with rk.apply(model, policy()) as routing:
        expected = [(model(**each, use_cache=True), routing.trace) for each in prompts]
    with rk.apply(model, policy(), cuda_graph="require") as routing:
        found = [(model(**each, use_cache=True), routing.trace) for each in prompts]
        assert len(routing.graphs) == 1
    assert len({run.prefill for run in runs}) == 1
    for inputs, (ours, our_trace), (theirs, their_trace) in zip(prompts, found, expected, strict=True):
        assert_near(ours.logits, theirs.logits)
        assert_same_trace(our_trace, their_trace)
        kept = [stage._kept for stage in their_trace.stages]
        valid = inputs["attention_mask"].bool()
        assert_same_cache(ours.past_key_values, theirs.past_key_values, valid, kept, policy().stage_layers)


@pytest.mark.parametrize("settings", [{"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}], ids=str)
def test_generate_in_other_ways(model, inputs, runs, settings):
    settings = {**GREEDY, **settings}
    with rk.apply(model, policy()):
        torch.manual_seed(0)
        expected = model.generate(**inputs, **settings)
    with rk.apply(model, policy(), cuda_graph="require"):
        torch.manual_seed(0)
        assert torch.equal(model.generate(**inputs, **settings), expected)
    assert runs


@torch.no_grad()
def test_without_a_cache(model, inputs, runs):
    with rk.apply(model, policy(), cuda_graph="require"):
        output = model(**inputs, use_cache=False)
        assert output.past_key_values is None
        assert_near(output.logits, model(**inputs, use_cache=True).logits)
    assert len(runs) == 2


@torch.no_grad()
def test_text_runs_as_ever(model, prompt, runs):
    text = batch([prompt(0, 4, 30, seed=3)])
    expected = model(**text).logits
    with rk.apply(model, policy(), cuda_graph="require"):
        assert torch.equal(model(**text).logits, expected)
    assert not runs


def test_inference_mode(model, inputs, runs):
    """Buffers that one mode made serve in the other."""
    with rk.apply(model, policy(), cuda_graph="require"):
        with torch.inference_mode():
            first = model(**inputs, use_cache=True)
            model(input_ids=torch.tensor([[7]]), past_key_values=first.past_key_values)
        with torch.no_grad():
            second = model(**inputs, use_cache=True)
        with torch.inference_mode():
            assert torch.equal(model(**inputs).logits, first.logits)
        assert torch.equal(second.logits, first.logits)
    assert len(runs) == 3
