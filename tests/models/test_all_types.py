"""Every type of transformers' image-text-to-text models: routed, or refused for a reason that is true."""

import pytest
import torch

import reroute_kernels as rk
from tests.models.families import OTHERS, load
from tests.models.prompts import selections
from tests.models.slow_way import SlowWay
from tests.models.test_ways import GREEDY, policies

FEW = {**GREEDY, "max_new_tokens": 3}


@pytest.mark.parametrize("name", OTHERS)
@torch.no_grad()
def test_routed_type_equals_the_slow_way(name):
    """A batch of a prompt with an image and a longer one with two, through a prefill and a few greedy tokens."""
    case = load(name)
    prompts = [case.prompt(1, 6, 15, seed=1), case.prompt(2, 4, 9, seed=2)]
    inputs = case.batch(prompts)
    length = inputs["input_ids"].shape[1]
    plain = case.model(**inputs).logits[:, -1]
    this = policies(case)[0]
    with rk.apply(case.model, this) as routing:
        output = case.model.generate(**inputs, **FEW)
        trace = routing.trace
    for row, prompt in enumerate(prompts):
        with SlowWay(case.model, this) as slow:
            expected = case.model.generate(**case.batch([prompt]), **FEW)
        assert selections(trace, row, length - len(prompt)) == slow.selected
        assert output.sequences[row, length:].tolist() == expected.sequences[0, len(prompt) :].tolist()
        actual = torch.stack(output.logits)[:, row]
        torch.testing.assert_close(actual, torch.stack(expected.logits)[:, 0], atol=1e-4, rtol=0)
        assert (actual[0] - plain[row]).abs().max() > 1e-3  # something was deferred
