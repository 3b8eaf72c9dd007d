"""Take the picture of the page that `reroute-kernels view` writes: docs/view.png.

    python -m bench.pages.screenshot [--scores] [arguments of the command, such as --policy 3:0.25,7:0.25]

It needs Chromium, which `make browser` installs.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PICTURE = Path(__file__).parents[2] / "docs" / "view.png"
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def find_chromium() -> str | None:
    """Path of the installed Chromium or Chrome."""
    return next(filter(None, map(shutil.which, NAMES)), None)


@contextmanager
def chromium() -> Iterator[object]:
    """A headless browser of Playwright's."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=ARGUMENTS, timeout=120_000)
        try:
            yield browser
        finally:
            browser.close()


def main(arguments: list[str]) -> None:
    from reroute_kernels.cli.commands import app

    if find_chromium() is None:
        sys.exit(f"bench.pages.screenshot needs one of {', '.join(NAMES)}: make browser")
    shows_scores = "--scores" in arguments
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "view.html"
        given = [argument for argument in arguments if argument != "--scores"]
        if app(["view", "--output", str(path), *given], prog_name="reroute-kernels", standalone_mode=False):
            sys.exit(2)
        with chromium() as browser:
            page = browser.new_page(viewport={"width": 1200, "height": 700})
            page.goto(path.as_uri())
            if shows_scores:
                page.check("[value=score]")
            page.evaluate("document.activeElement.blur()")
            page.screenshot(path=PICTURE, full_page=True)
    print(f"Screenshot: {PICTURE}")


if __name__ == "__main__":
    main(sys.argv[1:])
