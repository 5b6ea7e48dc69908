"""What the choice of calibration text and language weights does, with and without protection.

Takes a model, a text set and a plan; quantizes once per calibration and plan, and measures all results on the `confirm`
part with the same resamples. Returns the damage of every combination, the 2×2 tables of calibration × protection, and
on request the matrix of calibration language × evaluation language.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import combinations
from typing import Literal, get_args

from quant_fairness_plugin.analysis.effects import WORST, Effects, TwoByTwo, effects_of, undefined_effects
from quant_fairness_plugin.analysis.matrix import CalibrationMatrix, calibration_matrix, single_language_sets
from quant_fairness_plugin.analysis.outcomes import CalibrationOutcome, Judge, Scored
from quant_fairness_plugin.artifacts import Bootstrap, ProtectionPlan, Provenance, TextSet, Weighting
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.measure.rows import position_limit
from quant_fairness_plugin.model.load import LoadedModel
from quant_fairness_plugin.model.provenance import provenance
from quant_fairness_plugin.quantize.calibration import ROW_TOKENS, CalibrationSet, build_calibration
from quant_fairness_plugin.quantize.methods import find_method, method_names
from quant_fairness_plugin.quantize.minimax import quantize_calibrated, quantize_nearest
from quant_fairness_plugin.quantize.quantized import QuantizedModel
from quant_fairness_plugin.quantize.stream import quantize_model
from quant_fairness_plugin.texts.parts import overlap

ALL: tuple[Weighting, ...] = ("english", "uniform", "minimax")


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationComparison:
    """Everything that was measured; `to_json` is its document."""

    schema_version: Literal[1] = 1
    kind: Literal["calibration-comparison"] = "calibration-comparison"
    provenance: Provenance
    method: str
    plan: ProtectionPlan
    outcomes: tuple[CalibrationOutcome, ...]
    tables: tuple[TwoByTwo, ...]
    """Every pair of calibrations, crossed with no protection and the plan."""
    matrix: CalibrationMatrix | None
    condition: str = ""
    """What keeps the sentences from being held out, as one sentence; empty where calibration used none of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibrations:
    """What to calibrate on."""

    weightings: Sequence[Weighting] = ALL
    """The weightings to compare; the first ones stand on the left of the tables."""
    tokens_per_language: int | None = None
    """Of `english`, `uniform` and `minimax`, see `build_calibration`."""
    matrix: bool = False
    """Also calibrate on each language alone."""

    def check(self, method: str) -> None:
        """Refuse what cannot be compared, before a model is loaded.

        Raises:
            ConfigError: no calibration or the same one twice, or a method without calibration.
        """
        names = self.weightings
        if not find_method(method).needs_calibration:
            raise ConfigError(
                f"method {method!r} uses no calibration text, so there is nothing to compare; use "
                f"{method_names(lambda other: other.needs_calibration)}"
            )
        if not names or len(set(names)) < len(names):
            raise ConfigError(
                f"calibrations {', '.join(names) or '(none)'}: name at least one, each once, of "
                f"{', '.join(get_args(Weighting))}"
            )

    def build(self, loaded: LoadedModel, texts: TextSet) -> tuple[dict[str, CalibrationSet], dict[str, CalibrationSet]]:
        """Return the calibration set of each weighting, and those of single languages for the matrix.

        Raises:
            UnknownLanguageError: `english` where the text set has none.
        """
        rows = min(ROW_TOKENS, position_limit(loaded.model))
        build = partial(build_calibration, loaded.tokenizer, texts, row_tokens=rows)
        tokens = self.tokens_per_language
        sets: dict[str, CalibrationSet] = {
            name: build(weighting=name, tokens_per_language=None if name == "proportional" else tokens)
            for name in self.weightings
        }
        return sets, single_language_sets(build, texts, tokens) if self.matrix else {}


ALL_CALIBRATIONS = Calibrations()


def compare_calibrations(
    loaded: LoadedModel,
    texts: TextSet,
    plan: ProtectionPlan,
    calibrations: Calibrations = ALL_CALIBRATIONS,
    *,
    method: str = "gptq",
    bootstrap: Bootstrap,
    progress: Callable[[str, int, int], None] | None = None,
) -> CalibrationComparison:
    """Quantize with every calibration, without and with a plan, and measure all of it on the `confirm` part.

    Nothing is written; the model is bit-identical afterwards.

    Args:
        loaded: the 16-bit model.
        texts: the whole text set: calibrated on `calibrate`, measured on `confirm`.
        plan: what to protect, and the grid; a plan that protects nothing leaves the effects of protection undefined.
        calibrations: what to calibrate on.
        method: `gptq` or `awq`.
        bootstrap: resamples of the sentences, the same for all combinations; without a reference.
        progress: called with (what, combinations done, in all).

    Raises:
        ConfigError: no calibration or the same one twice, or a method without calibration.
        UnknownLanguageError: `english` where the text set has none.
    """
    calibrations.check(method)
    judge = Judge(loaded, texts.part("confirm"), bootstrap)
    sets, singles = calibrations.build(loaded, texts)
    plans = (False, True) if plan.protected_layers or plan.overrides else (False,)
    wanted = [(name, given, protected) for protected in plans for name, given in sets.items()]
    wanted += [(name, given, False) for name, given in singles.items()]
    scored: dict[tuple[str, bool], Scored] = {}
    for done, (name, given, protected) in enumerate(wanted):
        followed = plan if protected else ProtectionPlan.unprotected(plan.model, plan.layers, plan.grid)
        quantize, nearest = _quantizer(loaded, followed, method), partial(quantize_nearest, loaded, followed)
        quantized = quantize_calibrated(quantize, nearest, given, texts)
        scored[name, protected] = judge.outcome(name, protected, quantized)
        if progress is not None:
            progress("compare", done + 1, len(wanted))
    return CalibrationComparison(
        provenance=_provenance(loaded, texts, plan, calibrations, method, bootstrap),
        method=method,
        plan=plan,
        outcomes=tuple(scored[name, protected].outcome for protected in plans for name in sets),
        tables=tuple(_cross(judge, scored, first, other, len(plans) > 1) for first, other in combinations(sets, 2)),
        matrix=calibration_matrix(judge, scored, singles, [*singles, *sets]) if calibrations.matrix else None,
        condition=overlap(texts),
    )


def _provenance(
    loaded: LoadedModel,
    texts: TextSet,
    plan: ProtectionPlan,
    calibrations: Calibrations,
    method: str,
    bootstrap: Bootstrap,
) -> Provenance:
    arguments = {
        "method": method,
        "grid": str(plan.grid),
        "calibrations": list(calibrations.weightings),
        "tokens_per_language": calibrations.tokens_per_language,
        "matrix": calibrations.matrix,
        "draws": bootstrap.draws,
    }
    return provenance(loaded, texts, seed=bootstrap.seed, arguments=arguments)


def to_json(comparison: CalibrationComparison) -> str:
    """Return the JSON document of a comparison, `schema_version` first."""
    return json.dumps(asdict(comparison), ensure_ascii=False, allow_nan=False, indent=1) + "\n"


def _quantizer(loaded: LoadedModel, plan: ProtectionPlan, method: str) -> Callable[[CalibrationSet], QuantizedModel]:
    return lambda calibration: quantize_model(loaded, plan, method=method, calibration=calibration)


def _cross(judge: Judge, scored: Mapping[tuple[str, bool], Scored], first: str, other: str, crossed: bool) -> TwoByTwo:
    """The effects of two calibrations, and of the plan where there is one."""
    cells = [
        scored[name, protected] for protected in ((False, True) if crossed else (False,)) for name in (first, other)
    ]
    statuses = {name: {cell.statuses[name] for cell in cells} for name in judge.texts.languages}
    intact = [name for name, in_cells in statuses.items() if in_cells == {"supported"}]
    collapsed = [name for name, in_cells in statuses.items() if "collapsed" in in_cells]
    effects: list[Effects] = []
    for subject in (WORST, *judge.texts.languages):
        languages = intact if subject == WORST else [subject] if subject in intact else []
        if subject == WORST and collapsed:
            effects.append(undefined_effects(WORST, f"collapsed in {', '.join(collapsed)}"))
        elif not languages:
            effects.append(
                undefined_effects(subject, f"not supported or not intact: {', '.join(intact) or 'none'} are")
            )
        else:
            series = [judge.series(cell, languages) for cell in cells]
            effects.append(effects_of(subject, series[0], series[1], (series[2], series[3]) if crossed else None))
    return TwoByTwo(first=first, other=other, effects=tuple(effects))
