"""The pictures of a report in docs/report.md: what a real Chromium shows of the page that `run` writes.

    quant-fairness run --model demo --langs en,he,ar,hi -o demo-fair
    python benchmarks/report_picture.py demo-fair/report.html    # in the environment of `make test-browser`

The first screen on a desk in light colours, and on a telephone in dark ones.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"
PICTURES = {"report.png": (1120, 820, "light"), "report-phone.png": (390, 844, "dark")}
"""File of docs/ → width and height in pixels, and the colours."""


def take(page: Path) -> None:
    """Write every picture of a page."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for name, (width, height, scheme) in PICTURES.items():
            context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
            opened = context.new_page()
            opened.goto(page.resolve().as_uri())
            opened.screenshot(path=DOCS / name)
        browser.close()


if __name__ == "__main__":
    take(Path(sys.argv[1]))
