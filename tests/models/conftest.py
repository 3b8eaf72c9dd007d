import contextlib

import pytest
import torch

import reroute_kernels as rk
from tests.models.prompts import GOLDEN, PROMPTS, batch
from tests.models.slow_way import decoder_of

transformers = pytest.importorskip("transformers")


@pytest.fixture(autouse=True, scope="session")
def _untimed_guards():
    """Leave out the timing of guards: to log it, the compiler empties the processor's caches after each frame."""
    from torch._dynamo import guards

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(guards, "profile_guard_manager", lambda *_: 0.0, raising=False)
        yield


@pytest.fixture(scope="session", params=["llava", "qwen2_5_vl"])
def family(request):
    return request.param


@pytest.fixture(scope="session")
def _loaded(family):
    return transformers.AutoModelForImageTextToText.from_pretrained(GOLDEN / family, dtype=torch.float32).eval()


@pytest.fixture
def model(_loaded):
    """The golden checkpoint of a family: 12 layers, sdpa, and no hook left by another test."""
    assert not hooks(_loaded)
    _loaded.set_attn_implementation("sdpa")
    yield _loaded
    routing, left = rk.routing_of(_loaded), hooks(_loaded)
    drop_hooks(_loaded)  # so that this test alone fails
    assert routing is None, "a test left its routing on the shared model"
    assert not left, "a test left a hook on the shared model"


@pytest.fixture
def prompt(family):
    """Makes a prompt: (images, text tokens before, text tokens after, seed)."""
    return PROMPTS[family]


@pytest.fixture
def inputs(prompt):
    """A prompt with an image."""
    return batch([prompt(1, 5, 12, seed=1)])


@pytest.fixture
def others(prompt):
    """Another, with two."""
    return batch([prompt(2, 3, 8, seed=2)])


@pytest.fixture
def transfers(monkeypatch):
    """The calls that bring values of tensors to the host, as far as Python makes them."""
    made = []
    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__"):
        original = getattr(torch.Tensor, name)

        def counted(self, *args, original=original, name=name, **kwargs):
            made.append(name)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, counted)
    return made


def hooks(model) -> list:
    """Every forward hook on the model that is not transformers' own."""
    return [table[number] for table, number in _hooks(model)]


def drop_hooks(model) -> None:
    """Remove the routing of a model, and every other hook that is not transformers' own."""
    rk.remove(model)
    for table, number in list(_hooks(model)):
        del table[number]


def _hooks(model):
    for module in model.modules():
        for table in (module._forward_pre_hooks, module._forward_hooks):
            for number, hook in table.items():
                if "transformers" not in getattr(hook, "__module__", ""):
                    yield table, number


@contextlib.contextmanager
def no_layer_runs(model):
    """Asserts that a call is refused before the first decoder layer runs."""
    ran = []
    handle = decoder_of(model).layers[0].register_forward_pre_hook(lambda *_: ran.append(True))
    try:
        yield
    finally:
        handle.remove()
    assert not ran
