"""Models spread over devices, or offloaded to the CPU or to disk, by accelerate: routed as on one device."""

import copy

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

import reroute_kernels as rk
from reroute_kernels.models.adapter import cache_name
from reroute_kernels.rankings import LastQuery, Mixed, Remembered
from tests.models.prompts import ACTIONS, GOLDEN, PROMPTS, batch, policy, selections
from tests.models.test_families import make_case

accelerate = pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")
hooks = pytest.importorskip("accelerate.hooks")

DEEPSTACK = (rk.Stage(0, 0.4), rk.Stage(2, 0.3), rk.Stage(4, 0.2))


@torch.no_grad()
def run(model, inputs, this):
    """Logits of a routed prompt, its selections, and greedy tokens."""
    with rk.apply(model, this) as routing:
        logits = model(**inputs).logits
        selected = [selections(routing.trace, row) for row in range(len(logits))]
        tokens = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    return logits.cpu(), selected, tokens.cpu()


def expect_same(got, expected, tolerance=0.0):
    assert got[1] == expected[1]
    torch.testing.assert_close(got[0], expected[0], atol=tolerance, rtol=0)
    assert torch.equal(got[2], expected[2])


class Case:
    """A model in one piece, its checkpoint, a prompt, a policy, and the expected results."""

    def __init__(self, family, folder):
        if family in PROMPTS:
            self.folder, self.policy = GOLDEN / family, policy()
            self.model = transformers.AutoModelForImageTextToText.from_pretrained(self.folder, dtype=torch.float32)
            self.prompts = [PROMPTS[family](2, 5, 12, seed=1), PROMPTS[family](1, 4, 9, seed=2)]
            self.inputs = batch(self.prompts)
        else:
            self.prompts = None
            self.model, self.inputs = make_case(family)
            self.folder, self.policy = folder, policy("reroute", DEEPSTACK)
            self.model.save_pretrained(folder)
        self.model.eval()
        self.expected = run(self.model, self.inputs, self.policy)


@pytest.fixture(scope="module", params=["llava", "qwen2_5_vl", "qwen3_vl"])
def case(request, tmp_path_factory):
    return Case(request.param, tmp_path_factory.mktemp(request.param))


def device_map(model, even, odd) -> dict[str, object]:
    """Layers with even and odd numbers on different devices, and everything else on the device of the odd ones."""
    places = {f"model.{name}": odd for name, _ in model.model.named_children() if name != "language_model"}
    for name, module in model.model.language_model.named_children():
        path = f"model.language_model.{name}"
        if name == "layers":
            places |= {f"{path}.{number}": odd if number % 2 else even for number in range(len(module))}
        else:
            places[path] = odd
    return {**places, "lm_head": odd}


OFFLOADED = {
    "cpu_offload": lambda model, folder, **options: accelerate.cpu_offload(model, "cpu", **options),
    "disk_offload": lambda model, folder, **options: accelerate.disk_offload(model, folder, "cpu", **options),
    "device_map": lambda model, folder, **options: accelerate.dispatch_model(
        model, device_map(model, "disk", "cpu"), "cpu", offload_dir=folder, **options
    ),
}


@pytest.mark.everyday(9)
@pytest.mark.parametrize("loaded_with", ["itself", "layer", "attention"])
@pytest.mark.parametrize("way", OFFLOADED)
def test_offloaded(case, way, loaded_with, tmp_path):
    """`loaded_with`: the module that loads a projection's weights; unless it is itself, it cannot be called alone."""
    first = case.policy.schedule[0].layer
    layer = case.model.model.language_model.layers[first]
    modules = {"itself": [], "layer": [layer], "attention": [layer.self_attn]}[loaded_with]
    classes = [type(module).__name__ for module in modules]
    model = OFFLOADED[way](copy.deepcopy(case.model), tmp_path, preload_module_classes=classes)
    query = model.model.language_model.layers[first].self_attn.q_proj
    try:
        model(**case.inputs)
    except NotImplementedError as error:
        pytest.skip(f"transformers {transformers.__version__} cannot run this model offloaded, routed or not: {error}")
    assert query.weight.is_meta
    expect_same(run(model, case.inputs, case.policy), case.expected)
    assert query.weight.is_meta, "weights stay loaded after a decision"


@pytest.mark.parametrize("layers", ["one-by-one", "all"])
def test_loaded_offloaded(case, layers, tmp_path):
    """By transformers, which finds the weights of the checkpoint on disk; layers named one by one, or all at once."""
    places = device_map(case.model, "disk", "cpu")
    if layers == "all":
        places = {name: place for name, place in places.items() if ".layers." not in name}
        places["model.language_model.layers"] = "disk"
    model = transformers.AutoModelForImageTextToText.from_pretrained(
        case.folder, dtype=torch.float32, device_map=places, offload_folder=tmp_path
    ).eval()
    expect_same(run(model, case.inputs, case.policy), case.expected)


class PretendedDevices(TorchFunctionMode):
    """Lets tensors on the CPU claim to be on `cpu:1`, `cpu:2`, and refuses operations between them, as devices would.

    Tensors whose `claimed` is None, such as weights, fit every device; so do results computed from them alone.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        args, kwargs = list(args), dict(kwargs or {})
        name = getattr(function, "__name__", "")
        if name == "cpu":
            name, function, kwargs = "to", torch.Tensor.to, {"device": "cpu"}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        here = list(dict.fromkeys(place for tensor in tensors if (place := getattr(tensor, "claimed", "cpu"))))
        if function == torch.Tensor.device.__get__:
            return torch.device(here[0] if here else "cpu")
        place = None
        if kwargs.get("device") is not None:
            place, kwargs["device"] = str(kwargs["device"]), "cpu"
        elif name == "to" and len(args) > 1 and isinstance(args[1], (str, torch.device)):
            place, args[1] = str(args[1]), "cpu"
        if len(here) > 1 and name not in ("copy_", "expand_as"):
            raise RuntimeError(f"{name} expects its tensors on one device, got them on {', '.join(here)}")
        result = function(*args, **kwargs)
        if name == "to" and place is not None and [place] != here:
            result = result.clone()
        if place is None:
            place = here[0] if here else None if tensors else "cpu"
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                leaf.claimed = place
        return result


def alternating(model):
    """Layers as `device_map` places them: each has a hook, and so has every module in it."""
    decoder = model.model.language_model
    for number, module in enumerate((*decoder.layers, decoder.norm)):
        device = f"cpu:{1 + number % 2}"
        hooks.add_hook_to_module(module, hooks.AlignDevicesHook(device, skip_keys=cache_name(model)))
        hooks.attach_execution_device_hook(module, device)


def elsewhere(model):
    """The decoder on another device than the inputs, with hooks on modules that have weights, as in `cpu_offload`."""
    hooks.attach_align_device_hook(model.model.language_model, "cpu:1")


@pytest.mark.everyday(6)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("place", [alternating, elsewhere])
def test_every_operation_is_on_one_device(case, place, action, side):
    check_one_device(case, place, rk.Policy(case.policy.schedule, action), side)


@pytest.mark.parametrize("action", ACTIONS)
def test_memory_follows_the_layers(case, action):
    ranking = Mixed(Remembered(LastQuery(), decay=0.8), uniform=0.3)
    check_one_device(case, alternating, rk.Policy(case.policy.schedule, action, ranking), "left")


def check_one_device(case, place, this, side):
    inputs = case.inputs if case.prompts is None else batch(case.prompts, side)
    expected = run(case.model, inputs, this)
    model = copy.deepcopy(case.model)
    place(model)
    for weight in (*model.parameters(), *model.buffers()):
        weight.claimed = None
    with PretendedDevices():
        expect_same(run(model, inputs, this), expected)


def test_pretended_devices_refuse_what_devices_refuse():
    with PretendedDevices():
        here, there = torch.ones(2, 3), torch.ones(2, 3).to("cpu:1")
        assert (there + there).device == torch.zeros(1, device="cpu:1").device == torch.device("cpu:1")
        assert here.device == torch.device("cpu")
        with pytest.raises(RuntimeError, match="add expects its tensors on one device, got them on cpu, cpu:1"):
            here + there
        assert torch.equal(here + there.to(here.device), 2 * here)


@pytest.mark.gpu
@pytest.mark.parametrize("even", ["cpu", 1], ids=["offloaded", "second-device"])
def test_on_devices(case, even):
    """Layers with even numbers are offloaded to the CPU or on a second device, everything else is on the first."""
    if even == 1 and torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA or ROCm devices")
    inputs = {name: value.to("cuda:0") for name, value in case.inputs.items()}
    expected = run(copy.deepcopy(case.model).to("cuda:0"), inputs, case.policy)
    model = accelerate.dispatch_model(copy.deepcopy(case.model), device_map(case.model, even, 0), 0)
    weight = model.model.language_model.layers[2].self_attn.q_proj.weight
    assert weight.device == torch.device("meta" if even == "cpu" else "cuda:1")
    expect_same(run(model, inputs, case.policy), expected, tolerance=1e-4)
