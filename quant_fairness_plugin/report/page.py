"""The page: one HTML file without scripts and without anything to load, from artifacts alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources

import jinja2
from markupsafe import Markup

from quant_fairness_plugin.artifacts import Answers, Measurement, ProtectionPlan, Provenance, ReaderRun, Undefined
from quant_fairness_plugin.artifacts.gates import Gate
from quant_fairness_plugin.errors import ConfigError, QualityGateError
from quant_fairness_plugin.recommend import recommend_plan
from quant_fairness_plugin.report.answers import Answer, Heading, answers, heading, verdict_of
from quant_fairness_plugin.report.compared import compare
from quant_fairness_plugin.report.drawing import check_drawing
from quant_fairness_plugin.report.section import Section
from quant_fairness_plugin.report.sections.analyses import analysis_section
from quant_fairness_plugin.report.sections.answers import answers_section
from quant_fairness_plugin.report.sections.configurations import configurations_section
from quant_fairness_plugin.report.sections.controls import controls_section
from quant_fairness_plugin.report.sections.coverage import coverage_section
from quant_fairness_plugin.report.sections.damage import damage_section
from quant_fairness_plugin.report.sections.experts import experts_section
from quant_fairness_plugin.report.sections.layers import layers_section
from quant_fairness_plugin.report.sections.precision import precision_section
from quant_fairness_plugin.report.sections.tradeoff import evidence_tradeoff, sweep_tradeoff
from quant_fairness_plugin.report.sources import Sources
from quant_fairness_plugin.report.words import Figure, Language, Written, model_words

_MODES = (
    ("tldr", "TL;DR", "the answer"),
    ("practitioner", "Practitioner", "what to do"),
    ("researcher", "Researcher", "how it is known"),
)
"""Name, label and purpose of each reading mode, the shortest first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """Everything that the template shows."""

    model: str
    subtitle: str
    mode: str
    """The reading mode that it opens in."""
    heading: Heading | None
    """None where nothing was quantized, so that there is nothing to judge."""
    answers: tuple[Answer, ...]
    condition: str
    sections: tuple[Section, ...]
    provenance: tuple[tuple[str, str], ...]


def render_report(sources: Sources, *, gate: Gate | None = None) -> str:
    """Return the report as one HTML document.

    Args:
        sources: what to report on.
        gate: the most damage that the user accepts; None judges by the bound of `Gate()` without forbidding.

    Raises:
        MissingExtraError: the packages of the extra `report` are not installed.
        ResourceError: a limit of addresses or of data is below what the drawings' JavaScript engine takes.
    """
    check_drawing()
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("quant_fairness_plugin.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.tests |= {
        "language": lambda cell: isinstance(cell, Language),
        "written": lambda cell: isinstance(cell, Written),
        "figure": lambda cell: isinstance(cell, Figure),
    }
    style = resources.files("quant_fairness_plugin.report").joinpath("templates/report.css").read_text("utf-8")
    page = _page(sources, gate)
    # The style sheet is a file of this package; nothing in it comes from outside.
    return environment.get_template("report.html.j2").render(page=page, modes=_MODES, style=Markup(style))


def _page(sources: Sources, gate: Gate | None) -> Page:
    plan = recommended_plan(sources)
    compared = compare(sources, plan)
    verdict = verdict_of(sources, gate)
    alone = _first_provenance(sources) is None and plan is None  # questions about the 16-bit model
    return Page(
        model=model_words(sources.model),
        subtitle=_subtitle(sources, plan),
        mode=_MODES[-1][0] if alone else _MODES[0][0],
        heading=None if alone else heading(verdict),
        answers=() if alone else tuple(answers(sources, compared, plan, verdict, gate or Gate())),
        condition="" if compared is None else compared.condition,
        sections=tuple(_sections(sources, plan, gate or Gate())),
        provenance=tuple(_provenance(sources)),
    )


def recommended_plan(sources: Sources) -> ProtectionPlan | None:
    """Return the plan that was given or followed; else what the sweep recommends within its default budget, if any."""
    if sources.plan is not None or sources.sweep is None:
        return sources.plan
    try:
        return recommend_plan(sources.sweep)
    except (ConfigError, QualityGateError):  # the objective is undefined for this sweep: there is nothing to recommend
        return None


def _sections(sources: Sources, plan: ProtectionPlan | None, gate: Gate) -> Iterator[Section]:
    compared = compare(sources, plan)
    if compared is not None:
        yield damage_section(compared, gate)
    if sources.measurement is not None and isinstance(sources.measurement.answers, Answers):
        asked = answers_section(sources.measurement.answers)
        if asked is not None:
            yield asked
    chosen_from = None if sources.record is None else configurations_section(sources.record, sources.before)
    if chosen_from is not None:
        yield chosen_from
    tradeoff = None
    if sources.sweep is not None:
        tradeoff = sweep_tradeoff(sources.sweep, plan)
    elif sources.evidence is not None:
        tradeoff = evidence_tradeoff(sources.evidence)
    if tradeoff is not None:
        yield tradeoff
    if plan is not None:
        yield precision_section(plan, sources.record)
    parts = (
        None if sources.record is None else coverage_section(sources.record),
        None if sources.record is None or sources.record.experts is None else experts_section(sources.record.experts),
        None if sources.sweep is None else layers_section(sources.sweep),
        None if sources.evidence is None else controls_section(sources.evidence),
    )
    yield from (part for part in (*parts, *map(analysis_section, sources.analyses)) if part is not None)


def _subtitle(sources: Sources, plan: ProtectionPlan | None) -> str:
    if sources.record is not None:
        return f"{sources.record.method}, {sources.record.grids}, {sources.record.format}"
    grid = plan.grid if plan is not None else sources.sweep.grid if sources.sweep is not None else None
    if grid is None and sources.measurement is None and sources.before is None:
        return "analyses of the 16-bit model"
    return "measured without a record" if grid is None else f"{grid}, not exported"


def _provenance(sources: Sources) -> Iterator[tuple[str, str]]:
    """Yield what the figures can be made again from."""
    for answer in sources.analyses:
        yield (
            f"analyze {answer.analysis}",
            "; ".join(f"{name} {_plain(value)}" for name, value in answer.provenance.items()),
        )
    made = _first_provenance(sources)
    if made is None:
        return
    yield "16-bit model", f"{model_words(made.model)}, sha256 {made.model_sha256}"
    begun = f", each begun {made.start}" if made.start else ""
    yield "texts", f"{made.text_set}, sha256 {made.text_sha256}{begun}"
    yield "seed", str(made.seed)
    yield "arguments", "; ".join(f"{name} {value}" for name, value in made.arguments.items())
    yield "versions", "; ".join(f"{name} {version}" for name, version in made.versions.items())
    if sources.record is not None:
        yield "verified", _verified(sources.record.reader_run)
    if sources.measurement is not None and isinstance(sources.measurement.answers, Undefined):
        yield "prompts", f"none were asked: {sources.measurement.answers.undefined}"
    for name, measured in (("checkpoint", sources.measurement), ("without protection", sources.before)):
        if measured is not None:
            yield f"sentences, {name}", _sentences(measured)


def _plain(value: object) -> str:
    """Return a value of a provenance without the signs of its notation."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {part}" for name, part in value.items()) or "none"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _verified(run: ReaderRun | Undefined | None) -> str:
    if isinstance(run, ReaderRun):
        return f"every file, tensor and value; and by {run}"
    reason = "which one is not recorded" if run is None else f"no reader was run: {run.undefined}"
    return f"every file, tensor and value; {reason}"


def _first_provenance(sources: Sources) -> Provenance | None:
    held = (sources.record, sources.measurement, sources.before, sources.sweep, sources.evidence)
    return next((source.provenance for source in held if source is not None), None)


def _sentences(measured: Measurement) -> str:
    counts = sorted({row.sentences for row in measured.languages})
    return f"part {measured.part}, {' or '.join(map(str, counts))} in each language"
