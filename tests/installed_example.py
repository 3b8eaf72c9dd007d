"""Run the README's first example with the package as it is installed: python -I tests/installed_example.py README.md

The checkpoint that ships in the package stands for the one that it loads, and a schedule of few layers for its preset.
"""

import os
import re
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from PIL import Image

import reroute_kernels as rk

TINY = Path(rk.models.__file__).with_name("tiny_grounding")
SCHEDULE = [rk.Stage(3, 0.25), rk.Stage(7, 0.25)]


def replaced(pattern: str, replacement: str, code: str) -> str:
    code, count = re.subn(pattern, lambda _: replacement, code)
    assert count, f"the example has no {pattern}"
    return code


checkout = Path(sys.argv[1]).resolve().parent
assert not TINY.is_relative_to(checkout) or ".venv" in str(TINY.relative_to(checkout)), f"not installed: {TINY}"
code = re.findall(r"```python\n(.*?)```", Path(sys.argv[1]).read_text(), flags=re.DOTALL)[0]
code = replaced("llava-hf/llava-1.5-7b-hf", str(TINY), code)
code = replaced('"cuda"', '"cpu"', code)
code = replaced('"reroute-fastv/192"', "str(rk.Policy(schedule))", code)

with tempfile.TemporaryDirectory() as folder:
    os.chdir(folder)
    with Image.open(TINY / "example.png") as picture:
        picture.convert("RGB").save("photo.jpg")
    names = {"schedule": SCHEDULE}
    exec(code, names)
    os.chdir(checkout)

trace = names["routing"].trace
expected = [max(1, int(trace.visual_counts[0] * stage.keep)) for stage in SCHEDULE]
assert [stage.layer for stage in trace.stages] == [stage.layer for stage in SCHEDULE]
assert [len(stage.selected[0]) for stage in trace.stages] == expected
print(f"routed {expected} of {trace.visual_counts[0]} visual tokens: reroute-kernels {rk.__version__}, ", end="")
print(f"torch {torch.__version__}, transformers {transformers.__version__}")
