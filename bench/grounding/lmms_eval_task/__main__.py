"""Writes the held-out scenes as a task for lmms-eval: `python -m bench.grounding.lmms_eval_task build/scenes`."""

from __future__ import annotations

import argparse
import io
from pathlib import Path

from PIL import Image

from ..scenes import KINDS, Question, Scene, held_out_scene

TEMPLATE = Path(__file__).with_name("_template_yaml").resolve()
TASK = "reroute_scenes"


def write_task(folder: Path, scenes: int, seed: int = 0, each: int | None = None) -> int:
    """Write the task `reroute_scenes` and its data, for `--include_path` of lmms-eval.

    Args:
        folder: where to; made if it is missing.
        scenes: how many of the held-out scenes.
        seed: theirs.
        each: at most how many questions of each kind a scene is asked; all where None.

    Returns:
        How many questions there are.
    """
    from datasets import Dataset, Features, List, Value
    from datasets import Image as Picture

    rows = []
    for number in range(scenes):
        scene = held_out_scene(seed, number)
        for kind in KINDS:
            asked = [question for question in scene.questions() if question.kind == kind]
            rows += [_row(number, scene, question) for question in asked[:each]]
    folder.mkdir(parents=True, exist_ok=True)
    data = (folder / "scenes.parquet").resolve()
    features = {name: Value("string") for name in ("kind", "question", "answer")}
    features |= {"scene": Value("int64"), "image": Picture(), "box": List(Value("float32"))}
    Dataset.from_list(rows, Features(features)).to_parquet(data)
    (folder / f"{TASK}.yaml").write_text(
        f'include: "{TEMPLATE}"\ntask: {TASK}\ndataset_kwargs:\n  data_files:\n    test: "{data}"\n', encoding="utf-8"
    )
    return len(rows)


def _row(number: int, scene: Scene, question: Question) -> dict[str, object]:
    picture = io.BytesIO()
    Image.fromarray(scene.image).save(picture, format="PNG")
    box = question.target.box if question.kind == "box" else []
    return {
        "scene": number,
        "image": {"bytes": picture.getvalue(), "path": None},
        "kind": question.kind,
        "question": question.text,
        "answer": question.answer,
        "box": list(box),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--scenes", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--each", type=int, help="questions of each kind that a scene is asked at most (all)")
    arguments = parser.parse_args()
    asked = write_task(arguments.folder, arguments.scenes, arguments.seed, arguments.each)
    print(f"{asked} questions about {arguments.scenes} scenes: --include_path {arguments.folder} --tasks {TASK}")


if __name__ == "__main__":
    main()
