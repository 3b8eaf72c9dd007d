"""The examples in docstrings run and give the results that they state; public functions have one."""

import doctest
import inspect
from importlib import import_module

import pytest
import torch

import reroute_kernels as rk
from reroute_kernels.cli import demo

MODULES = (
    "backends",
    "budget",
    "calibration",
    "cost",
    "loyalty",
    "models",
    "models.graphs",
    "ops",
    "policy",
    "presets",
    "rankings",
    "reducers.cdpruner",
    "reducers.divprune",
    "reducers.flashvid",
    "reducers.holov",
    "reducers.nuwa",
    "reducers.vidcom2",
    "reducers.visionzip",
    "reducers.vispruner",
    "roofline",
)
EXPLAINED = (
    *(getattr(rk.ops, name) for name in rk.ref.__all__),
    *(rk.Calibration, rk.calibrate, rk.measure_layers),
    *(rk.Policy, rk.apply, rk.backend, rk.cost, rk.preset, rk.presets, rk.solve, rk.suggest, rk.models.unrouted),
    *(rk.rankings.LastQuery, rk.reducers.CDPruner, rk.reducers.DivPrune, rk.reducers.FlashVid, rk.reducers.HoloV),
    *(rk.reducers.Nuwa, rk.reducers.VidCom2, rk.reducers.VisPruner, rk.reducers.VisionZip),
)


@pytest.fixture(scope="module")
def subject():
    """The tiny model that ships here, with a prompt for it."""
    example = demo.example()
    photo = demo.open_image(example.image)
    return demo.load(None, photo, example.prompt, example.policies, chat=True, device="cpu", dtype="float32")


@pytest.mark.parametrize("name", MODULES)
@torch.no_grad()
def test_examples_of_a_module(name, subject):
    module = import_module(f"reroute_kernels.{name}")
    found = doctest.DocTestFinder(exclude_empty=True).find(module, extraglobs={"model": subject.model})
    tests = [test for test in found if test.examples]
    assert tests
    for test in tests:
        test.globs |= {"inputs": subject.inputs, "torch": torch}
        runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
        output = []
        runner.run(test, out=output.append)
        assert not runner.failures, "".join(output)


@pytest.mark.parametrize("explained", EXPLAINED, ids=lambda explained: explained.__name__)
def test_public_names_have_an_example(explained):
    assert ">>> " in inspect.getdoc(explained)


@torch.no_grad()
def test_how_a_routing_shows_itself(subject):
    with rk.apply(subject.model, "3:0.25,7:0.1") as routing:
        assert repr(routing) == "Routing(LlavaForConditionalGeneration, 3:0.25,7:0.1)"
        assert routing.summary().splitlines() == [
            "LlavaForConditionalGeneration: 3:0.25,7:0.1",
            "layers 0 to 2: all tokens",
            "layers 3 to 6: text and 25.0% of the visual",
            "layers 7 to 15: text and 10.0% of the visual",
            "no prompt yet",
        ]
        subject.model(**subject.inputs)
    text = subject.inputs["input_ids"].shape[1] - 144
    shown = f"144 visual of {144 + text} tokens; {36 + text} tokens from layer 3; {14 + text} tokens from layer 7"
    assert routing.summary().endswith(f"latest prompt: {shown}")
    assert repr(routing) == "Routing(LlavaForConditionalGeneration, 3:0.25,7:0.1, removed)"
    assert repr(routing.trace) == f"Trace({shown})"


@pytest.mark.parametrize("text", ["3:0.25,7:0.1", "remove:3:0.25,7:0.1"])
@torch.no_grad()
def test_picture_of_a_trace(text, subject):
    with rk.apply(subject.model, text) as routing:
        subject.model(**subject.inputs)
    trace = routing.trace
    assert torch.equal(trace.visual_positions[0], torch.tensor(subject.visual_positions()))
    figure = trace.plot()
    (image,) = figure.axes[0].images
    states = torch.tensor(image.get_array().filled())
    assert states.shape == (3, 144)
    assert set(states[0].tolist()) == {2}  # before the first decision
    for row, stage in zip(states[1:], trace.stages, strict=True):
        assert torch.equal(trace.visual_positions[0][row == 2], stage.selected[0])
    assert set(states[2].tolist()) == ({0, 2} if text.startswith("remove") else {1, 2})
    html = trace._repr_html_()
    assert html.count("<tr>") == 3
    assert "<td>36</td>" in html
    assert "data:image/png;base64," in html
    with pytest.raises(IndexError, match="sample must be from 0 to 0, got 1"):
        trace.plot(1)


@torch.no_grad()
def test_picture_of_a_reducer_alone(subject):
    with rk.apply(subject.model, rk.Policy([], reducer=rk.reducers.Nuwa(0.5, per_cell=3))) as routing:
        subject.model(**subject.inputs)
    trace = routing.trace
    (image,) = trace.plot().axes[0].images
    states = torch.tensor(image.get_array().filled())
    assert states.shape == (1, 144)
    assert torch.equal(trace.visual_positions[0][states[0] == 2], trace.reduction.selected[0])
    assert "<img" in trace._repr_html_()
