"""One rank of tests/models/test_tensor_parallel.py: routes a batch on a model whose heads are split, as JSON."""

import json
import os
import sys
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText

import reroute_kernels as rk
from bench.source_tree import make_importable
from tests.models.prompts import ACTIONS, GOLDEN, PROMPTS, batch, policy, selections

STEPS = 8


def prompts(family: str) -> dict[str, torch.Tensor]:
    return batch([PROMPTS[family](2, 5, 12, seed=1), PROMPTS[family](1, 4, 9, seed=2)])


@torch.no_grad()
def run(model, inputs, this) -> dict[str, list]:
    with rk.apply(model, this) as routing:
        logits = model(**inputs).logits[:, -1]
        selected = [selections(routing.trace, row) for row in range(len(logits))]
        tokens = model.generate(**inputs, max_new_tokens=STEPS, min_new_tokens=STEPS, do_sample=False)
    return {"selected": selected, "logits": logits.tolist(), "tokens": tokens[:, -STEPS:].tolist()}


def main(family: str, folder: str) -> None:
    make_importable()
    hooks, parallel = rk.models.hooks, rk.models.parallel
    model = AutoModelForImageTextToText.from_pretrained(GOLDEN / family, dtype=torch.float32, tp_plan="auto").eval()
    inputs, rank = prompts(family), torch.distributed.get_rank()
    results = {action: run(model, inputs, policy(action)) for action in ACTIONS}

    scores = torch.tensor([[0.0, 1.0, 2.0], [4.0, 3.0, 2.0]])[rank][None]
    results["over_all_heads"] = {
        name: parallel.over_all_heads(parallel.head_group(model), scores, name).tolist() for name in ("mean", "max")
    }

    hooks.over_all_heads = lambda group, scores, reduction: scores
    results["each rank by its own heads"] = run(model, inputs, policy())
    hooks.over_all_heads = parallel.over_all_heads

    model._tp_size = None
    try:
        run(model, inputs, policy())
    except NotImplementedError as error:
        results["without a process group"] = str(error)
    Path(folder, f"{rank}.json").write_text(json.dumps(results))
    torch.distributed.destroy_process_group()
    os._exit(0)  # after gloo the interpreter now and then aborts while it is torn down


if __name__ == "__main__":
    main(*sys.argv[1:])
