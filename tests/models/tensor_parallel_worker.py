"""One rank of two: routes prompts on models whose heads are split, and writes the results as JSON.

`<family> <folder>` runs the prompts of test_tensor_parallel.py on a golden model; `<folder>` alone runs those of
test_ways.py on every checkpoint in it.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText

import reroute_kernels as rk
from bench.source_tree import make_importable
from reroute_kernels.rankings import LastQuery, Mixed, Remembered
from reroute_kernels.reducers import Nuwa
from tests.models.prompts import ACTIONS, GOLDEN, PROMPTS, SCHEDULE, batch, policy, selections

STEPS = 8
REDUCED = rk.Policy(SCHEDULE, reducer=Nuwa(keep=0.6, per_cell=3, distance=0.8, quantile=0.1, keeps_own=False))
RANKINGS = [
    ("reroute", LastQuery(rotary=False, head_reduction="max")),
    ("remove", Mixed(Remembered(LastQuery(head_reduction="max"), decay=0.7), uniform=0.3)),
    ("reroute", Remembered(LastQuery())),
]


def prompts(family: str) -> dict[str, torch.Tensor]:
    return batch([PROMPTS[family](2, 5, 12, seed=1), PROMPTS[family](1, 4, 9, seed=2)])


@torch.no_grad()
def run(model, inputs, this) -> dict[str, list]:
    with rk.apply(model, this) as routing:
        logits = model(**inputs).logits[:, -1]
        selected = [selections(routing.trace, row) for row in range(len(logits))]
        tokens = model.generate(**inputs, max_new_tokens=STEPS, eos_token_id=None, pad_token_id=0, do_sample=False)
    return {"selected": selected, "logits": logits.tolist(), "tokens": tokens[:, -STEPS:].tolist()}


def on_two_ranks(folder: Path, *arguments: str) -> list[dict[str, object]]:
    """Results that two ranks of this file wrote into a folder."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", __name__, *arguments]
    on_cpu = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=os.environ | on_cpu, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def of_one_family(family: str, folder: str) -> dict[str, object]:
    calls, parallel = rk.models.calls, rk.models.tensor_parallel
    model = AutoModelForImageTextToText.from_pretrained(GOLDEN / family, dtype=torch.float32, tp_plan="auto").eval()
    inputs, rank = prompts(family), torch.distributed.get_rank()
    results: dict[str, object] = {action: run(model, inputs, policy(action)) for action in (*ACTIONS, "freeze")}
    results |= {str(ranking): run(model, inputs, rk.Policy(SCHEDULE, action, ranking)) for action, ranking in RANKINGS}

    results["reducer"] = run(model, inputs, REDUCED)

    scores = torch.tensor([[0.0, 1.0, 2.0], [4.0, 3.0, 2.0]])[rank][None]
    results["all_gather_scores"] = {
        name: parallel.all_gather_scores(parallel.head_group(model), scores, name).tolist() for name in ("mean", "max")
    }

    calls.all_gather_scores = lambda group, scores, reduction: scores
    results["each rank by its own heads"] = run(model, inputs, policy())
    calls.all_gather_scores = parallel.all_gather_scores

    model._tp_size = None
    try:
        run(model, inputs, policy())
    except NotImplementedError as error:
        results["without a process group"] = str(error)
    return results


def of_every_checkpoint(folder: str) -> dict[str, object]:
    results = {}
    for checkpoint in sorted(Path(folder).iterdir()):
        try:
            model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32, tp_plan="auto").eval()
            job = torch.load(checkpoint / "job.pt", weights_only=True)
            with torch.no_grad():
                model(**job["inputs"])  # unrouted
        except (RuntimeError, ValueError) as error:
            results[checkpoint.name] = {"error": str(error).splitlines()[0]}
            continue
        layer = rk.models.ADAPTERS[model.config.model_type](model).layers[job["layers"][0]]
        width = layer.self_attn.k_proj(torch.zeros(1, 1, model.config.text_config.hidden_size)).shape[-1]
        stages = [rk.Stage(number, keep) for number, keep in zip(job["layers"], job["keeps"], strict=True)]
        results[checkpoint.name] = {
            "key_heads": width // layer.self_attn.head_dim,
            **{action: run(model, job["inputs"], rk.Policy(stages, action)) for action in ACTIONS},
        }
    return results


def main(*arguments: str) -> None:
    make_importable()
    if len(arguments) == 1:
        torch.distributed.init_process_group("gloo")
    results = of_one_family(*arguments) if len(arguments) == 2 else of_every_checkpoint(*arguments)
    folder = Path(arguments[-1])
    folder = folder if len(arguments) == 2 else folder.parent
    Path(folder, f"{torch.distributed.get_rank()}.json").write_text(json.dumps(results))
    torch.distributed.destroy_process_group()
    os._exit(0)  # after gloo the interpreter now and then aborts while it is torn down


if __name__ == "__main__":
    main(*sys.argv[1:])
