"""Removed tokens whose means stay, as in SparseVLM: tiny models against the slow way, in every way of calling."""

from dataclasses import replace

import pytest
import torch

import reroute_kernels as rk
from reroute_kernels.rankings import LastQuery, Mixed, Remembered, TextRaters
from reroute_kernels.recycling import recycle
from tests.models.families import load
from tests.models.prompts import selections
from tests.models.test_align import check, check_later_turn, check_padded_batch

SCHEDULE = (rk.Stage(1, 0.6), rk.Stage(3, 0.4), rk.Stage(4, 0.2))
RANKINGS = [TextRaters(), LastQuery(), LastQuery("previous"), Mixed(LastQuery(), 0.5), Remembered(LastQuery())]


def recycling(**others):
    return rk.Policy(**{"schedule": SCHEDULE, "action": "remove", "recycle": 0.3, **others})


@pytest.fixture(params=["llava", "qwen2_5_vl", "qwen3_vl"])
def family(request):
    return load(request.param)


@pytest.fixture
def inputs(family):
    return family.batch([family.prompt(2, 8, 15, seed=1)])


@pytest.mark.parametrize("ranking", RANKINGS, ids=repr)
def test_equals_the_slow_way(family, inputs, ranking):
    policy = recycling(ranking=ranking)
    logits = check(family.model, inputs, policy)
    with rk.apply(family.model, replace(policy, recycle=0)), torch.no_grad():
        assert (family.model(**inputs).logits - logits).abs().max() > 1e-2


@pytest.mark.parametrize("recycle", [0.01, 1.0])
def test_little_or_all_is_recycled(family, inputs, recycle):
    check(family.model, inputs, recycling(recycle=recycle, positions="contiguous"))


def test_a_stage_of_one_token_and_one_of_all(family, inputs):
    policy = recycling(schedule=[rk.Stage(1, 1.0), rk.Stage(2, 0.5), rk.Stage(4, 0.001)])
    candidates = int((inputs["input_ids"] == family.model.config.image_token_id).sum())
    first, second, third = policy.recycled_counts(policy.selected_counts(candidates), candidates)
    assert first == third == (0, 0)
    assert min(second) > 0
    check(family.model, inputs, policy)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_equals_its_samples(family, side):
    prompts = [family.prompt(1, 6, 15, seed=1), family.prompt(2, 8, 9, seed=2), family.prompt(0, 4, 30, seed=3)]
    check_padded_batch(family, recycling(ranking=TextRaters()), side, prompts)


def test_a_later_turn_and_another_policy(family, inputs):
    check_later_turn(family, inputs, recycling(), recycling(recycle=0.2), r"filled under .*recycle=0.3")


def test_gradients_reach_the_tokens_that_were_merged(family, inputs):
    seen = {}

    def keep(module, args, output):
        seen["states"] = output[0] if isinstance(output, tuple) else output
        seen["states"].retain_grad()

    decoder = getattr(family.model.model, "language_model", family.model.model)
    policy = recycling(schedule=[rk.Stage(2, 0.3)])
    handle = decoder.layers[1].register_forward_hook(keep)
    try:
        with rk.apply(family.model, policy) as routing:
            family.model(**inputs).logits[:, -1].sum().backward()
            (chosen,) = selections(routing.trace)
    finally:
        handle.remove()
        family.model.zero_grad()
    reached = seen["states"].grad[0].abs().sum(dim=-1) > 0
    visual = inputs["input_ids"][0] == family.model.config.image_token_id
    recycled, clusters = policy.recycled_counts([len(chosen)], int(visual.sum()))[0]
    assert int((reached & visual).sum()) == len(chosen) - clusters + recycled


def states_in(blobs):
    """(1, 12, 8), tokens around 2 or 3 places, in turns."""
    centres = 4 * torch.eye(8)[:blobs]
    return (centres[torch.arange(12) % blobs] + 0.1 * torch.randn(12, 8))[None]


def clusters(hidden, tokens, count):
    """Peaks and clusters of the first tokens of each row, as many as `tokens` says; scores fall from the first on."""
    batch, length, _ = hidden.shape
    scores = torch.arange(length, 0, -1, dtype=torch.float32).expand(batch, length).contiguous()
    removed = torch.ones(batch, length, dtype=torch.bool)
    counts = torch.tensor(tokens), torch.tensor([count] * batch)
    return recycle(hidden, scores, removed, *counts, max(tokens), count)


@pytest.mark.parametrize("scale", [0.1, 1.0])
@pytest.mark.parametrize("blobs", [2, 3])
def test_each_group_of_similar_tokens_is_a_cluster(blobs, scale):
    led, groups = clusters(scale * states_in(blobs), [12], blobs)
    assert led.sum() == blobs
    assert [len(set(groups[0, start::blobs].tolist())) for start in range(blobs)] == [1] * blobs
    assert len(set(groups[0].tolist())) == blobs


def test_clusters_do_not_depend_on_the_batch():
    """Also where all tokens are large in one channel, which a matrix product of 30 rows would round away."""
    hidden = torch.randn(2, 40, 64)
    hidden[..., 3] += 3000.0
    led, groups = clusters(hidden, [20, 40], 3)
    for row, tokens in enumerate((20, 40)):
        alone = clusters(hidden[row : row + 1], [tokens], 3)
        assert torch.equal(alone[0][0], led[row])
        assert torch.equal(alone[1][0], groups[row])
