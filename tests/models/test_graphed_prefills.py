"""Prefills of the static code that CUDA graphs hold, on a CPU: what they compute, and which calls they serve."""

import copy

import pytest
import torch

import reroute_kernels as rk
from reroute_kernels.models import CudaGraphs
from tests.models import static_prefills
from tests.models.conftest import hooks
from tests.models.families import MODELS, load
from tests.models.prompts import cached_lengths, policy
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
def family(request):
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


@pytest.mark.parametrize("family", FAMILIES, indirect=True)
@pytest.mark.parametrize("side", [None, "left", "right"], ids=str)
@pytest.mark.filterwarnings("ignore:.*right-padding.*")
def test_every_family(family, runs, side):
    prompts = [family.prompt(1, 6, 15, seed=1)]
    if side is not None:
        prompts += [family.prompt(2, 4, 9, seed=2), family.prompt(0, 4, 30, seed=3)]
    inputs = family.batch(prompts, side or "left")
    this = policy("reroute", STAGES)
    run = check(family.model, inputs, this, runs)
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
