"""Writes the benchmark's held-out scenes as a task for lmms-eval: `python -m bench.grounding.lmms_eval_task FOLDER`."""

from __future__ import annotations

import argparse
import io
from pathlib import Path

from PIL import Image

from ..answers import Item, held_out_items

TEMPLATE = Path(__file__).with_name("_template_yaml").resolve()
TASK = "reroute_scenes"


def write_task(folder: Path, scenes: int) -> None:
    """Write the task `reroute_scenes` and its data, for `--include_path` of lmms-eval.

    Args:
        folder: to write to; made if it is missing.
        scenes: how many of the held-out scenes, each with its question.
    """
    from datasets import Dataset, Features, List, Value
    from datasets import Image as Picture

    folder.mkdir(parents=True, exist_ok=True)
    data = (folder / "scenes.parquet").resolve()
    features = {name: Value("string") for name in ("kind", "question", "answer")}
    features |= {"scene": Value("int64"), "image": Picture(), "box": List(Value("float32"))}
    rows = [_row(item) for item in held_out_items(scenes)]
    Dataset.from_list(rows, Features(features)).to_parquet(data)
    (folder / f"{TASK}.yaml").write_text(
        f'include: "{TEMPLATE}"\ntask: {TASK}\ndataset_kwargs:\n  data_files:\n    test: "{data}"\n', encoding="utf-8"
    )


def _row(item: Item) -> dict[str, object]:
    picture = io.BytesIO()
    Image.fromarray(item.scene.image).save(picture, format="PNG")
    question = item.question
    return {
        "scene": item.number,
        "image": {"bytes": picture.getvalue(), "path": None},
        "kind": question.kind,
        "question": question.text,
        "answer": question.answer,
        "box": list(question.target.box) if question.target else [],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--scenes", type=int, default=240)
    arguments = parser.parse_args()
    write_task(arguments.folder, arguments.scenes)
    print(f"{arguments.scenes} scenes: --include_path {arguments.folder} --tasks {TASK}")


if __name__ == "__main__":
    main()
