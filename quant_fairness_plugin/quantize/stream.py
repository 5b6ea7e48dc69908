"""Quantize a model block by block: takes a `LoadedModel` and a plan, returns a `QuantizedModel`.

With calibration, every module is solved on the inputs that it will get in the quantized model: those that come out of
the quantized blocks before it and, within its block, of the modules before it (*true sequential*: attention output is
calibrated with quantized q, k, v). Modules of one fusion group share their inputs, so they share a Hessian. Where the
method makes up for what modules in front have lost (GPTQ), the rows also go through the 16-bit model, block by block.
AWQ folds each group's input scale into the module in front of it, which may be quantized by then: its integers stay and
its scales are divided.
Protected layers run in 16 bit and are left alone. At any time at most one block differs from the model passed in.
Of a `StreamedModel`, one block is in memory at a time; what is solved goes into files (`results`), and so do the rows
that do not fit the memory budget. In a folder to work in, an interrupted run goes on from the last whole layer.
"""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from pathlib import Path

from quant_fairness_plugin.artifacts import ProtectionPlan, held, temporary_folder
from quant_fairness_plugin.errors import ConfigError, UnsupportedModelError
from quant_fairness_plugin.model.load import LoadedModel
from quant_fairness_plugin.model.streamed import StreamedModel
from quant_fairness_plugin.quantize.blocks import Rows
from quant_fairness_plugin.quantize.calibration import CalibrationSet
from quant_fairness_plugin.quantize.expert_rules import check_experts
from quant_fairness_plugin.quantize.methods import check_method_grid, find_method, method_names
from quant_fairness_plugin.quantize.methods.method import Method
from quant_fairness_plugin.quantize.quantized import QuantizedModel
from quant_fairness_plugin.quantize.results import Results, StoredResults
from quant_fairness_plugin.quantize.selection import Selection, select_modules
from quant_fairness_plugin.quantize.solve_blocks import Report, Streams, Work, solve_from_weights, solve_on_inputs
from quant_fairness_plugin.quantize.workplace import Workplace, rows_allowance, work_folder

BATCH_TOKENS = 2048


def quantize_model(
    loaded: LoadedModel,
    plan: ProtectionPlan,
    *,
    method: str | Method,
    calibration: CalibrationSet | None = None,
    batch_tokens: int = BATCH_TOKENS,
    progress: Report | None = None,
    workplace: Workplace | None = None,
    strict: bool = False,
) -> QuantizedModel:
    """Quantize the linear modules of all layers that a plan does not protect.

    The model is bit-identical afterwards, also when an error or an interrupt ends the work.

    Args:
        loaded: the model; changed one block at a time while the work lasts.
        plan: which layers and units keep which precision, the grid of the others, and the share of input channels that
            keep 16 bit. Modules that their grid does not fit, or that cannot be solved on this calibration text (their
            inputs held NaN), stay in 16 bit and are listed in `kept`.
        method: a name of `methods.METHODS`, or a method with other options, such as `Gptq(damp=0.1)`.
        calibration: token rows and language weights; None for a method that needs none.
        batch_tokens: most calibration tokens that are run at once.
        progress: called with (layers done, layers) after each layer.
        workplace: a folder to go on from after an interruption, and a memory budget. Neither changes a bit.
        strict: stop at a module that cannot be solved.

    Raises:
        ConfigError: an unknown method, a calibration that is missing or not needed, a plan of another model, a grid
            that fits no module, or one that the method cannot be used with.
        InvalidLayerError: a protected layer that the model lacks, or all of them.
        ArtifactError: a weight holds NaN or infinity (names the module).
        UnsupportedModelError: no module can be solved, or with `strict` one of them (names it); or the method does not
            know the architecture.
        ResourceError: a budget that is too small, or a folder that cannot be written.
        ConfigError: another process does the same work in the folder.
    """
    place = workplace or Workplace()
    solver = find_method(method) if isinstance(method, str) else method
    selection = select_modules(loaded, plan.grid, protected=plan.protected_layers, overrides=plan.overrides)
    _check_model(loaded, plan, solver)
    _check(solver, plan, selection, calibration)
    with ExitStack() as stack:
        folder = work_folder(loaded, plan, solver, calibration, place, batch_tokens)
        if folder is not None:
            stack.enter_context(held(folder))
        in_files = folder is not None or isinstance(loaded, StreamedModel)
        results = StoredResults(folder) if in_files else Results()
        tell = progress or (lambda done, total: None)
        work = Work(loaded, solver, selection, plan.protect_columns, tell, results, strict)
        if calibration is None:
            solve_from_weights(work)
        else:
            spill = folder or stack.enter_context(temporary_folder())
            solve_on_inputs(work, _streams(work, calibration, spill, place, batch_tokens), calibration)
    return _as_model(work, plan, calibration)


def _streams(work: Work, calibration: CalibrationSet, folder: Path, place: Workplace, batch_tokens: int) -> Streams:
    """Open the calibration rows; those on their way through the 16-bit model share the memory."""
    # Channels that stay in 16 bit hold the original's values, which are no target that makes up for anything.
    compares = work.method.compares_inputs and not work.columns
    allowance = rows_allowance(
        work.loaded, calibration, place, batch_tokens, compares=compares, columns=bool(work.columns)
    )
    shared = allowance // 2 if compares and allowance is not None else allowance
    rows = partial(
        Rows, work.loaded, calibration, folder, batch_tokens=batch_tokens, allowance=shared,
        durable=place.folder is not None,
    )  # fmt: skip
    return Streams(rows(), rows(name="original") if compares else None)


def _as_model(work: Work, plan: ProtectionPlan, calibration: CalibrationSet | None) -> QuantizedModel:
    results, kept = work.results, work.selection.kept | work.results.kept
    if not results.tensors:
        raise UnsupportedModelError(f"nothing could be quantized: {next(iter(results.kept.values()))}")
    return QuantizedModel(
        loaded=work.loaded, plan=plan, method=work.method.name, tensors=results.tensors, folded=results.folded,
        kept=kept, losses=results.losses, damping=results.damping, calibration=calibration, columns=results.columns,
        grids=results.grids, settings=work.method.settings,
    )  # fmt: skip


def _check_model(loaded: LoadedModel, plan: ProtectionPlan, method: Method) -> None:
    """Refuse a plan of another model, and what the method does not do with this one."""
    if plan.layers != loaded.layers:
        raise ConfigError(
            f"the plan is for {plan.layers} layers, and the model has {loaded.layers}; use a plan of this model"
        )
    if any(group.routed for layer in range(loaded.layers) for group in loaded.family.units_of(layer)):
        check_experts(method.name, plan.grid, columns=plan.protect_columns)
    method.check_model(loaded)


def _check(method: Method, plan: ProtectionPlan, selection: Selection, calibration: CalibrationSet | None) -> None:
    """Refuse a method for a plan and a calibration that do not go with it."""
    if method.needs_calibration and calibration is None:
        raise ConfigError(
            f"method {method.name!r} needs calibration text and got none; pass build_calibration(…), or use "
            f"{method_names(lambda other: not other.needs_calibration)}"
        )
    if calibration is not None and not method.needs_calibration:
        raise ConfigError(
            f"method {method.name!r} uses no calibration text but got some; pass None, or use "
            f"{method_names(lambda other: other.needs_calibration)}"
        )
    if plan.protect_columns and not method.keeps_columns:
        raise ConfigError(
            f"columns {plan.protect_columns} cannot be used with method {method.name!r}: which channels matter only "
            f"calibration tells; use {method_names(lambda other: other.keeps_columns)}"
        )
    for grid in dict.fromkeys(selection.grids.values()):
        check_method_grid(method, grid)
