"""Photos for the commands that ask a model about a folder of images; a check of what commands say of bad options."""

import re
from pathlib import Path

from PIL import Image

from reroute_kernels.cli.demo import example


def make_photos(folder: Path, count: int) -> Path:
    """The folder, with so many images and a file that is none."""
    with Image.open(example().image) as scene:
        for number in range(count):
            scene.rotate(90 * number).save(folder / f"{number}.png")
    (folder / "notes.txt").write_text("no image")
    return folder


def assert_one_clear_line(result, message: str) -> None:
    """The command ended with code 2, and said this in one line."""
    assert result.exit_code == 2
    lines = [line for line in result.stderr.splitlines() if line.startswith("reroute-kernels: ")]
    assert len(lines) == 1, result.output
    assert re.search(message, lines[0]), lines[0]
    assert "Traceback" not in result.output
