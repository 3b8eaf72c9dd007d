"""Tokens that each layer caches, from counts alone; no vLLM."""

import numpy as np
import pytest
import torch

import reroute_kernels as rk
from reroute_kernels.attention import Attention
from reroute_kernels.vllm.plan import Plan, Share, stage_layout
from reroute_kernels.vllm.step import RoutedStep

POLICY = rk.Policy([rk.Stage(2, 0.5), rk.Stage(5, 0.1)])


def test_stages():
    plan = Plan(POLICY, 8)
    assert plan.stages == [range(2, 5), range(5, 8)]
    assert [plan.stage_of(layer) for layer in range(8)] == [None, None, 0, 0, 0, 1, 1, 1]


def test_a_layer_that_there_is_not():
    with pytest.raises(ValueError, match=r"^schedule must stay below layer 5 of this model, got layer 5$"):
        Plan(POLICY, 5)


@pytest.mark.parametrize("action", ["reroute", "remove"])
@pytest.mark.parametrize(
    ("visual", "ends_visual", "selected"),
    [(0, False, (0, 0)), (1, False, (1, 1)), (21, False, (10, 2)), (2, True, (1, 1))],
)
def test_deferred(action, visual, ends_visual, selected):
    plan = Plan(rk.Policy(POLICY.schedule, action), 8)
    assert plan.deferred(visual, ends_visual) == tuple(visual - ends_visual - each for each in selected)


def test_layout():
    shares = [
        Share(0, 30, 30, (10, 18)),  # a prompt
        Share(0, 33, 30, (10, 18)),  # one that starts anew, with three tokens generated before
        Share(40, 1, 38, (5, 20)),  # a decode
        Share(40, 3, 38, (5, 20)),  # with guesses
        Share(0, 7, 7, (0, 0)),  # text
    ]
    layout = stage_layout(shares, 1)
    assert layout.query_lens.tolist() == [12, 15, 1, 3, 7]
    assert layout.seq_lens.tolist() == [12, 15, 21, 23, 7]
    assert layout.requests.tolist() == [0] * 12 + [1] * 15 + [2] + [3] * 3 + [4] * 7
    assert layout.rows.tolist() == [*range(12), *range(15), 20, 20, 21, 22, *range(7)]


def test_every_row_is_written_once():
    """A request that decodes token by token writes the rows that one which starts anew with all of them writes."""
    deferred, prompt, later = (10, 18), 30, 5
    written = [stage_layout([Share(0, prompt, prompt, deferred)], 0).rows]
    written += [stage_layout([Share(prompt + step, 1, prompt, deferred)], 0).rows for step in range(later)]
    anew = stage_layout([Share(0, prompt + later, prompt, deferred)], 0).rows
    assert np.array_equal(np.concatenate(written), anew)


@pytest.mark.parametrize("share", [Share(0, 20, 30, (10, 18)), Share(20, 10, 30, (10, 18)), Share(20, 5, 30, (10, 18))])
def test_a_part_of_a_prompt(share):
    with pytest.raises(RuntimeError, match="must be prefilled in one step, got"):
        stage_layout([share], 0)
    text = Share(share.computed, share.scheduled, share.prompt, (0, 0))
    assert stage_layout([text], 0).seq_lens.tolist() == [share.computed + share.scheduled]


class FirstChannel:
    """Attends to the first channel; positions come along."""

    def norm(self, hidden):
        return None

    def attention(self, hidden, rotary, key_mask, positions, states):
        length = hidden.shape[1]
        assert rotary[0].shape[:2] == (1, length)
        key = hidden[:, :, None, :4]
        query = torch.tensor([1.0, 0, 0, 0]).expand(1, 1, 1, 4)
        positions = torch.full((1, 1), length - 1) if positions is None else positions
        return Attention(query, key, key_mask=key_mask, query_index=positions, scale=1.0)


@pytest.mark.parametrize("action", ["reroute", "remove"])
def test_step(action):
    """Two prompts beside a decode and a text: what is selected, what comes back, and what is not touched."""
    plan = Plan(rk.Policy([rk.Stage(0, 0.5), rk.Stage(1, 0.25)], action), 2)
    shares = [
        Share(9, 1, 8, plan.deferred(4)),
        Share(0, 12, 12, plan.deferred(8)),
        Share(0, 5, 5, plan.deferred(0)),
        Share(0, 9, 7, plan.deferred(4)),  # starts anew, with two tokens generated before
    ]
    visual = [[(1, 4)], [(2, 5), (7, 10)], [], [(0, 3)]]
    hidden = torch.randn(27, 4)
    before, positions = hidden.clone(), torch.arange(27)
    step = RoutedStep(plan, shares, visual, hidden.device)
    assert step.decision_layers == (0, 1)

    ran, tables = step.decide(hidden, positions, FirstChannel(), None)
    layout = stage_layout(shares, 0)
    assert len(ran) == len(tables) == len(layout.rows) == 1 + 8 + 5 + 7
    assert torch.equal(ran, before[tables]), "a position came apart from its token"
    ran = ran + 100 * torch.ones(4)  # a layer
    first = tables
    ran, tables = step.decide(ran, tables, FirstChannel(), None)
    assert len(ran) == len(stage_layout(shares, 1).rows) == 1 + 6 + 5 + 6
    again = torch.isin(tables, first)
    assert torch.equal(ran, before[tables] + 100 * again[:, None])
    if action == "remove":
        assert again.all()
    full = step.finish(ran + 1000)
    expected = before.clone()
    expected[first] += 100
    expected[tables] += 1000
    assert torch.equal(full, expected)
    assert torch.equal(hidden, before), "what the model handed over was written to"
    traces = step.traces()
    assert sorted(traces) == [1, 3]
    for number, start in ((1, 1), (3, 18)):
        chosen = [stage.selected[0] + start for stage in traces[number].stages]
        text = torch.tensor([any(a <= place - start <= b for a, b in visual[number]) for place in range(27)])
        for selected, ids in zip(chosen, (first, tables), strict=True):
            mine = ids[(ids >= start) & (ids < start + shares[number].scheduled)]
            assert torch.equal(selected, mine[text[mine]])
