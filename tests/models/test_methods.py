"""Every published method by its name, under both actions, on models as deep as those that it was published for."""

import re
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

import reroute_kernels as rk
from reroute_kernels.presets import METHODS, MODELS, ORIGINALS, tiers
from tests.models.prompts import ACTIONS, GOLDEN, IMAGE, PROMPTS, batch, selections
from tests.models.test_rankings import check as check_rankings
from tests.models.test_reducers import check as check_reducer

GUIDE = Path(__file__).parents[2] / "docs" / "methods.md"
FOLDERS = {"llava-1.5-7b": "llava", "qwen2.5-vl-7b": "qwen2_5_vl"}
NAMES = [method for method in METHODS + ORIGINALS if not method.endswith("stagewise")]


@cache
def deep_model(name):
    """The golden model of a family with as many layers as the published one."""
    config = AutoConfig.from_pretrained(GOLDEN / FOLDERS[name])
    text = config.text_config.to_dict() | {"num_hidden_layers": MODELS[name].decoder.layers, "layer_types": None}
    config.text_config = type(config.text_config)(**text)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config).eval()
    assert len(model.model.language_model.layers) == MODELS[name].decoder.layers
    return model


@pytest.mark.everyday(10)
@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("method", NAMES)
@pytest.mark.parametrize("name", FOLDERS)
def test_generation(name, method, action):
    # With the first seed two tokens have the same score under SparseVLM, up to rounding.
    inputs = batch([PROMPTS[FOLDERS[name]](2, 6, 14, seed=12 if "sparsevlm" in method else 11)])
    policy = rk.preset(name, method, tiers(name, method)[0])
    policy = replace(policy, action=action, recycle=policy.recycle if action == "remove" else 0)
    check = check_reducer if policy.reducer is not None else check_rankings
    trace = check(deep_model(name), inputs, policy)
    assert [stage.layer for stage in trace.stages] == [stage.layer for stage in policy.schedule]
    if len(trace.stages) > 1 and action == "reroute":
        first, *later = (set(stage.selected[0].tolist()) for stage in trace.stages)
        assert any(selected - first for selected in later), "no token was picked back"


# The guide's examples


def example(name, most_lines):
    """Names that the code of an example defines; checks its length."""
    (code,) = re.findall(rf"<!-- example: {name} -->\n```python\n(.*?)```", GUIDE.read_text(), flags=re.DOTALL)
    body = code[code.index("@dataclass") : code.index("policy =")]
    assert len([line for line in body.splitlines() if line.strip()]) <= most_lines
    defined = {}
    exec(code, defined)
    return defined


@pytest.mark.parametrize("action", ACTIONS)
def test_ranking_of_the_guide(model, inputs, action):
    defined = example("ranking", most_lines=10)
    ranking = defined["policy"].ranking
    assert isinstance(ranking, defined["Loud"])
    states = []
    with rk.apply(model, rk.Policy([rk.Stage(2, 0.4)], action, ranking)) as routing, torch.no_grad():
        handle = model.model.language_model.layers[1].register_forward_hook(lambda *given: states.append(given[2]))
        model(**inputs)
        handle.remove()
    visual = (inputs["input_ids"][0] == IMAGE).nonzero().flatten().tolist()
    loudness = states[0][0].norm(dim=-1)
    loudest = sorted(visual, key=lambda place: -loudness[place])[: int(len(visual) * 0.4)]
    assert selections(routing.trace) == [sorted(loudest)]
    with pytest.raises(TypeError, match="ranking must have a method 'flops' to be costed"):
        rk.cost(model, defined["policy"], 10, 100)


@pytest.mark.parametrize("action", ACTIONS)
@torch.no_grad()
def test_reducer_of_the_guide(model, inputs, family, action):
    defined = example("reducer", most_lines=29)
    reducer = defined["policy"].reducer
    assert isinstance(reducer, defined["Blocks"])
    seen = []

    class Watched:
        def reduce(self, image):
            made = reducer.reduce(image)
            seen.append((image, *made))
            return made

    schedule = (rk.Stage(3, 0.2), rk.Stage(6, 0.1))
    with rk.apply(model, rk.Policy(schedule, action, reducer=Watched())) as routing:
        model(**inputs)
    ((image, index, features),) = seen
    height, width = image.grid
    expected = {}
    for row, column in product(range(0, height - 1, 2), range(0, width - 1, 2)):
        block = [(row + down) * width + column + right for down, right in product((0, 1), repeat=2)]
        expected[max(block, key=lambda place: image.saliency[0, place])] = image.features[0, block].mean(dim=0)
    assert index.tolist() == [sorted(expected)]
    torch.testing.assert_close(features[0], torch.stack([expected[place] for place in sorted(expected)]))
    visual = (inputs["input_ids"][0] == IMAGE).nonzero().flatten()
    assert torch.equal(routing.trace.reduction.selected[0], visual[index[0]])
    assert all(set(stage) <= set(visual[index[0]].tolist()) for stage in selections(routing.trace))
    assert len(index[0]) == reducer.survivors(height * width)
    counted = rk.cost(model, rk.Policy(schedule, action, reducer=reducer), 10, height * width)
    assert counted.stages[0].visual_tokens == len(index[0])
