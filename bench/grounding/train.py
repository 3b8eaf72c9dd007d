"""Train the tiny grounding model from scratch.

    python -m bench.grounding.train [--work FOLDER] [--device cuda]

Two phases, as with large models. First the vision tower alone learns to see: every patch names the object on it and
its box, and the class token tells which objects are in the scene. Then all of the model learns to answer questions,
from scenes with one object to scenes with eight: one more whenever most boxes in the present scenes are found. Scenes,
questions and dropped layers depend on the seed and the step alone, so an interrupted run goes on from its last state.

Stochastic depth: while the whole model trains, each decoder layer is left out of a step with some probability. It falls
from 0.95 in the first layer to 0.1 from the middle on, and to 0.25 once half of the steps are done. It stands in for
two properties of large pretrained decoders that a model as small as this one lacks otherwise. They survive layers that
are skipped, and they look at the subject of a question later than in their first layers. Trained without it, this model
looks there at once.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import Progress, TimeRemainingColumn
from torch import Tensor, nn

from bench.grounding.llava_folder import BOS
from reroute_kernels.boxes import overlap

from . import scenes
from .batches import PREFIX, Batch, choose_questions, make_batch
from .checkpoint import CONFIG, FOLDER, TOKEN_ID, make_model, save
from .metrics import measures, score
from .scenes import COLOURS, COORDINATES, KINDS, MOST_OBJECTS, SHAPES, SIDES, make_scene

WORK = Path("build/grounding")
SEED = 20261120
HELD_OUT_SEED = 7

VISION_STEPS, VISION_BATCH = 1000, 64
STEPS, BATCH = 5000, 32
QUESTIONS = {"box": 6, "neighbour": 2, "corner": 1, "count": 1, "light": 1}
EVALUATED = 128
EARLY, LATE, LATER = 0.95, 0.1, 0.25
"""Probability that a step leaves out the first decoder layer; that it leaves out each layer from the middle on, in the
first half of the steps; and in the second half."""
ENOUGH, AT_LEAST = 0.7, 25
"""One more object comes into the scenes if this share of coordinates is within two steps of the truth, and at least
this many training steps have passed."""

FIRST_COORDINATE = TOKEN_ID[COORDINATES[0]]
BOX, COUNT_OF_NAMES = KINDS.index("box"), len(SIDES) * len(COLOURS) * len(SHAPES)


class Sight(nn.Module):
    """Heads for training the vision tower, which read objects off its patches and its class token."""

    def __init__(self, width: int):
        super().__init__()
        self.patch = nn.Linear(width, 1 + len(SIDES) + len(COLOURS) + len(SHAPES) + 4)
        self.scene = nn.Linear(width, COUNT_OF_NAMES + 1)

    def loss(self, hidden: Tensor, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """Loss on the tower's hidden states `[B, 145, width]`, and how well objects are seen."""
        here = batch.objects >= 0
        seen, *names, boxes = self.patch(hidden[:, 1:]).float().split([1, len(SIDES), len(COLOURS), len(SHAPES), 4], -1)
        loss = F.binary_cross_entropy_with_logits(seen[..., 0], here.float())
        rows, places = here.nonzero(as_tuple=True)
        numbers = batch.objects[rows, places]
        right = torch.ones(len(rows), dtype=torch.bool, device=here.device)
        for which, logits in enumerate(names):
            labels = batch.labels[rows, numbers, which]
            loss = loss + F.cross_entropy(logits[rows, places], labels)
            right &= logits[rows, places].argmax(-1) == labels
        loss = loss + 5 * F.l1_loss(boxes[rows, places].sigmoid(), batch.boxes[rows, numbers])
        present = torch.zeros(len(here), COUNT_OF_NAMES + 1, device=here.device)
        size, colour, shape = batch.labels.unbind(-1)
        names_there = (size * len(COLOURS) + colour) * len(SHAPES) + shape
        there = (size >= 0).nonzero(as_tuple=True)
        present[there[0], names_there[there]] = 1
        present[:, -1] = batch.night.float()
        loss = loss + F.binary_cross_entropy_with_logits(self.scene(hidden[:, 0]).float(), present) * 5
        seen_boxes, true_boxes = boxes[rows, places].sigmoid().tolist(), batch.boxes[rows, numbers].tolist()
        found = [overlap(*pair) >= 0.5 for pair in zip(seen_boxes, true_boxes, strict=True)]
        return loss, {"names": right.float().mean().item(), "boxes": sum(found) / len(found)}


def answer_loss(logits: Tensor, batch: Batch) -> Tensor:
    """Cross entropy of the answers' tokens; a coordinate's neighbours are right to some degree."""
    targets = F.one_hot(batch.answers, logits.shape[-1]).float()
    coordinates = torch.arange(len(COORDINATES), device=logits.device)
    place = batch.answers - FIRST_COORDINATE
    is_coordinate = (place >= 0) & (place < len(COORDINATES))
    near = torch.exp(-((coordinates - place[is_coordinate, None]) ** 2) / (2 * 0.75**2))
    spread = torch.zeros_like(targets[is_coordinate])
    spread[:, FIRST_COORDINATE : FIRST_COORDINATE + len(COORDINATES)] = near / near.sum(-1, keepdim=True)
    targets[is_coordinate] = spread
    return -(targets * logits.log_softmax(-1)).sum(-1)


class Trainee:
    """The model with the heads that train its vision tower."""

    def __init__(self, seed: int, device: torch.device, compiled: bool):
        self.device = device
        self.model = make_model(seed).to(device).train()
        self.model.set_attn_implementation("eager")
        self.sight = Sight(CONFIG["vision_config"]["hidden_size"]).to(device)
        self.layers = list(self.model.model.language_model.layers)
        if compiled:
            for module in (*self.layers, *self.tower.encoder.layers):
                module.compile()

    @property
    def tower(self) -> nn.Module:
        tower = self.model.model.vision_tower
        return getattr(tower, "vision_model", tower)

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16)

    def see(self, batch: Batch) -> Tensor:
        return self.tower(batch.pixels, output_hidden_states=True).hidden_states[CONFIG["vision_feature_layer"]]

    def answer(self, hidden: Tensor, batch: Batch, kept: list[int] | None = None) -> Tensor:
        """Logits of the answers' tokens, `[P, V]`, by the layers that are kept (all without `kept`)."""
        decoder = self.model.model.language_model
        images = self.model.model.multi_modal_projector(hidden[:, 1:])
        begin = decoder.embed_tokens(torch.full_like(batch.text[:, :1], TOKEN_ID[BOS]))
        embeds = torch.cat([begin, images.to(begin.dtype), decoder.embed_tokens(batch.text)], 1)
        mask = torch.zeros(batch.mask.shape, device=self.device).masked_fill(
            ~batch.mask, torch.finfo(torch.float32).min
        )
        decoder.layers = nn.ModuleList(self.layers if kept is None else [self.layers[layer] for layer in kept])
        try:
            states = decoder(
                inputs_embeds=embeds, attention_mask=mask, position_ids=batch.positions, use_cache=False
            ).last_hidden_state
        finally:
            decoder.layers = nn.ModuleList(self.layers)
        return self.model.lm_head(states[batch.sources]).float()

    @torch.no_grad()
    def evaluate(self, count: int) -> dict[str, float]:
        """Share of boxes found and of other answers right in held-out scenes, by greedy decoding."""
        self.model.eval()
        hits: dict[str, list[float]] = {kind: [] for kind in KINDS}
        for first in range(0, count, BATCH):
            held_out = [scenes.held_out_scene(HELD_OUT_SEED, number) for number in range(first, first + BATCH)]
            random = np.random.default_rng([HELD_OUT_SEED, first])
            asked = [choose_questions(scene, random, QUESTIONS) for scene in held_out]
            batch = to_device(make_batch(held_out, asked), self.device)
            rows, places = batch.sources
            # An answer's token is written at the place from which the next one is predicted, so each pass gets one
            # token further.
            last = torch.ones_like(rows, dtype=torch.bool)
            last[:-1] = (rows[1:] != rows[:-1]) | (places[1:] != places[:-1] + 1)
            for _ in range(4):
                with self.autocast():
                    given = self.answer(self.see(batch), batch).argmax(-1)
                batch.text[rows[~last], places[~last] + 1 - PREFIX] = given[~last]
            words = [list(TOKEN_ID)[token] for token in given.tolist()]
            for question in (question for each in asked for question in each):
                length = len(question.answer.split())
                said, words = " ".join(words[:length]), words[length + 1 :]
                hits[question.kind].append(score(question, said)[measures(question.kind)[0]])
        self.model.train()
        return {kind: sum(values) / len(values) for kind, values in hits.items() if values}


def to_device(batch: Batch, device: torch.device) -> Batch:
    def move(value):
        return tuple(map(move, value)) if isinstance(value, tuple) else value.to(device)

    return Batch(**{name: move(value) for name, value in vars(batch).items()})


def dropping(step: int, steps: int, layers: int) -> list[float]:
    """Probability that a step leaves out each layer: it falls linearly up to the middle."""
    late = LATE if step < steps // 2 else LATER
    return [max(late, EARLY + (late - EARLY) * layer / (layers / 2)) for layer in range(layers)]


def learning_rate(step: int, steps: int, warmup: int = 100) -> float:
    """Share of the peak: a linear rise, then half a cosine."""
    return min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / steps)))


def machine_of(model: nn.Module, device: torch.device) -> dict[str, object]:
    """Size of the model and the machine, for the log."""
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "device": device.type if device.type == "cpu" else torch.cuda.get_device_name(device),
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "torch": torch.__version__,
    }


class Log:
    """The training log, a line of JSON for each entry."""

    def __init__(self, file: Path):
        self.file = file
        self.lines = sum(1 for _ in file.open()) if file.exists() else 0

    def shorten(self, lines: int) -> None:
        """Cut the log back to the lines that it had when the state was kept."""
        kept = [line for line in self.file.read_text().splitlines() if json.loads(line).get("at", 0) <= lines]
        self.file.write_text("".join(line + "\n" for line in kept))
        self.lines = len(kept)

    def __call__(self, **values: object) -> None:
        self.lines += 1
        with self.file.open("a") as file:
            file.write(json.dumps({"at": self.lines, **values}) + "\n")


def step_of(trainee: Trainee, phase: str, batch: Batch, seed: int, step: int, total: int, now: dict) -> dict:
    """Forward and backward of one step; returns its measurements."""
    if phase == "vision":
        return vision_step(trainee, batch)
    drop = dropping(step, total, len(trainee.layers))
    random = np.random.default_rng([seed, len(DRAW), step])
    kept = [layer for layer in range(len(trainee.layers)) if random.random() >= drop[layer]]
    return language_step(trainee, batch, kept, now)


def phases_left(phase: str, vision_steps: int, steps: int) -> list[tuple[str, int]]:
    """The phase that runs and those after it, with their steps."""
    phases = [("vision", vision_steps), ("language", steps)]
    return phases[["vision", "language", "done"].index(phase) :]


def parameters_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def set_learning_rate(optimizer: torch.optim.Optimizer, share: float) -> None:
    """Set the rates to a share of their peaks."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * share


def optimizers_of(trainee: Trainee) -> dict[str, torch.optim.Optimizer]:
    """The optimizer of each phase."""
    seeing = [*trainee.tower.parameters(), *trainee.sight.parameters()]
    ids = {id(parameter) for parameter in seeing}
    talking = [parameter for parameter in trainee.model.parameters() if id(parameter) not in ids]
    adamw = partial(torch.optim.AdamW, weight_decay=0.05, betas=(0.9, 0.98), fused=True)
    return {
        "vision": adamw([{"params": seeing, "peak": 1e-3}]),
        "language": adamw([{"params": talking, "peak": 1e-3}, {"params": seeing, "peak": 3e-4}]),
    }


def train(
    work: Path, device: torch.device, seed: int, vision_steps: int, steps: int, *, compiled: bool = True
) -> Trainee:
    """Train, or go on training, and keep the state and the log in a folder."""
    work.mkdir(parents=True, exist_ok=True)
    state_file, log = work / "state.pt", Log(work / "training.jsonl")
    trainee = Trainee(seed, device, compiled)
    model, sight = trainee.model, trainee.sight
    optimizers = optimizers_of(trainee)
    # `drawn` is the value of `objects` when the scenes of the next step were drawn, one step ahead.
    now = {"phase": "vision", "step": 0, "objects": 1, "drawn": 1, "running": 0.0, "since": 0, "seconds": 0.0}
    if state_file.exists():
        state = torch.load(state_file, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        sight.load_state_dict(state["sight"])
        for name, optimizer in optimizers.items():
            optimizer.load_state_dict(state[name])
        now = state["progress"]
        log.shorten(state["lines"])

    def keep():
        temporary = state_file.with_suffix(".tmp")
        state = {"model": model.state_dict(), "sight": sight.state_dict(), "progress": now, "lines": log.lines}
        state |= {name: optimizer.state_dict() for name, optimizer in optimizers.items()}
        torch.save(state, temporary)
        os.replace(temporary, state_file)

    if not log.lines:
        log(event="start", seed=seed, vision_steps=vision_steps, steps=steps, **machine_of(model, device))
    columns = (*Progress.get_default_columns()[:-1], TimeRemainingColumn(), "{task.fields[note]}")
    with Progress(*columns) as progress, ThreadPoolExecutor(1) as ahead:
        for phase, total in phases_left(str(now["phase"]), vision_steps, steps):
            task = progress.add_task(phase, total=total, completed=now["step"], note="")
            optimizer, draw = optimizers[phase], DRAW[phase]
            batch = ahead.submit(draw, seed, now["step"], now["drawn"])
            for step in range(now["step"], total):
                started = time.perf_counter()
                here = to_device(batch.result(), device)
                now["drawn"] = now["objects"]
                batch = ahead.submit(draw, seed, step + 1, now["drawn"])
                set_learning_rate(optimizer, learning_rate(step, total))
                optimizer.zero_grad()
                measured = step_of(trainee, phase, here, seed, step, total, now)
                norm = nn.utils.clip_grad_norm_(parameters_of(optimizer), 1.0)
                optimizer.step()
                now["step"], now["seconds"] = step + 1, now["seconds"] + time.perf_counter() - started
                progress.update(task, advance=1, note=" ".join(f"{k} {v:.3f}" for k, v in list(measured.items())[:3]))
                if (step + 1) % 50 == 0:
                    values = {name: round(value, 4) for name, value in measured.items() if np.isfinite(value)}
                    log(phase=phase, step=step + 1, seconds=round(now["seconds"]), norm=round(norm.item(), 3), **values)
                is_last = step + 1 == total
                if phase == "language" and (is_last or (step + 1) % 500 == 0):
                    found = {kind: round(share, 4) for kind, share in trainee.evaluate(EVALUATED).items()}
                    log(event="held out", phase=phase, step=step + 1, scenes=EVALUATED, **found)
                if is_last or (step + 1) % 200 == 0:
                    keep()
            now |= {"phase": "language" if phase == "vision" else "done", "step": 0}
            keep()
    return trainee


def draw_vision(seed: int, step: int, objects: int) -> Batch:
    """The scenes of a step of the first phase."""
    random = np.random.default_rng([seed, 0, step])
    drawn = [make_scene(random, int(random.integers(1, MOST_OBJECTS, endpoint=True))) for _ in range(VISION_BATCH)]
    return make_batch(drawn, [[] for _ in drawn])


def draw_language(seed: int, step: int, objects: int) -> Batch:
    """The scenes of a step of the second phase, with at most `objects` objects, and questions about them."""
    random = np.random.default_rng([seed, 1, step])
    drawn = [make_scene(random, int(random.integers(1, objects, endpoint=True))) for _ in range(BATCH)]
    return make_batch(drawn, [choose_questions(scene, random, QUESTIONS) for scene in drawn])


DRAW = {"vision": draw_vision, "language": draw_language}


def vision_step(trainee: Trainee, batch: Batch) -> dict[str, float]:
    with trainee.autocast():
        loss, seen = trainee.sight.loss(trainee.see(batch), batch)
    loss.backward()
    return {"loss": loss.item(), **seen}


def language_step(trainee: Trainee, batch: Batch, kept: list[int], now: dict) -> dict[str, float]:
    with trainee.autocast():
        hidden = trainee.see(batch)
        seeing, _ = trainee.sight.loss(hidden, batch)
        logits = trainee.answer(hidden, batch, kept)
    losses = answer_loss(logits, batch)
    (losses.mean() + 0.1 * seeing).backward()

    by_kind = {kind: losses[batch.kinds == number].mean().item() for number, kind in enumerate(KINDS)}
    asked = (batch.kinds == BOX) & (batch.answers >= FIRST_COORDINATE)
    near = ((logits.argmax(-1) - batch.answers).abs() <= 2)[asked].float().mean().item()
    now["running"] = 0.95 * now["running"] + 0.05 * near
    now["since"] += 1
    if now["running"] >= ENOUGH and now["since"] >= AT_LEAST and now["objects"] < MOST_OBJECTS:
        now |= {"objects": now["objects"] + 1, "running": 0.0, "since": 0}
    return {"loss": losses.mean().item(), "near": near, "objects": now["objects"], "kept": len(kept), **by_kind}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=WORK, help="folder of the state and the log; goes on where it is")
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder to write the checkpoint to")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to train")
    parser.add_argument("--seed", type=int, default=SEED, help="seed of weights, scenes and dropped layers")
    parser.add_argument("--vision-steps", type=int, default=VISION_STEPS, help="steps of the vision tower alone")
    parser.add_argument("--steps", type=int, default=STEPS, help="steps of the whole model")
    args = parser.parse_args()
    trainee = train(args.work, torch.device(args.device), args.seed, args.vision_steps, args.steps)
    save(trainee.model.cpu(), args.output)
    (args.output / "training.jsonl").write_text((args.work / "training.jsonl").read_text())


if __name__ == "__main__":
    main()
