"""The long steps: measure, sweep, compare with controls, quantize."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from quant_fairness_plugin.artifacts import Evidence, Part, ProtectionPlan, SweepReport, TextSet
from quant_fairness_plugin.config import FairConfig
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.evidence import Rivals, gather_evidence
from quant_fairness_plugin.export.foreign import quantize_with
from quant_fairness_plugin.measure.measurement import Measured, measure_states
from quant_fairness_plugin.measure.objectives import find_objective
from quant_fairness_plugin.measure.rows import position_limit
from quant_fairness_plugin.measure.scoring import ModelState, block_state
from quant_fairness_plugin.model.load import LoadedModel
from quant_fairness_plugin.model.provenance import provenance
from quant_fairness_plugin.plans.plan_set import BASELINE
from quant_fairness_plugin.preflight import open_documents
from quant_fairness_plugin.quantize.backends import NATIVE
from quant_fairness_plugin.quantize.calibration import ROW_TOKENS, CalibrationSet, build_calibration
from quant_fairness_plugin.quantize.coverage import expert_coverage, reach_experts
from quant_fairness_plugin.quantize.importance import channel_importance
from quant_fairness_plugin.quantize.methods import find_method
from quant_fairness_plugin.quantize.minimax import quantize_calibrated, quantize_nearest
from quant_fairness_plugin.quantize.quantized import QuantizedModel
from quant_fairness_plugin.quantize.selection import select_modules
from quant_fairness_plugin.quantize.stream import quantize_model
from quant_fairness_plugin.quantize.workplace import Workplace
from quant_fairness_plugin.steps.opening import check_whole
from quant_fairness_plugin.sweep.checkpoint_bank import bank_recipe
from quant_fairness_plugin.sweep.config import SweepConfig
from quant_fairness_plugin.sweep.engine import sweep_units
from quant_fairness_plugin.sweep.execution import Execution
from quant_fairness_plugin.texts.parts import Sample, overlap

Progress = Callable[[int, int], None]
"""Called with (done, in all)."""


def measure(
    loaded: LoadedModel,
    texts: TextSet,
    config: FairConfig,
    states: Sequence[ModelState],
    *,
    part: Part,
    kept: Path | None = None,
    progress: Progress | None = None,
) -> Measured:
    """Measure states against the 16-bit model on one part of the texts; without a state, the 16-bit model itself.

    What the 16-bit model's head is given stays in the folder `kept`, where its blocks are in files, for the next time.
    """
    baseline, sample = block_state(BASELINE, loaded, kept=kept), Sample.of(texts, part)
    return measure_states(
        baseline,
        states or (baseline,),
        loaded.tokenizer,
        # Nothing is selected for the 16-bit model itself, so that all sentences are new to it.
        sample if states else replace(sample, condition=""),
        provenance=lambda given: provenance(loaded, texts, seed=config.seed, arguments=given),
        bootstrap=config.bootstrap,
        progress=progress,
    )


def sweep(
    loaded: LoadedModel,
    texts: TextSet,
    config: FairConfig,
    plans: SweepConfig,
    *,
    bank: Path | None = None,
    execution: Execution,
    progress: Progress | None = None,
) -> SweepReport:
    """Sweep on the search part, with round-to-nearest weights or those of a checkpoint (`bank`); see `sweep_units`."""
    report = sweep_units(
        loaded,
        texts.part("search"),
        plans,
        grid=config.grid,
        bootstrap=config.bootstrap,
        bank_recipe=None if bank is None else bank_recipe(bank, config.grid),
        execution=execution,
        progress=progress,
    )
    return replace(report, condition=overlap(texts))


def evidence(
    loaded: LoadedModel,
    plan: ProtectionPlan,
    texts: TextSet,
    config: FairConfig,
    *,
    work: Path | None = None,
    progress: Progress | None = None,
) -> Evidence:
    """Compare a plan with random and other plans of equal bytes, on the confirm part; see `gather_evidence`."""
    evidence = gather_evidence(
        loaded,
        plan,
        texts.part("confirm"),
        rivals=Rivals(texts=texts.part("search")),
        objective=config.objective if find_objective(config.objective).judges_sets else "worst",
        bootstrap=config.bootstrap,
        progress=progress,
        execution=Execution(work=work),
    )
    condition = overlap(texts)
    return replace(evidence, condition=condition, verdict="; ".join(filter(None, (evidence.verdict, condition))))


def quantize(
    loaded: LoadedModel,
    plan: ProtectionPlan,
    texts: TextSet,
    config: FairConfig,
    *,
    workplace: Workplace | None = None,
    progress: Progress | None = None,
) -> QuantizedModel:
    """Quantize every layer that a plan does not protect, on the calibration part where the method has a calibration.

    With our own core, or with another tool, whose integers are read back.

    Args:
        loaded: the model; bit-identical afterwards.
        plan: what keeps 16 bit, or gets 8.
        texts: the whole text set, calibrated on where the configuration names no other; `minimax` measures on its part
            `calibrate`.
        config: method, grid, backend, and how much each language counts.
        workplace: where to go on from after an interruption, and a memory budget; for our own core.
        progress: called with (layers done, layers).

    Raises:
        QuantFairnessError: as `quantize_model` and `quantize_with`.
    """
    if loaded.model.dtype == torch.bfloat16 != loaded.storage_dtype:
        raise ConfigError(
            f"dtype bfloat16 rounds the {str(loaded.storage_dtype).removeprefix('torch.')} weights of "
            f"{loaded.files.name}, so that others would be quantized; float32 is accepted. Use --dtype float32"
        )
    calibration = _calibration(loaded, texts, config) if find_method(config.method).needs_calibration else None
    if config.backend != NATIVE and calibration is not None:
        check_whole(loaded, f"quantized by {config.backend}")
        return quantize_with(config.backend, loaded, plan, method=config.method, calibration=calibration)
    method = find_method(config.method).at(config.effort)
    with_our_core = partial(
        quantize_model, loaded, plan, method=method, workplace=workplace, progress=progress, strict=config.strict
    )
    if calibration is None:
        return with_our_core()
    coverage = expert_coverage(loaded, calibration, texts)
    nearest = partial(quantize_nearest, loaded, plan)
    quantized = quantize_calibrated(lambda given: with_our_core(calibration=given), nearest, calibration, texts)
    return quantized if coverage is None else replace(quantized, experts=coverage)


def importance(
    loaded: LoadedModel,
    plan: ProtectionPlan,
    texts: TextSet,
    config: FairConfig,
    *,
    progress: Callable[[str, int, int], None],
) -> tuple[dict[str, torch.Tensor], CalibrationSet]:
    """Return how much each input channel of the modules that a plan quantizes carries, and on which rows."""
    check_whole(loaded, "run for an importance matrix")
    calibration = _calibration(loaded, texts, config)
    chosen = select_modules(loaded, plan.grid, protected=plan.protected_layers, overrides=plan.overrides).grids
    tell = partial(progress, "importance")
    return channel_importance(loaded, list(chosen), calibration, progress=tell), calibration


def _calibration(loaded: LoadedModel, texts: TextSet, config: FairConfig) -> CalibrationSet:
    """Return the calibration rows of a configuration, with those that its experts still need."""
    build = partial(
        build_calibration,
        loaded.tokenizer,
        open_documents(config, texts),
        row_tokens=min(ROW_TOKENS, position_limit(loaded.model)),
    )
    calibration = build(tokens_per_language=config.tokens_per_language, weighting=config.calibration)
    if config.tokens_per_expert is None:
        return calibration
    whole = build(languages=tuple(calibration.rows), weighting="proportional")
    return reach_experts(loaded, calibration, whole, enough=config.tokens_per_expert)
