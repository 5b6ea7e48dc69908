"""The page answers the four questions, shows each figure, loads nothing, and shows hostile text as text."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from quant_fairness_plugin.analysis.kinds import ANALYSES
from quant_fairness_plugin.artifacts import ReaderRun, SweepReport, Undefined
from quant_fairness_plugin.artifacts.gates import Gate
from quant_fairness_plugin.errors import ConfigError, MissingExtraError, ResourceError
from quant_fairness_plugin.model import limits
from quant_fairness_plugin.report import drawing
from quant_fairness_plugin.report.page import recommended_plan, render_report
from quant_fairness_plugin.report.sources import Artifact, Sources
from tests.planted import planted_report
from tests.report.samples import HOSTILE, PLAN, analyses, answers, evidence, measured, record

VOID = {"meta", "input", "br", "link", "img"}


class Elements(HTMLParser):
    """Every start tag with its attributes, the text, and whether all tags close in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


def page(*artifacts: Artifact, gate: Gate | None = None) -> Elements:
    return Elements(render_report(Sources.of(artifacts), gate=gate))


@pytest.fixture(scope="module")
def swept() -> SweepReport:
    report = planted_report([0.5, 3.0, 0.25])
    return replace(report, provenance=replace(report.provenance, model="m", model_sha256="1"))


@pytest.fixture(scope="module")
def full(swept: SweepReport) -> Elements:
    after, before = measured(en=0.01, he=0.2, hi=9.0), measured("none", en=0.1, he=0.9, hi=9.0)
    return page(record(replace(after, answers=answers())), before, swept, evidence(), *analyses())


def test_the_four_questions_are_answered_before_anything_else(full: Elements) -> None:
    start = full.text[: full.text.index("What each language loses")]
    assert "SHIP WITH CARE" in start
    assert "1 of 2 languages lose more than 0.05 bits per byte; most he, 0.200" in start
    assert "Which language loses most? Hebrew (he). 0.200 bits per byte, 20.0 times as much as English." in start
    assert "In 25% of places another next token" in start
    assert "Layer 0 in 16 bit; layer 2 in 8 bit; 1.down in 16 bit; all else in 4 bit." in start
    assert "10 kB instead of 40 kB (25%). Protection is 2.5 kB of it, 12.5% extra." in start


def test_every_part_has_a_picture_in_two_widths_with_a_text_and_a_table(full: Elements) -> None:
    parts = ["damage", "answers", "tradeoff", "precision", "calibration", "layers", "controls"]
    parts += [f"analysis-{name}" for name in ANALYSES]
    listed = ["configurations", "analysis-new"]  # have no chart
    shown = [a["id"] for a in full.of("h2")]
    assert [name for name in shown if name not in listed] == ["verdict", *parts, "provenance"]
    assert [name for name in shown if name in listed] == listed
    pictures = full.of("svg")
    assert len(pictures) == 2 * len(parts)
    assert all(a["role"] == "img" and len(a["aria-label"] or "") > 20 for a in pictures)
    assert len(full.of("table")) == len(full.of("caption")) == len([*parts, *listed])
    assert {a["scope"] for a in full.of("th")} == {"col", "row"}


def test_the_page_loads_nothing_and_runs_nothing(full: Elements) -> None:
    assert not {"script", "link", "img", "iframe", "image", "use"} & {tag for tag, _ in full.found}
    values = [v for _, attributes in full.found for k, v in attributes.items() if v and not k.startswith("xmlns")]
    assert [v for v in values if re.search(r"https?:|//|url\(", v)] == []
    assert not any(k.startswith("on") for _, attributes in full.found for k in attributes)


def test_the_reading_modes_are_three_radio_buttons_and_the_shortest_is_chosen(full: Elements) -> None:
    modes = [a for a in full.of("input") if a["type"] == "radio"]
    assert [(a["name"], a["value"], "checked" in a) for a in modes] == [
        ("mode", "tldr", True), ("mode", "practitioner", False), ("mode", "researcher", False),
    ]  # fmt: skip
    levels = [(a["class"] or "").split()[1] for a in full.of("section") if (a["class"] or "").startswith("part ")]
    assert levels == ["tldr", *["practitioner"] * 5, *["researcher"] * (4 + len(ANALYSES))]


def test_hostile_text_is_shown_as_text_in_every_place() -> None:
    after = measured(en=0.1, hi=0.2)
    rows = (replace(after.languages[0], language=HOSTILE), replace(after.languages[1], reason=f"reason {HOSTILE}"))
    after = replace(after, languages=rows, held_out=False, condition=f"condition {HOSTILE}")
    made = record(after)
    made = replace(
        made,
        provenance=replace(made.provenance, model=HOSTILE, text_set=f"texts {HOSTILE}"),
        calibration=made.calibration | {"source": f"source {HOSTILE}", "tokens_per_language": {HOSTILE: 3}},
        kept_modules={f"model.layers.1.{HOSTILE}": f"kept {HOSTILE}"},
    )
    # `Elements` checks that no quote or bracket breaks out of its place: all tags close in order.
    shown = page(made)
    assert not shown.of("script")
    said = page(record(replace(after, answers=answers())), *analyses())
    assert not said.of("script")
    assert said.text.count(f"en {HOSTILE}") == 3
    for place in ("reason", "condition", "texts", "source", "kept"):
        assert f"{place} {HOSTILE}" in shown.text
    assert all(HOSTILE in (svg["aria-label"] or "") for svg in shown.of("svg")[:2])


def test_names_in_other_scripts_have_their_language_and_their_own_direction(full: Elements) -> None:
    own = [a for a in full.of("bdi") if a.get("class") == "own"]
    assert {"class": "own", "lang": "he"} in own
    assert "עברית" in full.text


def test_a_folder_of_this_machine_is_not_given_away() -> None:
    made = record(measured(en=0.1))
    shown = page(replace(made, provenance=replace(made.provenance, model="/home/me/secret/model")))
    assert "secret" not in shown.text
    assert shown.text.count("model") > 1


def test_a_gate_changes_verdict_and_line() -> None:
    shown = page(record(measured(en=0.1)), gate=Gate("worst", 0.4))
    assert "SHIP no language loses more than 0.4" in shown.text
    assert "what the verdict accepts: 0.4 bits per byte" in shown.text


def test_where_answers_alone_are_at_fault_the_page_says_to_read_them() -> None:
    asked = replace(measured(en=0.01, he=0.02), answers=answers())
    start = page(record(asked)).text
    assert "Is that acceptable? The loss is. Read the answers." in start
    assert "What should I ship? This checkpoint, if its answers are good enough. Layer 0" in start
    lossy = page(record(replace(asked, languages=measured(en=0.9, he=0.9).languages))).text
    assert "Is that acceptable? It depends on who uses it." in lossy


def test_before_and_after_stand_side_by_side(full: Elements) -> None:
    damage = full.of("svg")[0]["aria-label"] or ""
    assert "Hebrew 0.900 before, 0.200 after" in damage
    assert "Hindi" not in damage  # what the 16-bit model does not know has no loss; the table says why
    assert "Protection clearly lowered the loss of 2 of 2 languages" in full.text
    assert "hi: unsupported, no better than chance." in full.text


def test_a_sweep_alone_says_that_nothing_is_judged_yet(swept: SweepReport) -> None:
    shown = page(swept)
    assert "NO CHECKPOINT YET" in shown.text
    assert "A forecast: weights rounded in memory" in shown.text
    plan = recommended_plan(Sources.of([swept]))
    assert plan is not None
    assert f"quant-fairness quantize MODEL --protect-layers {','.join(map(str, plan.protected_layers)) or 'none'}" in (
        shown.text
    )


def test_collapse_forbids() -> None:
    shown = page(record(measured(en=0.1, xx=0.5)))
    assert "DO NOT SHIP collapsed: xx" in shown.text
    assert "Not this checkpoint." in shown.text


@pytest.mark.parametrize("artifact", [PLAN, evidence(), measured("none", en=0.1), measured(hi=0.1)])
def test_each_artifact_makes_a_page_alone(artifact: Artifact) -> None:
    assert page(artifact).of("h1")


def test_the_page_is_the_same_each_time() -> None:
    sources = Sources.of([PLAN])
    assert render_report(sources) == render_report(sources)


def test_a_missing_package_is_named_with_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(drawing._PACKAGES, "no_such_module", "no-such-package")
    with pytest.raises(
        MissingExtraError, match=r'needs no-such-package; install: pip install "quant-fairness\[report\]"'
    ):
        render_report(Sources.of([PLAN]))


def test_a_limit_that_would_end_the_engine_is_said_before_it_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "rooms", lambda: iter([limits.Room(600_000_000, "the limit of data", "data")]))
    with pytest.raises(ResourceError, match=r"the drawings of a page take 700\.00 MB of data before any work"):
        render_report(Sources.of([PLAN]))


def test_the_page_says_which_reader_ran_and_why_nothing_was_asked() -> None:
    run = ReaderRun(reader="transformers", version="5.1", dtype="float32", detail="logits within 1e-06")
    asked = replace(measured(en=0.01), answers=Undefined("--prompts none"))
    text = page(replace(record(asked), reader_run=run)).text
    assert "every file, tensor and value; and by transformers 5.1 in float32: logits within 1e-06" in text
    assert "prompts none were asked: --prompts none" in text
    none = replace(record(asked), reader_run=Undefined("it needs gptqmodel"))
    assert "no reader was run: it needs gptqmodel" in page(none).text


def test_an_analysis_alone_makes_a_page() -> None:
    shown = page(analyses()[1])
    assert "analyses of the 16-bit model" in shown.text
    assert "What of tokens?" in shown.text
    assert "NO CHECKPOINT" not in shown.text  # there is nothing to judge, and the page opens where its answer is
    assert [a["id"] for a in shown.of("input") if "checked" in a] == ["mode-researcher"]
    with pytest.raises(ConfigError, match="two artifacts are a tokens analysis"):
        page(analyses()[1], analyses()[1])
    with pytest.raises(ConfigError, match="of 2 models"):
        page(analyses()[1], replace(analyses()[0], provenance={"model": "other", "model_sha256": "7"}))
