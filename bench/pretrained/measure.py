"""Ask the pretrained decoder about text passages, unrouted and under every policy.

    python -m bench.pretrained.measure [--minutes M] [--output FOLDER]

The passage's token embeddings are handed in as the features of an image, so that its positions are visual tokens. Rows
are kept in build/pretrained as they come: a repeated command goes on behind them, and stops after so many minutes of
work, whatever the figures are. Writes results.json to bench/results/pretrained.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import reroute_kernels as rk
from bench.grounding.resemblance import skipped_layer
from bench.speed.device import description
from reroute_kernels.calibration_run import divergence

from .convert import CHECKED, FOLDER
from .passages import KINDS, TOKENS, Item, encoder_of, make_item
from .runs import FIRST, PLANS, SECOND, UNROUTED, Run, policies

RESULTS = Path(__file__).parents[1] / "results" / "pretrained"
CALIBRATION_SEED = 1
ITEMS = {FIRST.name: 16, SECOND.name: 304}
"""Items of each kind at most, by plan."""
CALIBRATED = 8
"""Items of each kind that calibration measures."""
WITHOUT_LAYERS = 4
"""Items of each kind that are answered without single layers."""
BATCH = 8
DECISIONS = 4
MINUTES, RESEMBLANCE_MINUTES = 29.0, 6.0


class Handed:
    """In place of `get_image_features`: the pixels (B, N, d) are the features."""

    def __call__(self, pixel_values: Tensor, **_settings):
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        return BaseModelOutputWithPooling(pooler_output=list(pixel_values))


class Float32Head(nn.Module):
    """The head of a model in bfloat16, computed in float32, so that near logits do not round to equal ones."""

    def __init__(self, head: nn.Linear):
        super().__init__()
        self.weight = nn.Parameter(head.weight.detach().float(), requires_grad=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return nn.functional.linear(hidden.float(), self.weight)


def load(folder: Path) -> tuple[nn.Module, Any]:
    """The model, with the embeddings of passages in place of its tower, and its tokenizer."""
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    if not (folder / CHECKED).exists():
        raise FileNotFoundError(f"{folder} must hold the converted checkpoint: make pretrained")
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.bfloat16).eval()
    model.lm_head = Float32Head(model.lm_head)
    model.model.get_image_features = Handed()
    return model, AutoTokenizer.from_pretrained(folder)


def inputs_of(model: nn.Module, items: Sequence[Item]) -> dict[str, Tensor]:
    """Arguments of the model for items whose questions are equally long: the passage as an image, then the question."""
    image = model.config.image_token_index
    ids = torch.tensor([[image] * TOKENS + list(item.question) for item in items], device="cpu")
    passages = torch.tensor([item.passage for item in items], device="cpu")
    with torch.no_grad():
        features = model.get_input_embeddings()(passages)
    return {"input_ids": ids, "pixel_values": features, "use_cache": False, "logits_to_keep": 1}


def answers(logits: Tensor, unrouted: Tensor, items: Sequence[Item]) -> dict[str, list[float]]:
    """Measures of a batch, each a list with a value for every item.

    Args:
        logits: (B, V) float32, of the token after each prompt.
        unrouted: the same without routing.

    Returns:
        `choice`: whether the right candidate has the highest logit of the candidates; `exact`: whether the likeliest
        token is the answer; `divergence`: KL(unrouted || routed) in nats; `same`: whether the likeliest token is that
        of the unrouted model.
    """
    before, after = (each.double().log_softmax(-1) for each in (unrouted, logits))
    best, best_before = logits.argmax(-1).tolist(), unrouted.argmax(-1).tolist()
    chosen = [
        item.candidates[int(row[list(item.candidates)].argmax())] for item, row in zip(items, logits, strict=True)
    ]
    return {
        "choice": [float(one == item.answer) for one, item in zip(chosen, items, strict=True)],
        "exact": [float(one == item.answer) for one, item in zip(best, items, strict=True)],
        "divergence": [round(each, 6) for each in divergence(before, after).tolist()],
        "same": [float(one == other) for one, other in zip(best, best_before, strict=True)],
    }


class Rows:
    """Rows of a file of JSON lines, each with a key; one that was cut off by a failure is dropped.

    Args:
        path: of the file, made if it is missing.
        header: tells what is measured; a file of something else is refused.

    Raises:
        ValueError: the file holds another measurement.
    """

    def __init__(self, path: Path, header: dict[str, object]):
        self.path, self.found = path, {}
        text = path.read_text() if path.exists() else ""
        whole = text[: text.rfind("\n") + 1]
        first, *lines = whole.splitlines() or [""]
        if first and json.loads(first) != json.loads(json.dumps(header)):
            raise ValueError(
                f"{path} must hold rows of this measurement, got those of another; delete it to begin anew"
            )
        path.write_text(whole if first else json.dumps(header) + "\n")
        for line in lines:
            row = json.loads(line)
            self.found[row.pop("key")] = row

    def add(self, key: str, row: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"key": key, **row}) + "\n")
        self.found[key] = row


def batches(count: int) -> Iterator[tuple[str, range]]:
    """Kinds and numbers of items, batch by batch, the kinds in turn, so that a run that stops has as many of each."""
    for first in range(0, count, BATCH):
        for kind in KINDS:
            yield kind, range(first, min(first + BATCH, count))


@torch.no_grad()
def ask(model: nn.Module, policy: rk.Policy | None, inputs: dict[str, Tensor]) -> Tensor:
    """(B, V) float32 logits of the token after each prompt."""
    if policy is None:
        return model(**inputs).logits[:, -1]
    with rk.apply(model, policy):
        return model(**inputs).logits[:, -1]


@torch.no_grad()
def places_by_layer(model: nn.Module, items: Sequence[Item], inputs: dict[str, Tensor]) -> dict[str, list]:
    """Where the evidence stands in the ranking of every layer of the unrouted model.

    Returns:
        `rank`: for each item and layer the mean percentile of the answer's tokens, 1 for the highest score; by chance a
        half. `coverage`: the share of the tokens of the sentence that tells it among the best quarter.
    """
    layers = model.config.get_text_config().num_hidden_layers
    with rk.apply(model, rk.Policy([rk.Stage(layer, 1.0) for layer in range(layers)])) as routing:
        model(**inputs)
        scores = [torch.stack(list(stage.scores)) for stage in routing.trace.stages]
    rank, coverage = [[] for _ in items], [[] for _ in items]
    for of_layer in scores:
        order = of_layer.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        for row, item in enumerate(items):
            rank[row].append(round(1 - order[row, list(item.evidence)].double().mean().item() / (TOKENS - 1), 4))
            looked = (order[row, list(item.sentence)] < TOKENS // 4).double().mean().item()
            coverage[row].append(round(looked, 4))
    return {"rank": rank, "coverage": coverage}


def calibrated_layers(model: nn.Module, encode, folder: Path) -> rk.Calibration:
    """Qualities of the layers, without labels, on items of their own."""
    samples = []
    for kind, numbers in batches(CALIBRATED):
        items = [make_item(kind, number, CALIBRATION_SEED, encode) for number in numbers]
        inputs = inputs_of(model, items)
        samples.append({name: inputs[name] for name in ("input_ids", "pixel_values")})
    return rk.measure_layers(model, samples, resume=folder / "calibration.jsonl", progress=False)


def measure(
    model: nn.Module, encode, rows: Rows, of_runs: dict[Run, rk.Policy | None], seed: int, count: int, until: float
) -> None:
    """Ask about items under every policy, batch by batch, until a time."""
    for kind, numbers in batches(count):
        items = [make_item(kind, number, seed, encode) for number in numbers]
        inputs, key = inputs_of(model, items), f"{kind} {numbers.start}"
        missing = [run for run in of_runs if f"{key} {run.name}" not in rows.found]
        if not missing and f"{key} places" in rows.found:
            continue
        if time.monotonic() > until:
            return
        unrouted = ask(model, None, inputs)
        for run in missing:
            logits = unrouted if run == UNROUTED else ask(model, of_runs[run], inputs)
            rows.add(f"{key} {run.name}", {"kind": kind, "run": list(run), **answers(logits, unrouted, items)})
        if f"{key} places" not in rows.found:
            rows.add(f"{key} places", {"kind": kind, **places_by_layer(model, items, inputs)})


def measure_without_layers(model: nn.Module, encode, rows: Rows, until: float) -> None:
    """Ask without the contribution of single layers, until a time."""
    decoder = model.model.language_model
    for kind, numbers in batches(WITHOUT_LAYERS):
        items = [make_item(kind, number, SECOND.seed, encode) for number in numbers]
        inputs, unrouted = inputs_of(model, items), None
        for layer in range(len(decoder.layers)):
            key = f"{kind} {numbers.start} without {layer}"
            if key in rows.found:
                continue
            if time.monotonic() > until:
                return
            unrouted = ask(model, None, inputs) if unrouted is None else unrouted
            with skipped_layer(decoder.layers[layer]):
                logits = ask(model, None, inputs)
            rows.add(key, {"kind": kind, "without": layer, **answers(logits, unrouted, items)})


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=FOLDER, help="folder that bench.pretrained.convert wrote")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="minutes of work; the results are those so far")
    args = parser.parse_args()

    until = time.monotonic() + 60 * args.minutes
    model, tokenizer = load(args.model)
    encode = encoder_of(tokenizer)
    calibration = calibrated_layers(model, encode, args.model)
    layers = calibration.best_layers(DECISIONS)
    rows: dict[str, Rows] = {}
    for plan in PLANS:
        of_runs = policies(model.config, layers, plan)
        header = {"seed": plan.seed, "tokens": TOKENS, "runs": {run.name: repr(each) for run, each in of_runs.items()}}
        rows[plan.name] = Rows(args.model / f"rows-{plan.name}.jsonl", header)
        measure(model, encode, rows[plan.name], of_runs, plan.seed, ITEMS[plan.name], until)
    measure_without_layers(model, encode, rows[SECOND.name], until + 60 * RESEMBLANCE_MINUTES)

    from .summary import resemblance, summarize

    found = {plan.name: rows[plan.name].found for plan in PLANS}
    results = {
        "measured_on": description(torch.device("cpu")) | {"threads": torch.get_num_threads(), "dtype": "bfloat16"},
        "command": f"python -m bench.pretrained.measure --minutes {args.minutes:g}",
        "conversion": json.loads((args.model / CHECKED).read_text()),
        "calibration": calibration.to_dict() | {"model": "build/pretrained"},
        "calibrated layers": list(layers),
        "plans": {
            plan.name: summarize(found[plan.name], policies(model.config, layers, plan), model.config) for plan in PLANS
        },
        "resemblance": resemblance({f"{name} {key}": row for name in found for key, row in found[name].items()}),
    }
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "results.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
