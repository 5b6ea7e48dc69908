"""Saved sweeps of layers that are compared: named, checked, with what all of them have in common.

Takes files; returns what each layer of each sweep is worth, resample by resample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from quant_fairness_plugin.analysis.predictors import layer_importance
from quant_fairness_plugin.artifacts import Bootstrap, Mode, SweepReport, load
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.measure.damage import count_sentences
from quant_fairness_plugin.plans.plan_set import BASELINE
from quant_fairness_plugin.statistics.series import Series

Name = TypeVar("Name", bound=str)
FEWEST = 4
"""Of three layers, every order is one in six: none could be told from chance."""


@dataclass(frozen=True, slots=True)
class Swept:
    """One of them."""

    name: str
    """The model's, or the file's where two are of one model."""
    report: SweepReport
    sentences: int
    """The place of the first sweep with the same sentences: these share their resamples, others have their own."""


@dataclass(frozen=True, slots=True)
class CommonSweeps:
    """All of them, in the order given."""

    sweeps: tuple[Swept, ...]
    modes: tuple[Mode, ...]
    languages: tuple[str, ...]
    """Those that every 16-bit model supports."""

    def worth(self, mode: Mode, *, draws: int, seed: int) -> list[tuple[Swept, Series]]:
        """Return each sweep with what its layers are worth, `[1 + draws, layers]`; see `layer_importance`.

        Args:
            mode: one of the common modes.
            draws: resamples of the sentences.
            seed: of the first sweep's.
        """
        resamples = [Bootstrap(None, draws, seed + swept.sentences) for swept in self.sweeps]
        return [
            (swept, layer_importance(swept.report, mode, self.languages, each))
            for swept, each in zip(self.sweeps, resamples, strict=True)
        ]


def read_sweeps(paths: Sequence[Path], languages: Sequence[str] | None = None) -> CommonSweeps:
    """Read sweeps to compare.

    Args:
        paths: their files.
        languages: those that count; None for all that they have in common.

    Raises:
        ArtifactError: a file that is no sweep.
        ConfigError: fewer than two, one of units or of too few layers, or no mode or language in common.
    """
    if len(paths) < 2:
        raise ConfigError(f"{len(paths)} sweep(s) given, and two or more are compared; write --sweep A.json,B.json")
    reports = [_read(path) for path in paths]
    models = [report.provenance.model for report in reports]
    names = models if len(set(models)) == len(models) else [path.name for path in paths]
    texts = [(report.provenance.text_sha256, count_sentences(report.scores[BASELINE])) for report in reports]
    shared = _common("supported language", names, list(map(_supported, reports)), "Sweep all with the same --langs")
    if lacking := [language for language in languages or () if language not in shared]:
        raise ConfigError(f"{', '.join(lacking)}: not in all sweeps; these have {', '.join(shared)}. Change --langs")
    rows = zip(names, reports, texts, strict=True)
    return CommonSweeps(
        sweeps=tuple(Swept(name, report, texts.index(text)) for name, report, text in rows),
        modes=_common("mode", names, [report.modes for report in reports], "Sweep all with the same --mode"),
        languages=tuple(languages or shared),
    )


def _read(path: Path) -> SweepReport:
    report = load(SweepReport, path)
    if report.granularity != "layer":
        raise ConfigError(f"{path} is a sweep of single units; expected whole layers. Sweep with --granularity layer")
    if report.layers < FEWEST:
        raise ConfigError(f"{path}: {report.layers} layers; {FEWEST} or more can be told from chance. Leave it out")
    return report


def _supported(report: SweepReport) -> tuple[str, ...]:
    return tuple(language for language, status in report.languages.items() if status == "supported")


def _common(what: str, names: Sequence[str], owned: Sequence[Sequence[Name]], remedy: str) -> tuple[Name, ...]:
    """Return what all sweeps have, in the order of the first."""
    first, *others = owned
    shared = tuple(each for each in first if all(each in other for other in others))
    if not shared:
        has = "; ".join(f"{name} has {', '.join(each) or 'none'}" for name, each in zip(names, owned, strict=True))
        raise ConfigError(f"the sweeps have no {what} in common: {has}. {remedy}")
    return shared
