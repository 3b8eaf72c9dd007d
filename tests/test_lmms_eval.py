"""Routed model types of lmms-eval: found, loaded and run by lmms-eval itself, with the answers of `apply`."""

from __future__ import annotations

import base64
import inspect
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

import reroute_kernels as rk
from bench.grounding import benchmark, checkpoint, example
from bench.grounding.answers import Answerer, held_out_item, held_out_items
from bench.grounding.metrics import MEASURES, score
from bench.grounding.policies import UNROUTED, policy_of
from reroute_kernels.notation import policy_text
from tests.models.families import qwen3_vl
from tests.models.prompts import GOLDEN, IMAGE, VIDEO, VISION_END, VISION_START

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed: make test-lmms-eval has an environment with it")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

from lmms_eval import evaluator
from lmms_eval import models as registry
from lmms_eval.tasks import TaskManager
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, PreTrainedTokenizerFast

from bench.grounding.lmms_eval_task.__main__ import TASK, write_task
from reroute_kernels import lmms_eval as plugin
from reroute_kernels.models.adapter import CACHE_NAMES, cache_of

ROOT = Path(__file__).parents[1]
SCENES = 12
VISUAL, LAYERS = 144, 16
POLICIES = {
    "none": None,
    "2:0.25+6:0.1": rk.Policy([rk.Stage(2, 0.25), rk.Stage(6, 0.1)]),
    "freeze:2:0.25+6:0.1": rk.Policy([rk.Stage(2, 0.25), rk.Stage(6, 0.1)], "freeze"),
    "remove:2:0.25+6:0.1": rk.Policy([rk.Stage(2, 0.25), rk.Stage(6, 0.1)], "remove"),
}
LLAVA = AutoConfig.for_model("llava", text_config={"model_type": "llama", "num_hidden_layers": 32})
QWEN = AutoConfig.for_model("qwen2_5_vl", text_config={"num_hidden_layers": 28})


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The grounding model before training."""
    folder = tmp_path_factory.mktemp("tiny")
    checkpoint.save(checkpoint.make_model(0), folder)
    return folder


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """A folder with the task, with few scenes."""
    os.environ["HF_DATASETS_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    folder = tmp_path_factory.mktemp("task")
    write_task(folder, SCENES)
    return folder


def make(name, arguments, simple=False):
    return registry.get_model(name, force_simple=simple).create_from_arg_string(arguments)


def evaluate(lm, task):
    """Run lmms-eval on the task: samples by number, and every call of `generate` with its output."""
    calls, generate = [], lm.model.generate

    def recorded(**inputs):
        calls.append((inputs, generate(**inputs)))
        return calls[-1][1]

    lm.model.generate = recorded
    return results_of(lm, task)["samples"][TASK], calls


def results_of(lm, task):
    """Results that lmms-eval reports."""
    manager = TaskManager(include_path=str(task), include_defaults=False)
    return evaluator.simple_evaluate(model=lm, tasks=[TASK], task_manager=manager, batch_size=1, log_samples=True)


def by_hand(model, policy, inputs):
    """The same `generate` without the plug-in."""
    if policy is None:
        return model.generate(**inputs)
    with rk.apply(model, policy):
        return model.generate(**inputs)


# The registry


def test_types_are_found_by_their_entry_point():
    for wrapped, (name, _) in plugin.WRAPPED.items():
        manifest = registry.get_model_manifest(f"reroute_{wrapped}")
        assert manifest.simple_class_path == f"reroute_kernels.lmms_eval.{name}Simple"
        assert manifest.chat_class_path == f"reroute_kernels.lmms_eval.{name}Chat"
        for simple in (True, False):
            routed, own = (registry.get_model(kind + wrapped, force_simple=simple) for kind in ("reroute_", ""))
            assert issubclass(routed, plugin.RoutedLMM)
            assert issubclass(routed, own)
            assert routed.is_simple is simple
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        _ = plugin.Nothing


def test_the_library_does_not_import_lmms_eval():
    code = (
        "import sys, reroute_kernels.models, reroute_kernels.boxes;"
        "assert not {'lmms_eval', 'loguru'} & set(sys.modules);"
        "import reroute_kernels.lmms_eval; assert 'lmms_eval' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_guide_names_tasks_and_methods_that_there_are():
    guide = (ROOT / "docs" / "evaluation.md").read_text()
    named = set(re.findall(r"^(?:tasks|boxes)=(?:\$boxes,)?(\S+)$", guide, flags=re.MULTILINE))
    named = {name for names in named for name in names.split(",")}
    assert len(named) == 12
    assert named <= set(TaskManager().all_subtasks)
    (methods,) = re.findall(r"^for method in (.*); do$", guide, flags=re.MULTILINE)
    (tiers,) = re.findall(r"for tier in (.*); do$", guide, flags=re.MULTILINE)
    for config in (LLAVA, QWEN):
        for method in methods.split():
            for tier in tiers.split():
                assert isinstance(plugin.policy_of(method, int(tier), config), rk.Policy)


# LLaVA, from lmms-eval's start to its table


@pytest.mark.parametrize("simple", [False, True], ids=["chat", "simple"])
@pytest.mark.parametrize("policy", POLICIES)
def test_answers_are_those_of_the_model_under_apply(tiny, task, policy, simple):
    lm = make("reroute_llava_hf", f"pretrained={tiny},dtype=float32,policy={policy}", simple)
    samples, _ = evaluate(lm, task)
    answerer, items = Answerer(tiny), held_out_items(SCENES)
    assert len(items) == len(samples) == lm.prompts
    if POLICIES[policy] is not None:
        rk.apply(answerer.model, POLICIES[policy])
    for item, sample in zip(items, sorted(samples, key=lambda each: each["doc_id"]), strict=True):
        inputs = answerer.inputs([item])
        words = ["<s>", *["<image>"] * VISUAL, *item.question.text.split()]
        assert inputs["input_ids"].tolist() == [[checkpoint.TOKEN_ID[word] for word in words]]
        assert sample["resps"] == [answerer.answer(inputs)]
        assert sample["doc"]["answer"] == item.question.answer
    if POLICIES[policy] is None:
        assert lm.routing is None
        assert lm.average_visual_tokens == VISUAL
    else:
        assert [len(stage.selected[0]) for stage in lm.routing.trace.stages] == [36, 14]
        assert lm.average_visual_tokens == (2 * VISUAL + 4 * 36 + 10 * 14) / LAYERS
        assert not lm.routing._handles, "clean() takes the routing off"


@pytest.mark.parametrize("way", [UNROUTED, example.REMOVE, example.REROUTE], ids=lambda way: way.action)
def test_figures_are_those_of_the_benchmark(task, way):
    """Of the model that ships, on the same scenes; there in batches, here one by one."""
    benchmark.prepare(checkpoint.FOLDER, SCENES, threads=1)
    answers, _ = benchmark.answer_all(policy_of(way))
    scores = [score(item.question, answer) for item, answer in zip(held_out_items(SCENES), answers, strict=True)]
    policy = policy_of(way)
    text = "none" if policy is None else policy_text(policy).replace(",", "+")
    lm = make("reroute_llava_hf", f"pretrained={checkpoint.FOLDER},dtype=float32,policy={text}")
    reported = results_of(lm, task)["results"][TASK]
    for measure in MEASURES:
        values = [each[measure] for each in scores if measure in each]
        assert values
        assert reported[f"{measure},none"] == pytest.approx(sum(values) / len(values), abs=1e-6), measure


def test_policies_give_different_answers(tiny, task):
    answers = set()
    for policy in POLICIES:
        samples, _ = evaluate(make("reroute_llava_hf", f"pretrained={tiny},dtype=float32,policy={policy}"), task)
        answers.add(str([sample["resps"] for sample in samples]))
    assert len(answers) == len(POLICIES)


def test_command_line(tiny, task, tmp_path):
    command = [sys.executable, "-m", "lmms_eval", "--model", "reroute_llava_hf", "--tasks", TASK, "--limit", "2"]
    command += ["--model_args", f"pretrained={tiny},policy=remove:2:0.25+6:0.1,device_map=cpu,dtype=float32"]
    command += ["--include_path", str(task), "--batch_size", "1", "--output_path", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert run.returncode == 0, run.stderr
    output = re.sub(r"\x1b\[\d*m", "", run.stdout + run.stderr)
    assert re.search(r"runs remove:2:0.25\+6:0.1 \(avg_tokens=None\): remove:2:0.25,6:0.1\n", output)
    assert "2 prompts with images: 144.0 visual tokens, of which 35.75 ran in a layer on average" in output
    assert re.search(rf"\|{TASK} *\|none", output)
    (results,) = tmp_path.rglob("*results.json")
    assert set(json.loads(results.read_text())["results"][TASK]) >= {"acc@0.5,none", "iou,none"}


# Likelihoods


@pytest.mark.parametrize("simple", [False, True], ids=["chat", "simple"])
@pytest.mark.parametrize("policy", POLICIES)
def test_likelihoods_are_those_of_the_prompt_and_then_the_answer(tiny, policy, simple):
    answers, image = ("red circle", "blue"), Image.effect_noise((96, 96), 90).convert("RGB")
    lm = make("reroute_llava_hf", f"pretrained={tiny},dtype=float32,policy={policy}", simple)
    lm.task_dict = {"task": {"test": [{"answer": answer} for answer in answers]}}
    requests = [
        SimpleNamespace(args=("what is large ?", lambda doc: doc["answer"], lambda _: [image], number, "task", "test"))
        for number in range(len(answers))
    ]
    calls, forward = [], lm.model.register_forward_pre_hook(lambda *given: calls.append(given[2]), with_kwargs=True)
    traces, ends = [], lm.model.register_forward_hook(lambda *_: traces.append(lm.routing and lm.routing.trace))
    losses = [loss for loss, _ in lm.loglikelihood(requests)]
    forward.remove()
    ends.remove()
    assert len(calls) == len(answers)
    for inputs, loss, trace, answer in zip(calls, losses, traces, answers, strict=True):
        ids, labels = inputs["input_ids"], inputs["labels"]
        start = int((labels[0] != -100).nonzero()[0])
        assert start > int((ids[0] == lm.config.image_token_id).nonzero()[-1]) + 1
        assert answer.split()[0] in lm.tokenizer.decode(ids[0, start:])
        prompt = {"input_ids": ids[:, :start], "attention_mask": torch.ones(1, start, dtype=torch.int64)}
        with torch.no_grad():
            first = lm.model(**prompt, pixel_values=inputs["pixel_values"], use_cache=True)
            if lm.routing is not None:
                for stage, alone in zip(trace.stages, lm.routing.trace.stages, strict=True):
                    assert torch.equal(stage.selected[0], alone.selected[0])
            later = lm.model(input_ids=ids[:, start:], **{first_name(lm.model): cache_of(first)})
        logits = torch.cat([first.logits[:, -1:], later.logits[:, :-1]], dim=1)
        expected = torch.nn.functional.cross_entropy(logits[0], ids[0, start:])
        assert loss == pytest.approx(expected.item(), abs=1e-4)


def first_name(model):
    """Name of the argument for the cache."""
    return next(name for name in CACHE_NAMES if name in inspect.signature(model.forward).parameters)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_types_without_likelihoods_say_so(name):
    routed = registry.get_model(f"reroute_{name}")
    with pytest.raises(NotImplementedError, match="Loglikelihood is not implemented"):
        routed.loglikelihood(object.__new__(routed), [])


# Runs that must not pass


@pytest.mark.parametrize("simple", [False, True], ids=["chat", "simple"])
def test_a_prompt_that_is_not_routed_ends_the_run(tiny, task, simple):
    lm = make("reroute_llava_hf", f"pretrained={tiny},policy=2:0.25", simple)
    lm.routing.remove()
    with pytest.raises(RuntimeError, match=r"generate must route a prompt with images by 2:0.25, and it left no trace"):
        evaluate(lm, task)


@pytest.mark.parametrize("policy", ["none", "2:0.25"])
def test_an_error_in_generate_is_no_empty_answer(tiny, task, policy):
    lm = make("reroute_llava_hf", f"pretrained={tiny},policy={policy}")
    lm.model.model.vision_tower.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(ValueError("broken tower")))
    with pytest.raises(ValueError, match="broken tower"):
        evaluate(lm, task)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("llava_hf", "policy=fastvv,avg_tokens=64", r"policy must be a method \(fastv, .*; got 'fastvv'"),
        ("llava_hf", "policy=3", "policy must be .*; got 3"),
        ("llava_hf", "policy=2:x", "policy must be .*; got '2:x': a stage is a layer"),
        ("llava_hf", "policy=2:1.5", r"policy must be .*; got '2:1.5': keep must be"),
        ("llava_hf", "policy=qwen/fastv/64", "policy must be .*; got 'qwen/fastv/64': model must be one of"),
        ("llava_hf", "policy=2:0.25,avg_tokens=64", "avg_tokens must be left out where policy is no method, got 64"),
        ("llava_hf", "avg_tokens=64", "avg_tokens must be left out where policy is no method, got 64 beside None"),
        ("llava_hf", "policy=nuwa,avg_tokens=64", "method must be one of 'fastv', .*, got 'nuwa'"),
        ("llava_hf", "policy=llava-1.5-7b/reroute-fastv/64", "layer"),
        ("llava_hf", "policy=2:0.25,use_cache=False", "use_cache must be True where there is a policy, got False"),
        ("llava_hf", "trust_remote_code=True", "pretrained must be a checkpoint without code of its own"),
        ("llava_hf", "boxes=pixels", "boxes must be answer or shares, got 'pixels'"),
        ("qwen2_5_vl", "policy=none", "pretrained must be of type qwen2_5_vl for reroute_qwen2_5_vl, got .* 'llava'"),
        ("qwen3_vl", "policy=none", "pretrained must be of type qwen3_vl or .* for reroute_qwen3_vl, got .* 'llava'"),
    ],
)
def test_arguments_that_are_refused(tiny, name, arguments, message):
    with pytest.raises(ValueError, match=message):
        make(f"reroute_{name}", f"pretrained={tiny},{arguments}")


def test_methods_are_looked_up_for_the_checkpoint():
    for method, tier in (("reroute-fastv", 64), ("pdrop", 192), ("fastv-original", 128), ("pdrop-original", 270)):
        assert plugin.policy_of(method, tier, LLAVA) == rk.preset("llava-1.5-7b", method, tier)
        assert plugin.policy_of(method, tier, QWEN) == rk.preset("qwen2.5-vl-7b", method, tier)
    assert plugin.policy_of("visionzip", 64, LLAVA) == plugin.policy_of("visionzip/64", None, LLAVA)
    flashvid = rk.preset("qwen2.5-vl-7b", "flashvid", "10%")
    assert plugin.policy_of("flashvid", "10%", QWEN) == plugin.policy_of("flashvid/10%", None, QWEN) == flashvid
    assert plugin.policy_of("nuwa", 432, QWEN) == rk.preset("qwen2.5-vl-7b", "nuwa", 432)
    assert plugin.policy_of("llava-1.5-7b/pdrop/64", None, LLAVA) == rk.preset("llava-1.5-7b", "pdrop", 64)
    with pytest.raises(ValueError, match=r"presets of qwen2\.5-vl-7b are for 28 decoder layers, and this model has 32"):
        plugin.policy_of("qwen2.5-vl-7b/pdrop/64", None, LLAVA)
    assert plugin.policy_of("None", None, LLAVA) is None
    with pytest.raises(ValueError, match="avg_tokens must be one of 192, 128, 64, got None"):
        plugin.policy_of("fastv", None, LLAVA)


def test_policies_in_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    policy = rk.Policy([rk.Stage(2, 0.25), rk.Stage(6, 0.1, rk.rankings.KeyNorm())])
    for name in ("policy.json", "mine", "pdrop"):
        policy.save(name)
    assert plugin.policy_of("policy.json", None, LLAVA) == plugin.policy_of("mine", None, LLAVA) == policy
    assert plugin.policy_of("pdrop", 192, LLAVA) == rk.preset("llava-1.5-7b", "pdrop", 192)  # a method comes first
    with pytest.raises(
        ValueError, match="avg_tokens must be left out where policy is no method, got 64 beside 'policy"
    ):
        plugin.policy_of("policy.json", 64, LLAVA)
    with pytest.raises(FileNotFoundError):
        plugin.policy_of("none.json", None, LLAVA)


@pytest.mark.parametrize(
    "policy", [POLICIES["2:0.25+6:0.1"], rk.Policy([rk.Stage(4, 0.3)], reducer=rk.reducers.Nuwa(0.5, per_cell=3))]
)
def test_visual_tokens_by_layer_are_those_in_the_cache(tiny, policy):
    model = AutoModelForImageTextToText.from_pretrained(tiny, dtype=torch.float32)
    inputs = Answerer(tiny).inputs([held_out_item(1)])
    with rk.apply(model, policy) as routing, torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
    (counts,) = plugin.visual_tokens_by_layer(routing.trace, LAYERS)
    assert counts == [layer.keys.shape[2] - (inputs["input_ids"].shape[1] - VISUAL) for layer in cache.layers]
    assert len(set(counts)) > 1


# Qwen: lmms-eval's classes with processors that need no torchvision

QWEN_TEMPLATE = """\
{%- for message in messages -%}
    {%- if message['content'] is string -%}{{ message['content'] }}
    {%- else -%}
        {%- for content in message['content'] -%}
            {{- '<|vision_start|><|image_pad|><|vision_end|>' if content['type'] == 'image' else content['text'] -}}
        {%- endfor -%}
    {%- endif -%}
    {{- ' ' -}}
{%- endfor -%}
"""


def qwen_tokenizer():
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {word: 3 + number for number, word in enumerate(checkpoint.WORDS)}
    special = {"<|image_pad|>": IMAGE, "<|video_pad|>": VIDEO, "<|vision_start|>": VISION_START}
    special |= {"<|vision_end|>": VISION_END}
    taken = {**vocabulary, **special}.values()
    vocabulary |= special | {f"w{number}": number for number in range(512) if number not in taken}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>", pad_token="<s>")
    made.chat_template = QWEN_TEMPLATE
    return made


def open_images(messages, **options):
    """Stand-in for `qwen_vl_utils.process_vision_info` with images, but for their size."""
    images = []
    for message in messages:
        for content in message if isinstance(message, list) else [message]:
            for part in content["content"] if isinstance(content["content"], list) else []:
                if part["type"] == "image" and isinstance(part["image"], str):
                    images.append(Image.open(io.BytesIO(base64.b64decode(part["image"].partition(",")[2]))))
                elif part["type"] == "image":
                    images.append(part["image"])
    return (images, None, {}) if options.get("return_video_kwargs") else (images, None)


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl"])
def qwen(request, tmp_path_factory):
    """A model type of lmms-eval, and a tiny checkpoint for it with random weights."""
    folder = tmp_path_factory.mktemp(request.param) / "checkpoint"
    if request.param == "qwen2_5_vl":
        shutil.copytree(GOLDEN / "qwen2_5_vl", folder)
    else:
        torch.manual_seed(0)
        qwen3_vl().save_pretrained(folder)
    qwen_tokenizer().save_pretrained(folder)
    return request.param, folder


@pytest.fixture
def _without_torchvision(monkeypatch):
    """The real processors with an image processor that runs on Pillow, and none for videos."""
    from lmms_eval.models.chat import qwen2_5_vl as chat_2_5
    from lmms_eval.models.chat import qwen3_vl as chat_3
    from lmms_eval.models.simple import qwen2_5_vl as simple_2_5
    from lmms_eval.models.simple import qwen3_vl as simple_3
    from transformers import Qwen2_5_VLProcessor, Qwen3VLProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    for base, patch, simple, chat in (
        (Qwen2_5_VLProcessor, 14, simple_2_5, chat_2_5),
        (Qwen3VLProcessor, 16, simple_3, chat_3),
    ):

        def check(self, name, argument, original=base.check_argument_for_proper_class):
            return None if name == "video_processor" else original(self, name, argument)

        def load(pretrained, *, base=base, patch=patch, **options):
            images = Qwen2VLImageProcessorPil(patch_size=patch, min_pixels=784, max_pixels=10**6)
            tokenizer = PreTrainedTokenizerFast.from_pretrained(pretrained)
            return base(images, tokenizer, None, chat_template=QWEN_TEMPLATE)

        monkeypatch.setattr(base, "check_argument_for_proper_class", check)
        monkeypatch.setattr(simple, "AutoProcessor", SimpleNamespace(from_pretrained=load))
        for module in (simple, chat):
            monkeypatch.setattr(module, "process_vision_info", open_images)


@pytest.mark.usefixtures("_without_torchvision")
@pytest.mark.parametrize("simple", [False, True], ids=["chat", "simple"])
@pytest.mark.parametrize("policy", ["none", "2:0.25+4:0.1"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_qwen_answers_as_under_apply(qwen, task, policy, simple, batch_size):
    wrapped, folder = qwen
    arguments = f"pretrained={folder},policy={policy},batch_size={batch_size}"
    lm = make(f"reroute_{wrapped}", arguments, simple)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.bfloat16).eval()
    samples, calls = evaluate(lm, task)
    parsed = None if policy == "none" else rk.Policy([rk.Stage(2, 0.25), rk.Stage(4, 0.1)])
    assert len(samples) == lm.prompts == sum(len(inputs["input_ids"]) for inputs, _ in calls)
    assert max(len(inputs["input_ids"]) for inputs, _ in calls) == batch_size
    answers = []
    for inputs, output in calls:
        assert torch.equal(by_hand(model, parsed, inputs), output)
        answers += qwen_tokenizer().batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert sorted(answers) == sorted(sample["resps"][0][0] for sample in samples)
    visual, layers = (49, 12) if wrapped == "qwen2_5_vl" else (36, 6)
    kept = [visual // 4, visual // 10]
    assert lm._visual == visual * lm.prompts
    if parsed is not None:
        average = (2 * visual + 2 * kept[0] + (layers - 4) * kept[1]) / layers
        assert lm.average_visual_tokens == pytest.approx(average)


@pytest.mark.usefixtures("_without_torchvision")
@pytest.mark.parametrize("simple", [False, True], ids=["chat", "simple"])
def test_boxes_become_shares_of_the_picture(qwen, task, monkeypatch, simple):
    wrapped, folder = qwen
    answers = iter(["[49, 98, 147, 196]", "no box", '```json\n[{"bbox_2d": [49, 98, 147, 147]}]\n```'] * 100)
    decode = PreTrainedTokenizerFast.batch_decode
    monkeypatch.setattr(PreTrainedTokenizerFast, "batch_decode", lambda *_, **__: [next(answers)])
    samples, _ = evaluate(make(f"reroute_{wrapped}", f"pretrained={folder},policy=2:0.5,boxes=shares", simple), task)
    monkeypatch.setattr(PreTrainedTokenizerFast, "batch_decode", decode)
    expected = {
        "qwen2_5_vl": {"[0.2500, 0.5000, 0.7500, 1.0000]", "no box", "[0.2500, 0.5000, 0.7500, 0.7500]"},
        "qwen3_vl": {"[0.0490, 0.0980, 0.1470, 0.1960]", "no box", "[0.0490, 0.0980, 0.1470, 0.1470]"},
    }
    assert {sample["resps"][0][0] for sample in samples} == expected[wrapped]


def test_boxes_of_llava_are_put_in_brackets(tiny, task, monkeypatch):
    tokenizer = type(AutoProcessor.from_pretrained(tiny).tokenizer)
    monkeypatch.setattr(tokenizer, "batch_decode", lambda *_, **__: ["0.24 0.30 0.42 0.50"])
    for boxes, expected in (("shares", "[0.2400, 0.3000, 0.4200, 0.5000]"), ("answer", "0.24 0.30 0.42 0.50")):
        samples, _ = evaluate(make("reroute_llava_hf", f"pretrained={tiny},boxes={boxes}"), task)
        assert {sample["resps"][0][0] for sample in samples} == {expected}


# The task


def test_true_answers_score_full_marks(tiny, task, monkeypatch):
    lm = make("reroute_llava_hf", f"pretrained={tiny}")
    truths = {}

    def answers(requests):
        for request in requests:
            *_, number, name, split = request.args
            truths[number] = lm.task_dict[name][split][number]
        return [truths[request.args[-3]]["answer"] for request in requests]

    monkeypatch.setattr(lm, "generate_until", answers)
    manager = TaskManager(include_path=str(task), include_defaults=False)
    results = evaluator.simple_evaluate(model=lm, tasks=[TASK], task_manager=manager, batch_size=1, log_samples=True)
    found = results["results"][TASK]
    assert {name for name in MEASURES if found[f"{name},none"] == 1} == MEASURES.keys() - {"iou"}
    assert 0.8 < found["iou,none"] < 1
