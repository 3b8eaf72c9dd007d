"""Tensors that belong to the model or the caller are unchanged after a routed call: hooks may hold them."""

import pytest
import torch

import reroute_kernels as rk
from tests.models.families import load
from tests.models.prompts import ACTIONS

NUWA = {
    "llava": rk.reducers.Nuwa(keep=0.5, per_cell=2),
    "qwen2_5_vl": rk.reducers.Nuwa(keep=0.6, per_cell=3, distance=0.8, quantile=0.1, keeps_own=False),
}


def tensors_in(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from tensors_in(each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from tensors_in(each)


class Held:
    """Holds every tensor that a module is handed or returns, with a copy of its values."""

    def __init__(self, model):
        self.tensors = []
        self.handles = []
        for name, module in model.named_modules():
            for kind, register in (
                ("handed to", module.register_forward_pre_hook),
                ("returned by", module.register_forward_hook),
            ):
                hook = self.hook(f"{kind} {name}")
                self.handles.append(register(hook, with_kwargs=True))

    def hook(self, where):
        def hold(module, args, kwargs, output=None):
            given = (args, kwargs) if where.startswith("handed") else output
            for number, tensor in enumerate(tensors_in(given)):
                self.tensors.append((f"{where}, {number}", tensor, tensor.clone()))

        return hold

    def changed(self):
        """Places at which tensors were handed over or returned that were written to since."""
        for handle in self.handles:
            handle.remove()
        return {where for where, tensor, copy in self.tensors if not torch.equal(tensor, copy)}


@torch.no_grad()
def changed_by(case, inputs):
    """Tensors changed by a prompt and two steps on its cache, the caller's own included."""
    held = Held(case.model)
    copies = {name: value.clone() for name, value in inputs.items()}
    case.model.generate(**inputs, max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0)
    changed = held.changed()
    assert held.tensors
    return changed | {name for name, value in inputs.items() if not torch.equal(value, copies[name])}


@pytest.mark.parametrize("choice", ["", "contiguous", "reducer", "previous"])
@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_vl", "qwen3_5"])
def test_nothing_is_written_to(name, action, choice):
    case = load(name)
    inputs = case.batch([case.prompt(1, 6, 15, seed=1), case.prompt(1, 3, 9, seed=2)])
    if (choice == "reducer" and name not in NUWA) or (choice in ("contiguous", "previous") and name == "qwen3_5"):
        pytest.skip("not offered by this family")
    options = {
        "": {},
        "contiguous": {"positions": "contiguous"},
        "reducer": {"reducer": NUWA.get(name)},
        "previous": {"ranking": rk.rankings.LastQuery("previous")},
    }[choice]
    schedule = (rk.Stage(1, 0.5), rk.Stage(3, 0.25)) if name == "qwen3_5" else (rk.Stage(2, 0.5), rk.Stage(4, 0.25))
    unrouted = changed_by(case, inputs)
    with rk.apply(case.model, rk.Policy(schedule, action, **options)) as routing:
        routed = changed_by(case, inputs)
        assert routing.trace is not None
    assert routed <= unrouted


@pytest.mark.parametrize("action", ACTIONS)
def test_what_a_ranking_is_handed_is_not_written_to(action):
    held = []

    class Holding(rk.rankings.Ranking):
        def rank(self, candidates):
            held.append((candidates.hidden, candidates.hidden.clone()))
            return candidates.hidden.float().norm(dim=-1)

        def flops(self, decoder, tokens, text_tokens):
            return 0

    case = load("llava")
    schedule = (rk.Stage(1, 0.5), rk.Stage(2, 0.4), rk.Stage(4, 0.25))
    with rk.apply(case.model, rk.Policy(schedule, action, ranking=Holding())):
        changed_by(case, case.batch([case.prompt(1, 6, 15, seed=1), case.prompt(1, 3, 9, seed=2)]))
    assert len(held) == 3
    assert all(torch.equal(hidden, copy) for hidden, copy in held)
