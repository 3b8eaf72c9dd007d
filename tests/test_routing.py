"""One routed forward on plain tensors: the tokens that run, the rows written back, and the memory written to."""

import pytest
import torch

import reroute_kernels as rk
from reroute_kernels.prompt import Prompt
from reroute_kernels.rankings import Mixed, Remembered
from reroute_kernels.routing import RoutedForward

VISUAL = torch.tensor([[False, True, True, True, True, True, True, True, True, False, False]])
STAGES = (rk.Stage(2, 0.5), rk.Stage(4, 0.25))


class Positions:
    """Scores that change from decision to decision: late tokens first, then early ones."""

    layer = "this"

    def rank(self, candidates):
        length = candidates.pool.shape[1]
        sign = -1.0 if candidates.decision % 2 else 1.0
        return sign * torch.arange(length, dtype=torch.float32).expand(len(candidates.pool), -1)


class EveryOther:
    """A reducer; only its marks count here."""

    def reduce(self, image):
        raise NotImplementedError


def forward(action, reduces=False, **options):
    reducer = EveryOther() if reduces else None
    policy = rk.Policy(STAGES, action, ranking=Positions(), reducer=reducer, **options)
    marks = None
    if reduces:
        dropped = VISUAL & (torch.arange(VISUAL.shape[1]) % 2 == 0)
        marks = (dropped, dropped)
    return RoutedForward(policy, Prompt(VISUAL, None, marks=marks))


def run(forward, stages, hidden, tables, change):
    """Hidden states through the stages; `change` stands for the layers of a stage."""
    seen = []
    for _ in range(stages):
        compact = forward.decide(hidden, tables, None)
        seen.append(compact)
        hidden = change(compact)
    return forward.finish(hidden), seen


@pytest.mark.parametrize("in_place", [False, True], ids=["new", "in-place"])
@pytest.mark.parametrize("reduces", [False, True], ids=["", "reducer"])
@pytest.mark.parametrize("action", ["reroute", "remove"])
def test_tensors_of_the_model_are_not_written_to(action, reduces, in_place):
    """Hooks may hold the hidden states at a decision, and the output of a layer."""
    routed = forward(action, reduces)
    hidden, table = torch.randn(1, 11, 4), torch.randn(1, 11, 2)
    held, copies = [], []

    def change(compact):
        output = compact.add_(1) if in_place else compact + 1
        held.append(output)
        copies.append(output.clone())
        return output

    before = hidden.clone(), table.clone()
    full, _ = run(routed, len(STAGES) + reduces, hidden, (table,), change)
    assert torch.equal(hidden, before[0])
    assert torch.equal(table, before[1])
    assert full.data_ptr() != hidden.data_ptr()
    for output, copy in zip(held, copies, strict=True):
        assert torch.equal(output, copy)


@pytest.mark.parametrize("reduces", [False, True], ids=["", "reducer"])
@pytest.mark.parametrize("action", ["reroute", "remove"])
def test_rows_hold_what_their_stages_made(action, reduces):
    """Each token's row counts the stages that it ran in."""
    routed = forward(action, reduces)
    hidden, table = torch.zeros(1, 11, 4), torch.arange(11.0)[None, :, None].expand(1, 11, 2)
    full, seen = run(routed, len(STAGES) + reduces, hidden, (table,), lambda compact: compact + 1)
    expected = torch.zeros(11)
    for kept in routed.kept:
        expected[kept[0]] += 1
    assert torch.equal(full, expected[None, :, None].expand(1, 11, 4))
    for compact, kept in zip(seen, routed.kept, strict=True):
        assert compact.shape[1] == kept.shape[1]
    # Late tokens first, then early ones; tokens dropped by a reducer or `remove` do not come back.
    alive = [place for place in range(1, 9) if not reduces or place % 2]
    first = alive[-4:]
    second = (first if action == "remove" else alive)[:2]
    for kept, visual in zip(routed.kept[reduces:], (first, second), strict=True):
        assert [place for place in kept[0].tolist() if VISUAL[0, place]] == visual


@pytest.mark.parametrize("reduces", [False, True], ids=["", "reducer"])
@pytest.mark.parametrize("action", ["reroute", "remove"])
def test_what_is_added_reaches_tokens_that_wait(action, reduces):
    routed = forward(action, reduces)
    hidden, addition = torch.zeros(1, 11, 4), torch.arange(11.0)[None, :, None].expand(1, 11, 4)
    held = hidden.clone()
    compact = routed.decide(hidden, (), None)
    compact = routed.add(compact, addition)
    for _ in range(len(STAGES) + reduces - 1):
        compact = routed.decide(compact, (), None)
        compact = routed.add(compact, addition)
    full = routed.finish(compact)
    times = 2 + reduces
    assert torch.equal(full[:, [0, 9, 10]], times * addition[:, [0, 9, 10]])
    if action == "reroute" and not reduces:
        assert torch.equal(full, times * addition)
    assert torch.equal(hidden, held)


@pytest.mark.parametrize("reduces", [False, True], ids=["", "reducer"])
def test_tokens_that_wait_follow_those_that_ran(reduces):
    """By the mean change of the visual tokens alone, when the next decision begins, and not after the last stage."""
    routed = forward("reroute", reduces, align="stage")
    hidden, steps = torch.zeros(1, 11, 1), torch.tensor([1.0, 100.0, 10_000.0])
    held = hidden.clone()
    if reduces:
        hidden = routed.decide(hidden, (), None) + steps[2]
    expected = torch.zeros(11)
    for stage, step in enumerate(steps[:2].tolist()):
        compact = routed.decide(hidden, (), None)
        kept = routed.kept[-1][0]
        is_visual = VISUAL[0, kept]
        change = step * (torch.arange(len(kept)) + 1) * torch.where(is_visual, 1.0, 50.0)
        waiting = VISUAL[0].clone()
        waiting[kept] = False
        if reduces:
            waiting &= torch.arange(11) % 2 == 1
        if stage == 0:
            expected[waiting] += change[is_visual].mean()
        expected[kept] += change
        hidden = compact + change[None, :, None]
    if reduces:
        expected[routed.kept[0][0]] += steps[2]
    assert torch.equal(routed.finish(hidden)[0, :, 0], expected)
    assert torch.equal(held, torch.zeros(1, 11, 1))


# Scores that are remembered

RAGGED = torch.tensor(
    [[False, *[True] * 8, False, False], [False, False, *[True] * 4, False, True, True, False, False]]
)
DECISIONS = (rk.Stage(1, 0.7), rk.Stage(2, 0.5), rk.Stage(4, 0.3))


class Drawn:
    """Scores that were drawn before for every place; the hidden states tell where a token stands."""

    nonnegative = True

    def __init__(self):
        self.scores = torch.rand(len(DECISIONS), 2, 11, generator=torch.Generator().manual_seed(1))

    def rank(self, candidates):
        places = candidates.hidden[:, :, 0].long()
        return self.scores[candidates.decision].gather(1, places)


def remembering(action, reduces, pad_left, ranking):
    policy = rk.Policy(DECISIONS, action, ranking=ranking, reducer=EveryOther() if reduces else None)
    dropped = RAGGED & (torch.arange(11) % 4 == 0)
    return RoutedForward(policy, Prompt(RAGGED, None, marks=(dropped, dropped) if reduces else None), pad_left)


def decisions_of(routed, count):
    """Of each decision and sample the selected visual places, and the scores by place."""
    hidden = torch.arange(11.0)[None, :, None].expand(2, 11, 4)
    found = []
    for _ in range(count):
        hidden = routed.decide(hidden, (), None)
        scored = routed.scored[-1]
        selected = [
            [place for place in row if place >= 0 and RAGGED[n, place]]
            for n, row in enumerate(routed.kept[-1].tolist())
        ]
        scores = None if scored is None else scored.of_visual(RAGGED)
        found.append((selected, scores))
    return found


def remembered_by_hand(action, reduces, drawn, uniform, decays):
    for sample in range(2):
        pool = [place for place in range(11) if RAGGED[sample, place] and not (reduces and place % 4 == 0)]
        total, memory, stages = int(RAGGED[sample].sum()), {}, []
        for number, (stage, decay) in enumerate(zip(DECISIONS, decays, strict=True)):
            scores = {place: float(drawn[number, sample, place]) for place in pool}
            if decay is not None:
                whole = sum(scores.values())
                scores = {place: score / whole + decay * memory.get(place, 0) for place, score in scores.items()}
                memory = memory | scores
            count = min(len(pool), max(1, int(total * stage.keep)))
            even = int(uniform * count)
            sure = {pool[-(-k * len(pool) // even) - 1] for k in range(1, even + 1)}
            chosen = sorted(sorted(pool, key=lambda place: (place not in sure, -scores[place], place))[:count])
            stages.append((chosen, scores))
            pool = chosen if action == "remove" else pool
        yield stages


ALWAYS, NOT_BETWEEN = (0.6, 0.6, 0.6), (0.6, None, 0.9)


@pytest.mark.parametrize(
    ("backend", "pad_left", "decays"),
    [("ref", False, ALWAYS), ("ref", True, ALWAYS), ("ref", True, NOT_BETWEEN), ("triton", True, NOT_BETWEEN)],
    ids=["right", "left", "another-ranking-between", "triton"],
)
@pytest.mark.parametrize("reduces", [False, True], ids=["", "reducer"])
@pytest.mark.parametrize("action", ["reroute", "remove"])
def test_scores_are_remembered_by_place(monkeypatch, backend, action, reduces, pad_left, decays):
    drawn = Drawn()
    rankings = [Mixed(drawn if decay is None else Remembered(drawn, decay), uniform=0.3) for decay in decays]
    monkeypatch.setattr(RoutedForward, "_ranking", lambda forward, stage: rankings[max(stage - reduces, 0)])
    with rk.backend(backend):
        found = decisions_of(remembering(action, reduces, pad_left, rankings[0]), len(DECISIONS) + reduces)[reduces:]
    for sample, expected in enumerate(remembered_by_hand(action, reduces, drawn.scores, 0.3, decays)):
        for (selected, scores), (chosen, by_place) in zip(found, expected, strict=True):
            assert selected[sample] == chosen
            visual = RAGGED[sample].nonzero().flatten().tolist()
            wanted = torch.tensor([by_place.get(place, torch.nan) for place in visual])
            torch.testing.assert_close(scores[sample], wanted, atol=1e-6, rtol=1e-5, equal_nan=True)


def test_two_forwards_of_one_policy_remember_for_themselves():
    """Decisions by turns, with one ranking object, as in two threads."""
    ranking = Remembered(Drawn(), decay=1)
    alone = decisions_of(remembering("remove", False, False, ranking), 3)
    hidden = torch.arange(11.0)[None, :, None].expand(2, 11, 4)
    routed = [remembering("remove", False, False, ranking) for _ in range(2)]
    states = [hidden, hidden]
    for number in range(3):
        states = [each.decide(state, (), None) for each, state in zip(routed, states, strict=True)]
        for each in routed:
            scores = each.scored[-1].of_visual(RAGGED)
            assert all(
                torch.equal(one.nan_to_num(-1), other.nan_to_num(-1))
                for one, other in zip(scores, alone[number][1], strict=True)
            )
