"""The command that compares a model with itself under policies, on the tiny checkpoint."""

import json
import re

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import reroute_kernels as rk
from reroute_kernels.cli.commands import app
from reroute_kernels.cli.demo import TINY_CHECKPOINT, full_prompt, load_network, load_processor
from reroute_kernels.cli.loyalty import policies_of
from reroute_kernels.loyalty import MEASURES, measure_loyalty
from tests.cli.photos import assert_one_clear_line, make_photos

QUESTION, LENGTH = "how many objects", 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two images, and a file that is none."""
    return make_photos(tmp_path_factory.mktemp("photos"), 2)


@pytest.fixture(scope="module")
def model():
    return load_network(str(TINY_CHECKPOINT), "cpu", "float32")


@pytest.fixture(scope="module")
def prompts(folder):
    processor = load_processor(str(TINY_CHECKPOINT))
    text = full_prompt(QUESTION, processor, str(TINY_CHECKPOINT), None)
    images = [Image.open(folder / f"{number}.png") for number in range(2)]
    return [dict(processor(images=image, text=text, return_tensors="pt")) for image in images]


def run(*arguments):
    return CliRunner().invoke(app, ["loyalty", *map(str, arguments)])


@torch.no_grad()
def by_hand(model, inputs):
    """Log-probabilities of the next token, and the greedy answer, by calls of the model alone."""
    output = model(**inputs, use_cache=True)
    first, tokens = output.logits[0, -1].double().log_softmax(-1), []
    for _ in range(LENGTH):
        tokens.append(output.logits[0, -1].argmax().item())
        if tokens[-1] == model.generation_config.eos_token_id:
            break
        output = model(input_ids=torch.tensor([tokens[-1:]]), past_key_values=output.past_key_values, use_cache=True)
    return first, tokens


def test_values_are_those_of_plain_calls(folder, model, prompts, tmp_path):
    """A policy that removes nearly all disagrees, one that keeps all agrees, and JSON, file and table say the same."""
    files = {name: tmp_path / name for name in ("report.json", "plot.svg")}
    options = ["--images", folder, "--prompt", QUESTION, "--max-new-tokens", LENGTH]
    options += ["--policy", "remove:1:0.001", "--policy", "2:1"]
    result = run(TINY_CHECKPOINT, *options, "--output", files["report.json"], "--plot", files["plot.svg"])
    assert result.exit_code == 0, result.output
    told = json.loads(files["report.json"].read_text())
    assert "<svg" in files["plot.svg"].read_text()
    assert told["images"] == ["0.png", "1.png"]
    assert (told["prompts"], told["visual_tokens"], told["text_tokens"]) == (2, 144, 4)
    outcomes = [by_hand(model, inputs) for inputs in prompts]
    for each in told["policies"]:
        policy = rk.Policy.from_dict(each["policy"])
        assert policy == rk.Policy.parse(each["name"])
        for found, inputs, (before, answer) in zip(each["prompts"], prompts, outcomes, strict=True):
            with rk.apply(model, policy):
                after, routed_answer = by_hand(model, inputs)
            expected = torch.nn.functional.kl_div(after, before, log_target=True, reduction="sum").item()
            assert found["divergence"] == pytest.approx(expected, rel=1e-4, abs=1e-9)
            assert found["same_token"] == float(before.argmax() == after.argmax())
            assert found["same_answer"] == float(answer == routed_answer)
        for name in MEASURES:
            mean = sum(found[name] for found in each["prompts"]) / 2
            assert each[name]["mean"] == pytest.approx(mean, abs=1e-12)
            assert each[name]["low"] - 1e-12 <= mean <= each[name]["high"] + 1e-12
        cost, unrouted = (rk.cost(model, each, 4, 144, dtype="float32") for each in (policy, None))
        assert each["average_visual_tokens"] == cost.average_visual_tokens
        assert each["cost"]["prefill_flops_share"] == cost.prefill_flops / unrouted.prefill_flops
        assert each["cost"]["kv_bytes"] == cost.kv_bytes
    removing, keeping = told["policies"]
    assert removing["divergence"]["mean"] > 0.01
    assert keeping["divergence"]["mean"] == pytest.approx(0, abs=1e-6)
    assert keeping["same_answer"]["mean"] == 1
    rows = [
        [cell.strip() for cell in re.split("[│┃]", line)[1:-1]] for line in result.stdout.splitlines() if "│" in line
    ]
    assert [row[0] for row in rows] == ["remove:1:0.001", "2:1"]
    assert rows[0][4].startswith(f"{removing['divergence']['mean']:.3f} [")
    assert rows[1][5:] == ["100% [100%, 100%]"] * 2


def test_budgets_and_defaults(model):
    config = model.config
    names = list(policies_of(config, [], []))
    assert names[:5] == ["fastv/192", "reroute-fastv/192", "pdrop/192", "reroute-pdrop/192", "fastv/128"]
    assert len(names) == 12
    solved = policies_of(config, [], [0.3, 0.15])
    assert list(solved)[3:5] == ["reroute-pdrop at 0.3", "fastv at 0.15"]
    given = policies_of(config, ["freeze:2:0.4,6:0.4", "remove:3:0.5,9:0.1"], [0.3])
    assert list(given) == ["freeze:2:0.4,6:0.4 at 0.3", "remove:3:0.5,9:0.1 at 0.3"]
    assert [policy.action for policy in given.values()] == ["freeze", "remove"]
    for name, policy in {**solved, **given}.items():
        share = float(name.split(" at ")[1])
        assert share - 0.01 < rk.cost(config, policy, 4, 576).average_visual_tokens / 576 <= share


@pytest.mark.parametrize("failing", [None, 1], ids=["none", "batch"])
def test_bad_prompts_leave_the_model_as_it_was(failing, model, prompts):
    model.train()
    given = [] if failing is None else [{name: torch.cat([value] * 2) for name, value in prompts[0].items()}]
    message = "prompts must hold at least one" if failing is None else r"got \[144, 144\] in prompt 0"
    with pytest.raises(ValueError, match=message):
        measure_loyalty(model, given, {"half": rk.Policy.parse("2:0.5")}, max_new_tokens=1, progress=False)
    assert model.training
    assert rk.routing_of(model) is None
    with pytest.raises(ValueError, match="policies must hold at least one, got none"):
        measure_loyalty(model, prompts, {})
    model.eval()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("{tiny} --images {tmp}/missing", "images must be a folder, got .*missing"),
        ("{tiny} --images {photos} --keep 1.5", r"keep must be in \(0, 1\], got 1.5"),
        ("{tiny} --images {photos} --keep 0.01", "keep must be 0.06413 or more for fastv/64, .* got 0.01"),
        ("{tiny} --images {photos} --policy 99:0.5", "schedule must stay below layer 16 of this model, got layer 99"),
        ("{tiny} --images {photos} --policy half", "policy must be a preset like .*, got 'half'"),
        ("{tiny} --images {photos} --output p.txt", "output must end in .json, got p.txt"),
        ("{tiny} --images {photos} --plot q/p.png", "plot must be a file that can be written"),
        ("{tiny} --images {photos} --device moon", "device must be one of this machine's, got 'moon'"),
        ("{tmp}/nothing --images {photos}", "model must be a checkpoint folder or hub id of a supported"),
    ],
    ids=lambda value: value.replace("{tiny} --images {photos} ", ""),
)
def test_one_clear_line_and_exit_code_2(arguments, message, folder, tmp_path):
    named = {"tiny": TINY_CHECKPOINT, "photos": folder, "tmp": tmp_path}
    assert_one_clear_line(run(*arguments.format(**named).split()), message)
    assert not list(tmp_path.iterdir())
