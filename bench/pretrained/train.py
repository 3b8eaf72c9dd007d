"""Train the connector of build/pretrained: its projector, and LoRA on its decoder, on scenes over photos.

    python -m bench.pretrained.train [--minutes M]

The vision tower stays as it is. Two phases. First the projector alone learns to name: the features of a visual token on
an object become the sum of the decoder's own embeddings of the words that tell of that object, its name and its box.
The decoder does not run, so this takes minutes. Then projector and LoRA learn to answer: where is the object of this
name? A question for every object stands behind each image, and only the answers count. Scenes have one object or two
at first, and one more at most whenever the columns and rows in the answers are mostly right. In most steps only a part
of the visual tokens stands before the text, all those on objects and some others: such a scene costs a fraction.

Scenes depend on the seed, the step and that count alone. The weights, the optimizer's state and the counts are kept in
one file, so a repeated command goes on exactly where the last one stopped. It ends after so many minutes; there is no
last step, and the learning rate falls with the root of the steps.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bench.grounding.metrics import interval
from bench.grounding.scenes import MOST_OBJECTS, Object, Scene, held_out_scene, make_scene
from bench.grounding.train import Log, machine_of
from reroute_kernels.boxes import overlap

from .chart import COLUMNS, PARTS, read_box
from .convert import CHECKED, FOLDER, SIDE
from .packing import BEGIN, NAMES, Encode, Packed, kept_tokens, pack

WORK = FOLDER / "connector"
STATE, LOG = "state.safetensors", "training.jsonl"
HELD_OUT_SEED = 7
NAMING, NAMING_BATCH, PASSES = 160, 8, 4
"""Steps of the first phase, scenes of each, and updates by each."""
NAMING_RATE, RATES = 1e-3, {"lora": 2e-3, "projector": 5e-4}
NAMING_SHARE = 0.1
"""Weight of the first phase's loss in the second."""
WARM_UP, LEVEL = 20, 400
"""Steps over which the rate rises, and to which it stays level."""
ENOUGH, AT_LEAST = 0.6, 25
"""One more object comes into the scenes if this share of columns and rows is right or next to it, and so many steps
have passed."""
WHOLE, MORE = 4, 4
"""Every fourth step shows whole images; the others leave visual tokens out, of four times as many scenes."""
LOGGED, KEPT = 10, 25
TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj)"
SHARPNESS = 5.0
"""Of the first phase's choice among words: the larger, the shorter the projected features may be."""
NEAR = 0.6
"""Deviation, in words, of columns, rows and lengths that count as nearly right."""
FIRST_ORDERED = NAMES.index(COLUMNS)


@dataclass(frozen=True)
class Options:
    """Options that a run depends on; one that goes on must have the same.

    Raises:
        ValueError: an option is out of range.
    """

    seed: int = 0
    batch: int = 2
    """Scenes of a step with whole images."""
    rank: int = 8
    """Of LoRA."""
    naming: int = NAMING
    """Steps of the first phase."""
    objects: int = 2
    """In a scene at most, when the second phase begins."""

    def __post_init__(self):
        for name, least, most in (
            ("batch", 1, 4096),
            ("rank", 1, 256),
            ("naming", 0, 10**6),
            ("objects", 1, MOST_OBJECTS),
        ):
            value = getattr(self, name)
            if not least <= value <= most:
                raise ValueError(f"{name} must be in [{least}, {most}], got {value}")


class Trainee:
    """A LLaVA with LoRA on its decoder, of which LoRA and the projector are trained.

    Args:
        model: the LLaVA; its weights stay as they are, in the type that they have.
        encode: token ids of a text; every word of `NAMES` and the text before an image is one token.
        side: pixels along an edge of the image.
        options: of the run.

    Raises:
        ValueError: a word has several tokens.
    """

    def __init__(self, model: nn.Module, encode: Encode, side: int, options: Options):
        from peft import LoraConfig, get_peft_model

        self.encode, self.side, self.options = encode, side, options
        self.grid = math.isqrt(model.config.image_seq_length)
        lora = LoraConfig(
            r=options.rank,
            lora_alpha=2 * options.rank,
            target_modules=TARGETS,
            modules_to_save=["multi_modal_projector"],
        )
        torch.manual_seed(options.seed)
        # On a CPU the plain attention of the decoder is faster, forward and backward, than the fused one with a mask.
        model.set_attn_implementation({"text_config": "eager", "vision_config": "sdpa"})
        self.adapted = get_peft_model(model, lora).eval()  # no part of it drops out
        self.llava = self.adapted.get_base_model()
        self.device, self.dtype = model.device, model.get_input_embeddings().weight.dtype
        self.trained = {name: each for name, each in self.adapted.named_parameters() if each.requires_grad}
        for each in self.trained.values():
            each.data = each.data.float()
        words = [[encode(word) for word in group] for group in (*NAMES, *PARTS, (BEGIN,))]
        if any(len(ids) != 1 for group in words for ids in group):
            raise ValueError("every word of an answer must be one token of the tokenizer's")
        ids = [torch.tensor(group, device=self.device)[:, 0] for group in words]
        self.names, self.parts, self.begin = ids[: len(NAMES)], ids[len(NAMES) : -1], ids[-1]
        self.written = {encode(word)[0]: word for part in PARTS for word in part}
        # The mean of a group says nothing about its words.
        embeddings = model.get_input_embeddings().weight.detach().float()
        self.common = embeddings.mean(0)
        self.embedded = [embeddings[group] - embeddings[group].mean(0) for group in self.names]

    @torch.no_grad()
    def features(self, packed: Packed) -> Tensor:
        """(B, N, width) of the tower, which the projector reads."""
        layer = self.llava.config.vision_feature_layer
        pixels = packed.pixels.to(self.dtype)
        return self.llava.model.vision_tower(pixels, output_hidden_states=True).hidden_states[layer][:, 1:]

    def projected(self, features: Tensor) -> Tensor:
        with self.autocast():
            return self.llava.model.multi_modal_projector(features)

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def naming_loss(self, features: Tensor, names: Tensor) -> tuple[Tensor, list[float]]:
        """Loss of the first phase, and the share of each group's words that are nearest at the objects' tokens."""
        apart, here = self.projected(features).float() - self.common, names[..., 0] >= 0
        loss, right = apart[~here].square().mean(), []
        for group, words in enumerate(self.embedded):
            likely = (SHARPNESS * apart[here] @ words.T).log_softmax(-1)
            told = names[here][:, group]
            loss = loss + nearly(likely, told, NEAR if group >= FIRST_ORDERED else None).mean()
            right.append((likely.argmax(-1) == told).float().mean().item())
        return loss, right

    def logits(self, features: Tensor, packed: Packed) -> Tensor:
        """(Q, 4, V) float32: of the answers' tokens, each after the right ones before it."""
        with self.autocast():
            embeds = self.llava.get_input_embeddings()(packed.text)
            hidden = self.decoded(torch.cat([self.images(features, packed), embeds], 1), packed).last_hidden_state
            hidden = hidden[:, -packed.text.shape[1] :].flatten(0, 1)[packed.sources.flatten()]
            return self.llava.lm_head(hidden).float().unflatten(0, packed.sources.shape)

    def images(self, features: Tensor, packed: Packed) -> Tensor:
        """(B, 1 + K, d): the embeddings that stand before the text."""
        rows = torch.arange(len(features), device=self.device)[:, None]
        images = self.projected(features[rows, packed.kept]).to(self.dtype)
        begin = self.llava.get_input_embeddings()(self.begin)
        return torch.cat([begin.expand(len(images), 1, -1), images], 1)

    def decoded(self, embeds: Tensor, packed: Packed, cache=None):
        """The decoder's output for a whole prompt, or for its beginning, or for its text behind a cached beginning."""
        count = 1 + packed.kept.shape[1]
        start = 0 if cache is None else cache.get_seq_length()
        end = start + embeds.shape[1]
        seen = torch.ones(count, packed.mask.shape[-1], dtype=torch.bool, device=self.device).tril()
        seen = torch.cat([seen.expand(len(embeds), -1, -1), packed.mask], 1)[:, None, start:end, :end]
        mask = torch.zeros(seen.shape, dtype=self.dtype, device=self.device)
        mask = mask.masked_fill(~seen, torch.finfo(self.dtype).min)
        positions = torch.cat([torch.zeros_like(packed.kept[:, :1]), 1 + packed.kept, packed.positions], 1)
        return self.llava.model.language_model(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=positions[:, start:end],
            cache=cache,
            use_cache=cache is not None,
        )

    @torch.no_grad()
    def answers(self, packed: Packed) -> list[str]:
        """The greedy answer to each question; the image is read once, and the text again for each token."""
        from transformers import DynamicCache

        cache = DynamicCache()
        with self.autocast():
            self.decoded(self.images(self.features(packed), packed), packed, cache)
        text, given = packed.text.clone().flatten(), []
        for place in range(packed.sources.shape[1]):
            with self.autocast():
                embeds = self.llava.get_input_embeddings()(text.view_as(packed.text))
                hidden = self.decoded(embeds, packed, cache).last_hidden_state.flatten(0, 1)
                given.append(self.llava.lm_head(hidden[packed.sources[:, place]]).argmax(-1))
            cache.crop(-packed.text.shape[1])
            if place + 1 < packed.sources.shape[1]:
                text[packed.sources[:, place + 1]] = given[-1]
        return ["".join(self.written.get(number, "?") for number in row) for row in torch.stack(given, 1).tolist()]


def nearly(likely: Tensor, right: Tensor, deviation: float | None) -> Tensor:
    """(Q,): cross entropy, where words near the right one are right to some degree.

    Args:
        likely: (Q, W) log probabilities.
        right: (Q,), which word is right.
        deviation: in words; None if the words have no order.
    """
    if deviation is None:
        return -likely.gather(1, right[:, None])[:, 0]
    steps = torch.arange(likely.shape[1], device=likely.device) - right[:, None]
    near = torch.exp(-(steps**2) / (2 * deviation**2))
    return -(near / near.sum(-1, keepdim=True) * likely).sum(-1)


def answer_loss(logits: Tensor, parts: Sequence[Tensor], answers: Tensor) -> Tensor:
    """(Q, 4): cross entropy of answers' tokens over the whole vocabulary; near ones are right to some degree.

    Args:
        logits: (Q, 4, V) float32.
        parts: ids of the tokens that may stand at each of the four places.
        answers: (Q, 4), which of them are right.
    """
    likely = logits.log_softmax(-1)
    losses = [nearly(likely[:, place, ids], answers[:, place], NEAR) for place, ids in enumerate(parts)]
    return torch.stack(losses, 1)


def score(scene: Scene, target: Object, answer: str) -> dict[str, float]:
    """Measures of the answer to the question for an object of a scene.

    Returns:
        `iou` with that object; `acc@0.5`, whether it is a half or more; `any`, whether it is so with any object.
    """
    box = read_box(answer)
    shared = [0.0 if box is None else overlap(box, each.box) for each in scene.objects]
    iou = shared[scene.objects.index(target)]
    return {"iou": iou, "acc@0.5": float(iou >= 0.5), "any": float(max(shared) >= 0.5)}


def evaluate(trainee: Trainee, count: int, seed: int = HELD_OUT_SEED, size: int = 4) -> dict[str, list[float]]:
    """Measures of the answers to all questions about held-out scenes."""
    found: dict[str, list[float]] = {}
    for first in range(0, count, size):
        held_out = [held_out_scene(seed, number) for number in range(first, min(first + size, count))]
        packed = pack(held_out, trainee.encode, trainee.side, trainee.grid).to(trainee.device)
        given = iter(trainee.answers(packed))
        for scene in held_out:
            for target in scene.objects:
                for name, value in score(scene, target, next(given)).items():
                    found.setdefault(name, []).append(value)
    return found


def rate(step: int) -> float:
    """Share of the peak: it rises, stays, and falls with the root of the steps."""
    return min((step + 1) / WARM_UP, 1.0, math.sqrt(LEVEL / (step + 1)))


def rounded(value: Any) -> Any:
    """The value of a log's entry, its numbers rounded."""
    if isinstance(value, float):
        return round(value, 4)
    return [rounded(each) for each in value] if isinstance(value, Sequence) and not isinstance(value, str) else value


class Run:
    """A training run, whose state and log are kept in a folder.

    Args:
        trainee: the model.
        work: the folder, made if it is missing.
        resume: whether to go on where the folder's state is; else it is begun anew.

    Raises:
        ValueError: the folder holds a run with other options.
    """

    def __init__(self, trainee: Trainee, work: Path, *, resume: bool = True):
        self.trainee, self.work, self.state = trainee, work, work / STATE
        work.mkdir(parents=True, exist_ok=True)
        if not resume:
            self.state.unlink(missing_ok=True)
            (work / LOG).unlink(missing_ok=True)
        self.log = Log(work / LOG)
        lora = [each for name, each in trainee.trained.items() if "lora_" in name]
        projector = [each for name, each in trainee.trained.items() if "lora_" not in name]
        self.naming = torch.optim.Adam([{"params": projector, "peak": NAMING_RATE}], betas=(0.9, 0.98))
        groups = [{"params": lora, "peak": RATES["lora"]}, {"params": projector, "peak": RATES["projector"]}]
        self.answering = torch.optim.Adam(groups, betas=(0.9, 0.98))
        self.now = {"step": 0, "images": 0, "seconds": 0.0, "loss": 0.0}
        self.now |= {"objects": trainee.options.objects, "near": 0.0, "since": 0}
        if self.state.exists():
            self._load()
        if not self.log.lines:
            self.log(event="start", **asdict(trainee.options), **machine_of(trainee.llava, trainee.device))

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self.naming if self.now["step"] < self.trainee.options.naming else self.answering

    def keep(self) -> None:
        """Write the state: the trained weights, the optimizer's moments and the counts, in one file."""
        tensors = dict(self.trainee.trained)
        for name, parameter in self.trainee.trained.items():
            for moment, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"{moment} {name}"] = value
        tensors = {name: each.detach().contiguous() for name, each in tensors.items()}
        told = {"options": asdict(self.trainee.options), "now": self.now, "lines": self.log.lines}
        temporary = self.state.with_suffix(".tmp")
        save_file(tensors, temporary, {"run": json.dumps(told)})
        os.replace(temporary, self.state)

    def _load(self) -> None:
        with safe_open(self.state, "pt") as file:
            told = json.loads(file.metadata()["run"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if told["options"] != asdict(self.trainee.options):
            raise ValueError(
                f"{self.work} must hold a run with the options {asdict(self.trainee.options)}, got {told['options']}; "
                "--no-resume begins anew"
            )
        self.now = told["now"]
        with torch.no_grad():
            for name, parameter in self.trainee.trained.items():
                parameter.copy_(tensors[name])
                moments = {key.split()[0]: tensors[key] for key in tensors if key.endswith(f" {name}")}
                if moments:
                    self.optimizer.state[parameter] = {
                        key: value if key == "step" else value.to(parameter.device) for key, value in moments.items()
                    }
        self.log.shorten(told["lines"])

    def draw(self) -> Packed:
        """The scenes of the next step."""
        options, step = self.trainee.options, self.now["step"]
        random = np.random.default_rng([options.seed, step])
        if step < options.naming:
            objects = [MOST_OBJECTS] * NAMING_BATCH
        else:
            count = options.batch * (1 if step % WHOLE == 0 else MORE)
            objects = random.integers(1, self.now["objects"], size=count, endpoint=True)
        drawn = [make_scene(random, int(each)) for each in objects]
        few = step >= options.naming and step % WHOLE > 0
        kept = kept_tokens(drawn, self.trainee.grid, random) if few else None
        return pack(drawn, self.trainee.encode, self.trainee.side, self.trainee.grid, kept).to(self.trainee.device)

    def step(self) -> dict[str, Any]:
        """Train on the next scenes; returns what is logged."""
        started, packed = time.perf_counter(), self.draw()
        features, first = self.trainee.features(packed), self.now["step"] in (0, self.trainee.options.naming)
        told = self._name(features, packed) if self.optimizer is self.naming else self._answer(features, packed)
        self.now["loss"] = told["loss"] if first else 0.9 * self.now["loss"] + 0.1 * told["loss"]
        self.now["step"] += 1
        self.now["images"] += len(packed.pixels)
        self.now["seconds"] += time.perf_counter() - started
        return told

    def _name(self, features: Tensor, packed: Packed) -> dict[str, Any]:
        """A step of the first phase; what is logged is of its first pass, over scenes not seen before."""
        told, share = {}, min(1.0, 2 - 2 * self.now["step"] / self.trainee.options.naming)
        for _ in range(PASSES):
            loss, right = self.trainee.naming_loss(features, packed.names)
            told = told or {"phase": "naming", "loss": loss.item(), "names": right}
            self._update(self.naming, loss, share)
        return told

    def _answer(self, features: Tensor, packed: Packed) -> dict[str, Any]:
        """A step of the second phase."""
        trainee, now = self.trainee, self.now
        logits = trainee.logits(features, packed)
        loss = answer_loss(logits, trainee.parts, packed.answers).mean()
        naming, names = trainee.naming_loss(features, packed.names)
        norm = self._update(self.answering, loss + NAMING_SHARE * naming, rate(now["step"] - trainee.options.naming))
        given = torch.stack([logits[:, place, ids].argmax(-1) for place, ids in enumerate(trainee.parts)], 1)
        near = ((given - packed.answers).abs() <= 1).float().mean(0).tolist()
        told = {"phase": "answering", "loss": loss.item(), "near": near, "objects": now["objects"], "names": names}
        told["tokens"] = packed.kept.shape[1]
        now["near"], now["since"] = 0.95 * now["near"] + 0.05 * (near[0] + near[1]) / 2, now["since"] + 1
        if now["near"] >= ENOUGH and now["since"] >= AT_LEAST and now["objects"] < MOST_OBJECTS:
            now |= {"objects": now["objects"] + 1, "near": 0.0, "since": 0}
        return told | {"norm": norm}

    def _update(self, optimizer: torch.optim.Optimizer, loss: Tensor, share: float) -> float:
        """One update by the gradients of a loss; returns their norm."""
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = share * group["peak"]
        norm = nn.utils.clip_grad_norm_([each for group in optimizer.param_groups for each in group["params"]], 1.0)
        optimizer.step()
        return norm.item()

    def train(self, minutes: float, every: int, count: int, steps: int | None = None) -> None:
        """Train for so many minutes.

        Args:
            minutes: of work.
            every: steps between evaluations.
            count: held-out scenes of each.
            steps: the last step, if not the minutes but these shall end it.
        """
        until = time.monotonic() + 60 * minutes
        with Progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()) as progress:
            task = progress.add_task("", total=None)
            while time.monotonic() < until and (steps is None or self.now["step"] < steps):
                told = self.step()
                step = self.now["step"]
                counts = {"step": step, "images": self.now["images"], "seconds": round(self.now["seconds"])}
                if step % LOGGED == 0:
                    self.log(
                        **counts,
                        **{name: rounded(value) for name, value in told.items()},
                        mean=rounded(self.now["loss"]),
                    )
                progress.update(task, description=f"{told['phase']}, step {step}, loss {self.now['loss']:.3f}")
                if step > self.trainee.options.naming and step % every == 0:
                    self.evaluate(counts, count)
                if step % KEPT == 0 or step == self.trainee.options.naming:
                    self.keep()
        self.keep()

    def evaluate(self, counts: dict[str, int], count: int) -> None:
        """Log the accuracy on held-out scenes."""
        found = evaluate(self.trainee, count)
        means = {name: rounded(interval(values)) for name, values in found.items()}
        self.log(event="held out", **counts, scenes=count, questions=len(found["iou"]), **means)


def load(folder: Path, device: torch.device, dtype: torch.dtype) -> tuple[nn.Module, Encode]:
    """The checkpoint that the conversion wrote, and its tokenizer's encoding.

    Raises:
        FileNotFoundError: it is not there.
    """
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    if not (folder / CHECKED).exists():
        raise FileNotFoundError(f"{folder} must hold the converted checkpoint: make pretrained")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype).to(device)
    return model, lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]


ADAPTER = "adapter_model.safetensors"


def begin_with(trainee: Trainee, folder: Path) -> None:
    """Take the weights of an adapter that `save` wrote.

    Raises:
        ValueError: it is of another rank.
    """
    from peft import PeftConfig, set_peft_model_state_dict

    rank = PeftConfig.from_pretrained(folder).r
    if rank != trainee.options.rank:
        raise ValueError(f"rank must be that of {folder}, {rank}, got {trainee.options.rank}")
    found = set_peft_model_state_dict(trainee.adapted, load_file(folder / ADAPTER))
    assert not found.unexpected_keys, found.unexpected_keys


def save(trainee: Trainee, folder: Path) -> None:
    """Write LoRA and the projector in bfloat16, as peft reads them."""
    from peft import get_peft_model_state_dict

    folder.mkdir(parents=True, exist_ok=True)
    weights = get_peft_model_state_dict(trainee.adapted)
    weights = {name: each.to(torch.bfloat16).contiguous() for name, each in weights.items()}
    save_file(weights, folder / ADAPTER, {"format": "pt"})
    config = trainee.adapted.peft_config["default"]
    config.base_model_name_or_path = "build/pretrained"
    config.save_pretrained(folder)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = Options()
    parser.add_argument("--model", type=Path, default=FOLDER, help="folder that bench.pretrained.convert wrote")
    parser.add_argument("--work", type=Path, default=WORK, help="folder of the state and the log")
    parser.add_argument(
        "--resume", action=argparse.BooleanOptionalAction, default=True, help="go on where the state is"
    )
    parser.add_argument("--begin", type=Path, help="folder of an adapter to begin a run with, in place of --naming")
    parser.add_argument("--output", type=Path, default=WORK, help="folder to write the adapter to, for peft")
    parser.add_argument("--minutes", type=float, default=30, help="minutes of training, evaluations included")
    parser.add_argument("--every", type=int, default=75, help="steps between evaluations on held-out scenes")
    parser.add_argument("--scenes", type=int, default=32, help="held-out scenes of an evaluation")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to train")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of what is not trained")
    parser.add_argument("--seed", type=int, default=default.seed, help="of the scenes and of LoRA")
    parser.add_argument("--batch", type=int, default=default.batch, help="scenes of a step with whole images")
    parser.add_argument("--rank", type=int, default=default.rank, help="of LoRA")
    parser.add_argument("--naming", type=int, default=default.naming, help="steps of the projector alone")
    parser.add_argument("--objects", type=int, default=default.objects, help="in a scene at most, to begin with")
    args = parser.parse_args()
    if not args.minutes > 0:
        parser.error(f"--minutes must be above 0, got {args.minutes}")
    if min(args.every, args.scenes) < 1:
        parser.error(f"--every and --scenes must be at least 1, got {args.every} and {args.scenes}")
    try:
        naming = 0 if args.begin else args.naming
        options = Options(args.seed, args.batch, args.rank, naming, args.objects)
    except ValueError as error:
        parser.error(str(error))
    model, encode = load(args.model, torch.device(args.device), getattr(torch, args.dtype))
    trainee = Trainee(model, encode, SIDE, options)
    if args.begin:
        begin_with(trainee, args.begin)
    run = Run(trainee, args.work, resume=args.resume)
    run.train(args.minutes, args.every, args.scenes)
    save(trainee, args.output)


if __name__ == "__main__":
    main()
