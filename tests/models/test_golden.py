"""The published reference code's outputs, reproduced: tests/golden/README.md says how they were recorded."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file

import reroute_kernels as rk
from tests.models.prompts import GOLDEN, cached_lengths

CASES = ("fastv_remove", "pdrop_remove", "reroute_uniform", "reroute_pyramid", "reroute_aggressive")


@pytest.fixture(scope="session")
def golden(family):
    return load_file(GOLDEN / family / "expected.safetensors")


@pytest.fixture(scope="session")
def inputs(golden):
    return {name.removeprefix("inputs/"): value for name, value in golden.items() if name.startswith("inputs/")}


@pytest.fixture(scope="session")
def tolerance(_loaded, golden, inputs):
    """How far a logit may be from the recorded one: 1e-5, or the difference between kinds of CPUs.

    CPUs add in different orders, and a random model of 12 layers enlarges that: the unrouted model alone, without a
    line of this library, is up to 1.4e-4 from the record of another kind of CPU. A routed one may be twice as far as
    the unrouted one is on this machine.
    """
    _loaded.set_attn_implementation("sdpa")
    with torch.no_grad():
        logits = _loaded(**inputs).logits[0, -1]
    return max(1e-5, 2 * (logits - golden["full/last_logits"]).abs().max().item())


@pytest.fixture(scope="session")
def recorded_rounding(family, golden, inputs):
    """How far the recorded logits of the unrouted model are from float64 ones, which no kind of CPU changes."""
    exact = transformers.AutoModelForImageTextToText.from_pretrained(GOLDEN / family, dtype=torch.float64).eval()
    inputs = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
    with torch.no_grad():
        logits = exact(**inputs).logits[0, -1]
    return (logits - golden["full/last_logits"]).abs().max().item()


def greedy(model, inputs, steps=24):
    """Prefill output and greedy tokens, decoded with explicit positions: the last one of the prompt + 1, + 2, ..."""
    positions = inputs.get("position_ids", torch.arange(inputs["input_ids"].shape[1])[None])[..., -1:]
    output = model(**inputs, use_cache=True)
    lengths = cached_lengths(output.past_key_values)
    tokens, logits = [], output.logits
    for step in range(1, steps + 1):
        tokens.append(logits[:, -1:].argmax(-1))
        if step < steps:
            logits = model(
                input_ids=tokens[-1], position_ids=positions + step, past_key_values=output.past_key_values
            ).logits
    return output, lengths, torch.cat(tokens, dim=1)[0]


def case_policy(family, name):
    cases = json.loads((GOLDEN / family / "cases.json").read_text())["cases"]
    case = next(case for case in cases if case["name"] == name)
    stages = [rk.Stage(*stage) for stage in zip(case["decision_layers"], case["keep_ratios"], strict=True)]
    return rk.Policy(schedule=stages, action=case["action"])


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_routed_golden_case(family, model, golden, inputs, name, tolerance):
    with rk.apply(model, case_policy(family, name)) as routing:
        output, lengths, tokens = greedy(model, inputs)
    for stage in routing.trace.stages:
        assert torch.equal(stage.selected[0], golden[f"{name}/selected/{stage.layer}"]), f"layer {stage.layer}"
    torch.testing.assert_close(output.logits[0, -1], golden[f"{name}/last_logits"], atol=tolerance, rtol=0)
    assert lengths == golden[f"{name}/kv_lengths"].tolist()
    assert torch.equal(tokens, golden[f"{name}/new_tokens"])


@torch.no_grad()
def test_unrouted_golden_case(model, golden, inputs, recorded_rounding):
    """Two float32 results of one exact value: no further from each other than the sum of their distances to it."""
    output, lengths, tokens = greedy(model, inputs)
    torch.testing.assert_close(output.logits[0, -1], golden["full/last_logits"], atol=2 * recorded_rounding, rtol=0)
    assert set(lengths) == {inputs["input_ids"].shape[1]}
    assert torch.equal(tokens, golden["full/new_tokens"])


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_eager_attention_selects_and_answers_the_same(family, model, golden, inputs, name):
    model.set_attn_implementation("eager")
    with rk.apply(model, case_policy(family, name)) as routing:
        _, lengths, tokens = greedy(model, inputs)
    for stage in routing.trace.stages:
        assert torch.equal(stage.selected[0], golden[f"{name}/selected/{stage.layer}"]), f"layer {stage.layer}"
    assert lengths == golden[f"{name}/kv_lengths"].tolist()
    assert torch.equal(tokens, golden[f"{name}/new_tokens"])


@pytest.mark.everyday(2)
@pytest.mark.parametrize("name", ["pdrop_remove", "reroute_pyramid"])
@torch.no_grad()
def test_triton_kernels_reproduce_the_golden_case(family, model, golden, inputs, name, device, launches, tolerance):
    """Through the interpreter on a CPU, or on the device if there is one."""
    model.to(device)
    try:
        with rk.backend("triton"), rk.apply(model, case_policy(family, name)) as routing:
            output = model(**{key: value.to(device) for key, value in inputs.items()}, use_cache=True)
    finally:
        model.to("cpu")
    for stage in routing.trace.stages:
        assert torch.equal(stage.selected[0], golden[f"{name}/selected/{stage.layer}"]), f"layer {stage.layer}"
    decision = ["attention_logits", "reduce_attention", "select_and_compact", "copy_rows_to_compact"]
    decision = ["normalize_rows", *decision]
    later = decision if case_policy(family, name).action == "reroute" else ["copy_rows_to_full", *decision]
    expected = [*decision, *later * (len(routing.trace.stages) - 1), "copy_rows_to_full"]
    assert [launched for launched, _ in launches] == expected
    if device.type != "cpu":
        tolerance = max(1e-4, tolerance)  # the device's matrix products differ from the CPU's
    torch.testing.assert_close(output.logits[0, -1].cpu(), golden[f"{name}/last_logits"], atol=tolerance, rtol=0)
