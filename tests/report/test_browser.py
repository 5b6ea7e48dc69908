"""The page in a real Chromium: charts drawn, modes switch, nothing is requested, axe-core finds nothing serious.

Offline; the pages are made from the artifacts of `samples`, whose figures are planted, so that every part is there.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from quant_fairness_plugin.analysis.kinds import ANALYSES
from quant_fairness_plugin.report.page import render_report
from quant_fairness_plugin.report.sources import Sources
from tests.planted import planted_report
from tests.report.samples import analyses, answers, evidence, measured, record

pytestmark = pytest.mark.browser
SIZES = [(1280, 900), (390, 844)]
DRAWN = [f"analysis-{name}" for name in ANALYSES]
SHORT = ["damage", "answers", "configurations", "tradeoff", "precision", "calibration"]
PARTS = [*SHORT, "layers", "controls", *DRAWN, "analysis-new", "provenance"]


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        # The system's own where there is one: playwright's is a download of its own.
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    swept = planted_report([0.5, 3.0, 0.25])
    swept = replace(swept, provenance=replace(swept.provenance, model="m", model_sha256="1"))
    after, before = measured(en=0.01, he=0.2, ar=0.1, hi=9.0), measured("none", en=0.1, he=0.9, ar=0.3, hi=9.0)
    many = {f"model.layers.1.mlp.m{i}": 4 for i in range(13)}  # so many columns that the map scrolls on a telephone
    made = replace(record(replace(after, answers=answers())), quantized_modules=record().quantized_modules | many)
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(render_report(Sources.of([made, before, swept, evidence(), *analyses()])), encoding="utf-8")
    return path


class Opened:
    """A page with what it said and asked for."""

    def __init__(self, chromium: Any, file: Path, size: tuple[int, int] = SIZES[0], scheme: str = "light") -> None:
        view = {"width": size[0], "height": size[1]}
        self.page = chromium.new_context(viewport=view, color_scheme=scheme, bypass_csp=False).new_page()
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(file.as_uri())

    def shown(self) -> list[str]:
        return [name for name in PARTS if self.page.locator(f"#{name}").is_visible()]


@pytest.mark.parametrize("size", SIZES)
def test_charts_are_drawn_in_the_width_that_fits_and_nothing_is_requested(
    chromium: Any, file: Path, size: tuple[int, int]
) -> None:
    opened = Opened(chromium, file, size)
    opened.page.locator("#mode-researcher").check(force=True)
    boxes = [svg.bounding_box() for svg in opened.page.locator("figure svg").all() if svg.is_visible()]
    assert len(boxes) == len(PARTS) - 3  # not provenance, not configurations, nor an analysis that nothing draws
    assert all(box["width"] > 150 and box["height"] > 50 and box["x"] >= 0 for box in boxes)
    assert opened.page.evaluate("document.documentElement.scrollWidth") == size[0]  # no sideways scrolling
    assert opened.asked == [file.as_uri()]
    assert opened.said == []


def test_modes_switch_by_keyboard_without_a_reload(chromium: Any, file: Path) -> None:
    opened = Opened(chromium, file)
    assert opened.shown() == PARTS[:1]
    opened.page.locator("#mode-tldr").focus()
    opened.page.keyboard.press("ArrowRight")
    assert opened.shown() == SHORT
    opened.page.keyboard.press("ArrowRight")
    assert opened.shown() == PARTS
    assert opened.asked == [file.as_uri()]


def test_annotations_and_tables_open_by_keyboard(chromium: Any, file: Path) -> None:
    opened = Opened(chromium, file)
    table = opened.page.locator("section.tldr table")
    assert not table.is_visible()
    opened.page.locator("section.tldr summary").first.focus()
    opened.page.keyboard.press("Enter")
    assert table.is_visible()
    assert opened.page.locator("bdi.own[lang=he]").first.evaluate("e => getComputedStyle(e).direction") == "rtl"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_axe_finds_nothing_serious(chromium: Any, file: Path, size: tuple[int, int], scheme: str) -> None:
    from axe_playwright_python.sync_playwright import Axe

    opened = Opened(chromium, file, size, scheme)
    opened.page.locator("#mode-researcher").check(force=True)
    opened.page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    found = Axe().run(opened.page).response
    assert len(found["passes"]) > 10  # it did look
    serious = [f for f in found["violations"] if f["impact"] in ("serious", "critical")]
    assert [(f["id"], [node["html"] for node in f["nodes"]][:3]) for f in serious] == []


def test_print_opens_what_is_closed(chromium: Any, file: Path) -> None:
    opened = Opened(chromium, file)
    opened.page.emulate_media(media="print")
    assert opened.page.locator("section.tldr table").bounding_box()["height"] > 50
    assert not opened.page.locator(".modes").is_visible()
