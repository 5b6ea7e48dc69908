"""Each step as a configuration says: a model, texts and a `FairConfig` in, the step's result out.

Nothing is remembered here, and nothing is done in another order than it is called; that is `FairQuantizer`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from quant_fairness_plugin.artifacts import (
    CheckpointFormat,
    Evidence,
    ExportRecord,
    Measurement,
    Part,
    Precision,
    ProtectionPlan,
    SweepReport,
    TextSet,
    UnitScores,
)
from quant_fairness_plugin.artifacts.evidence import RunResult
from quant_fairness_plugin.checkpoint.dequantize import open_checkpoint
from quant_fairness_plugin.checkpoint.in_blocks import stream_checkpoint
from quant_fairness_plugin.checkpoint.original import check_original, recorded
from quant_fairness_plugin.checkpoint.readers import check_exportable, takes_one_group_size
from quant_fairness_plugin.config import FairConfig
from quant_fairness_plugin.errors import ConfigError, QuantFairnessError, UnsupportedModelError
from quant_fairness_plugin.evidence import Rivals, gather_evidence
from quant_fairness_plugin.export.foreign import quantize_with
from quant_fairness_plugin.export.trial import try_architecture
from quant_fairness_plugin.export.verify import HALF_PRECISION_KERNELS
from quant_fairness_plugin.export.writer import export
from quant_fairness_plugin.measure.measurement import Measured, measure_states
from quant_fairness_plugin.measure.objectives import find_objective
from quant_fairness_plugin.measure.rows import embedding_rows, position_limit
from quant_fairness_plugin.measure.scoring import ModelState, block_state, fixed_state
from quant_fairness_plugin.model.activations import LARGEST_FLOAT16, largest_activation, probe_rows
from quant_fairness_plugin.model.architectures.experts import find_mixture
from quant_fairness_plugin.model.devices import describe_device, find_device, find_dtype
from quant_fairness_plugin.model.in_memory import copy_model
from quant_fairness_plugin.model.load import LoadedModel, empty_model, load_model, load_tokenizer
from quant_fairness_plugin.model.provenance import provenance
from quant_fairness_plugin.model.resolve import ModelFiles
from quant_fairness_plugin.model.storage import storage_dtype
from quant_fairness_plugin.model.streamed import StreamedModel, largest_in_blocks, open_streamed
from quant_fairness_plugin.model.tokenizer import check_vocabulary, is_plain
from quant_fairness_plugin.planning import limit_of
from quant_fairness_plugin.plans.costs import NO_OVERRIDES, count_bytes, with_columns
from quant_fairness_plugin.plans.plan_set import BASELINE, NONE
from quant_fairness_plugin.preflight import Checked, ModelSource, check_model, check_units, open_texts
from quant_fairness_plugin.quantize.backends import NATIVE
from quant_fairness_plugin.quantize.calibration import ROW_TOKENS, CalibrationSet, build_calibration
from quant_fairness_plugin.quantize.coverage import expert_coverage, reach_experts
from quant_fairness_plugin.quantize.in_blocks import quantized_state
from quant_fairness_plugin.quantize.methods import find_method
from quant_fairness_plugin.quantize.minimax import quantize_calibrated
from quant_fairness_plugin.quantize.selection import group_sizes
from quant_fairness_plugin.quantize.stream import QuantizedModel, Workplace, quantize_model
from quant_fairness_plugin.recommend import explicit_plan, recommend_plan
from quant_fairness_plugin.recommend.assembly import Choice
from quant_fairness_plugin.serve.load import load_quantized
from quant_fairness_plugin.sweep.checkpoint_bank import bank_recipe
from quant_fairness_plugin.sweep.config import SweepConfig
from quant_fairness_plugin.sweep.engine import sweep_units
from quant_fairness_plugin.sweep.execution import Execution
from quant_fairness_plugin.texts.parts import overlap, true_part, used_before

EXPORTED = "exported"
_logger = logging.getLogger(__name__)
Progress = Callable[[int, int], None]
"""Called with (done, in all)."""


def load_checked(
    checked: Checked,
    source: ModelSource,
    config: FairConfig,
    *,
    stream: bool = False,
    memory_budget: int | None = None,
) -> LoadedModel:
    """Load the model that `preflight` resolved, and check the tokenizer where that had to wait for Transformers.

    With a memory budget in bytes its blocks stay in their files; on a CPU with `stream` too, where they can be read so.

    Raises:
        ConfigError: a device that this machine does not have; before anything is read.
    """
    device = find_device(config.device)
    stored = str(storage_dtype(checked.files)).removeprefix("torch.")
    compute = getattr(torch, find_dtype(config.dtype, device, stored=stored))
    sentences, trust = probe_sentences(checked.texts), source.trust_remote_code
    whole = partial(
        load_model, checked.files, dtype=compute, trust_remote_code=trust, device=device, sentences=sentences
    )
    in_blocks = partial(
        open_streamed, checked.files, dtype=compute, trust_remote_code=trust, device=device, sentences=sentences
    )
    loaded: LoadedModel
    if memory_budget is not None:
        loaded = replace(in_blocks(), memory_budget=memory_budget)
    elif stream and str(device).startswith("cpu") and _can_stream(checked.files):
        try:
            loaded = in_blocks()
        except QuantFairnessError as err:
            _logger.info("%s is loaded as a whole: %s", checked.files.name, err)
            loaded = whole()  # what is wrong with the model itself is said again
    else:
        loaded = whole()
    _logger.info("%s: computed in %s on %s", checked.files.name, compute, describe_device(loaded.model.device))
    if not is_plain(checked.files):
        check_tokens(loaded, checked.texts)
    return loaded


def _can_stream(files: ModelFiles) -> bool:
    """Return whether blocks can be read from the files; experts are read with the whole model."""
    readable = bool(files.weights) and files.weights[0].suffix == ".safetensors"
    return readable and find_mixture(str(files.config.get("model_type", ""))) is None


def needs_no_sweep(config: FairConfig) -> bool:
    """Return whether a configuration's checkpoint is made without a sweep and without another tool.

    Only these take the whole model, or are faster with it where it fits memory.
    """
    return config.protect_layers != "auto" and config.backend == NATIVE


def probe_sentences(texts: TextSet) -> list[str]:
    """Return a sentence of every language of the calibration part, on which the range of activations is looked at."""
    return [rows[0] for rows in texts.part("calibrate").sentences.values() if rows]


def check_tokens(loaded: LoadedModel, texts: TextSet) -> None:
    """Check that the model has an embedding for every token of the texts; see `check_vocabulary`."""
    check_vocabulary(loaded.tokenizer, texts, rows=embedding_rows(loaded.model), name=loaded.files.name)


def open_in_memory(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, config: FairConfig, texts: TextSet | None
) -> tuple[LoadedModel, TextSet]:
    """Copy a model that is in memory, check the configuration against it, and return it with the texts.

    The copy is computed in float32, where the model is, or on the device that the configuration names.

    Raises:
        ConfigError: another dtype, a device that is not there, or a configuration that does not fit the model.
    """
    if config.dtype == "bfloat16":
        raise ConfigError(
            "dtype bfloat16 is accepted together with a model's name or folder; a model in memory is computed in "
            "float32. Leave dtype out, or save the model and name its folder"
        )
    device = None if config.device == "auto" else find_device(config.device)
    sentences = open_texts(config, texts)
    loaded = copy_model(model, tokenizer, sentences=probe_sentences(sentences))
    if device is not None:
        loaded.model.to(device)  # type: ignore[arg-type] # Transformers types `to` as if it were a method of the class
    check_model(config, loaded.files)
    check_tokens(loaded, sentences)
    return loaded, sentences


def check_config(config: FairConfig, loaded: LoadedModel) -> None:
    """Refuse layers or units that the model lacks; warn of a group size that its units do not fit.

    Raises:
        InvalidLayerError: says which.
        ConfigError: a stated group size that does not fit every unit, and the configuration is strict.
    """
    family = loaded.family
    check_units(config, units=lambda layer: tuple(unit.name for unit in family.units_of(layer)), layers=loaded.layers)
    config.check_group_size(loaded)


def fit_config(config: FairConfig, loaded: LoadedModel) -> FairConfig:
    """Return the configuration with the largest group size that units of the model, format and reader take."""
    return config.fitted(loaded, uniform=takes_one_group_size(config.format, config.reader))


def check_whole(loaded: LoadedModel, step: str) -> None:
    """Refuse a step that needs the whole model in memory, for one whose blocks stay in their files.

    Raises:
        ConfigError: the model was opened with a memory budget.
    """
    if isinstance(loaded, StreamedModel):
        raise ConfigError(
            f"{loaded.files.name} was opened block by block, as with a memory budget: it can be swept, quantized and "
            f"measured, and not {step}, which takes the whole model. Open it without a memory budget"
        )


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
    baseline = block_state(BASELINE, loaded, kept=kept)
    return measure_states(
        baseline,
        states or (baseline,),
        loaded.tokenizer,
        texts.part(part),
        part=true_part(texts, part),
        # Nothing is selected for the 16-bit model itself, so that all sentences are new to it.
        condition=used_before(texts, part) if states else "",
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


def recommend(loaded: LoadedModel, config: FairConfig, report: SweepReport | None) -> ProtectionPlan:
    """Return the plan of a configuration, its 16-bit input channels included.

    Args:
        loaded: the model.
        config: names the layers, or leaves them to a sweep with `protect_layers="auto"`.
        report: the sweep, for `auto`.

    Raises:
        ConfigError: `auto` without a sweep, `top` is not a number of the units that were swept, or the objective is
            undefined for the sweep.
        QualityGateError: the ranking is unstable and the configuration is strict.
    """
    if config.protect_layers == "auto":
        if report is None:
            raise ConfigError('protect_layers "auto" needs a sweep; sweep first, or list the layers')
        plan = recommend_plan(
            report,
            limit_of(loaded, config),
            objective=config.decides_by,
            top=config.top,
            strict=config.strict,
            overrides=config.overrides,
        )
    else:
        layers = () if config.protect_layers == "none" else config.protect_layers
        plan = plan_of_layers(loaded, config, layers, config.overrides)
    return with_columns(plan, loaded, config.protect_columns)


def plan_of_layers(
    loaded: LoadedModel, config: FairConfig, layers: tuple[int, ...], overrides: Choice = NO_OVERRIDES
) -> ProtectionPlan:
    """Return the plan that keeps these layers in 16 bit, and gives units the precisions of `overrides`."""
    layer_bytes, other_bytes = count_bytes(loaded, config.grid)
    return explicit_plan(
        layers,
        model=loaded.files.name,
        grid=config.grid,
        layer_bytes=layer_bytes,
        other_bytes=other_bytes,
        overrides=overrides,
    )


def plan_of_quantized(quantized: QuantizedModel, loaded: LoadedModel) -> ProtectionPlan:
    """Return the plan that a quantized model of this model was made by.

    Raises:
        ConfigError: another model, or another instance of it, was quantized.
    """
    if quantized.loaded is not loaded:
        raise ConfigError(
            f"the quantized model was made from another instance of {quantized.loaded.files.name}; one made by this "
            "quantizer or a copy of it is accepted. Export it with the quantizer that made it"
        )
    return quantized.plan


def check_plan(plan: ProtectionPlan, loaded: LoadedModel, config: FairConfig) -> None:
    """Refuse a plan of another model or grid, or with several group sizes for a format or reader that takes one.

    Raises:
        ConfigError: a plan for another number of layers, or for another grid than the configuration's.
        UnsupportedModelError: group sizes that the format or the reader does not take; names the ways out.
    """
    if plan.layers == loaded.layers and takes_one_group_size(config.format, config.reader):
        sizes = group_sizes(loaded, plan.grid, protected=plan.protected_layers).values()
        if len(set(sizes)) > 1:
            form, reader = config.format, config.reader
            check_exportable(loaded.family, format=form, grid=plan.grid, reader=reader, group_sizes=sizes)
    if (plan.layers, plan.grid) != (loaded.layers, config.grid):
        raise ConfigError(
            f"the plan is for {plan.layers} layers of {plan.model} and {plan.grid}; here are {loaded.layers} "
            f"layers and {config.grid}. Name the plan's model and grid, or make another plan"
        )


def check_report(report: SweepReport | UnitScores, loaded: LoadedModel, config: FairConfig) -> None:
    """Refuse a sweep that the plan cannot come from.

    Raises:
        ConfigError: the configuration names the layers, or a sweep of another number of layers or another grid.
    """
    if config.protect_layers != "auto":
        raise ConfigError(
            f"protect_layers {config.protect_layers!r} leaves a sweep nothing to decide; a report is accepted with "
            '"auto". Call protecting("auto") first'
        )
    if (report.layers, report.grid) != (loaded.layers, config.grid):
        raise ConfigError(
            f"the sweep is of {report.layers} layers and {report.grid}; here are {loaded.layers} layers and "
            f"{config.grid}. Sweep this model on this grid"
        )


def check_exportable_before_sweep(loaded: LoadedModel, config: FairConfig) -> dict[str, Precision]:
    """Check what is known of the plan before its sweep against format and reader, and return these precisions.

    Raises:
        UnsupportedModelError: the reader could not load a checkpoint with them; names the ways out.
        ConfigError: the model was opened with a memory budget, so that it cannot be quantized.
    """
    expected = config.overrides
    if config.protect_layers == "auto" and config.precisions is not None and "int8" in config.precisions:
        expected = {"layers.0": "int8", **expected}
    check_exportable_plan(loaded, config, expected)
    return expected


def check_exportable_plan(
    loaded: LoadedModel, config: FairConfig, overrides: Mapping[str, Precision], *, protected: Collection[int] = ()
) -> None:
    """Check precisions and group sizes against format and reader. Raises as `check_exportable_before_sweep`."""
    if isinstance(loaded, StreamedModel) and not _can_stream(loaded.files):
        check_whole(loaded, "quantized, as it holds experts")
    check_exportable(
        loaded.family,
        format=config.format,
        grid=config.grid,
        reader=config.reader,
        overrides=overrides,
        group_sizes=group_sizes(loaded, config.grid, protected=protected).values(),
    )


def try_export(loaded: LoadedModel, texts: TextSet, config: FairConfig) -> None:
    """Check before the work what an export would meet at its end.

    Raises:
        UnsupportedModelError: a small model of an architecture without a record cannot be exported, or activations
            exceed float16, in which the format's readers compute.
    """
    if config.format in HALF_PRECISION_KERNELS and loaded.storage_dtype != torch.float16:
        rows = probe_rows(loaded.model, loaded.tokenizer, loaded.family, probe_sentences(texts))
        largest = (
            largest_in_blocks(loaded, rows)
            if isinstance(loaded, StreamedModel)
            else largest_activation(loaded.model, rows)
        )
        if largest > LARGEST_FLOAT16:
            raise UnsupportedModelError(
                f"{loaded.files.name}: activations reach {largest:.3g}, and readers of {config.format} compute in "
                f"float16, which ends at {LARGEST_FLOAT16:.5g}; formats whose readers compute in bfloat16 are "
                "accepted. Use --format compressed-tensors."
            )
    try_architecture(
        loaded.model, loaded.tokenizer, texts=texts, format=config.format, reader=config.reader, grid=config.grid
    )


def format_problems(
    files: ModelFiles,
    texts: TextSet,
    config: FairConfig,
    formats: Iterable[CheckpointFormat],
    *,
    trust_remote_code: bool = False,
) -> dict[CheckpointFormat, str]:
    """Return the formats in which a small model of an architecture without a record fails, with the reason.

    Loads no weight of the model.
    """
    model = empty_model(files, trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(files, trust_remote_code=trust_remote_code)
    problems: dict[CheckpointFormat, str] = {}
    for form in formats:
        try:
            try_architecture(model, tokenizer, texts=texts, format=form, reader="transformers", grid=config.grid)
        except UnsupportedModelError as err:
            problems[form] = str(err)
    return problems


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
        texts: the whole text set; `minimax` also measures on its search part.
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
    with_our_core = partial(
        quantize_model,
        loaded,
        plan,
        method=config.method,
        workplace=workplace,
        progress=progress,
    )
    if calibration is None:
        return with_our_core()
    coverage = expert_coverage(loaded, calibration, texts)
    quantized = quantize_calibrated(lambda given: with_our_core(calibration=given), calibration, texts)
    return quantized if coverage is None else replace(quantized, experts=coverage)


def _calibration(loaded: LoadedModel, texts: TextSet, config: FairConfig) -> CalibrationSet:
    """Return the calibration rows of a configuration, with those that its experts still need."""
    build = partial(
        build_calibration,
        loaded.tokenizer,
        texts.part("calibrate"),
        row_tokens=min(ROW_TOKENS, position_limit(loaded.model)),
    )
    calibration = build(tokens_per_language=config.tokens_per_language, weighting=config.calibration)
    if config.tokens_per_expert is None:
        return calibration
    whole = build(languages=tuple(calibration.rows), weighting="proportional")
    return reach_experts(loaded, calibration, whole, enough=config.tokens_per_expert)


def write(
    quantized: QuantizedModel,
    out: Path,
    texts: TextSet,
    config: FairConfig,
    *,
    overwrite: bool = False,
    measure: Callable[[Path], Measurement] | None = None,
) -> ExportRecord:
    """Write, verify and measure a checkpoint in the configuration's format, for its reader; see `export`."""
    return export(
        quantized,
        out,
        texts=texts,
        format=config.format,
        reader=config.reader,
        seed=config.seed,
        overwrite=overwrite,
        measure=measure,
    )


def compare(record: ExportRecord, measured: Measured) -> RunResult:
    """Return what protection did: the export beside the same quantization without protection, measured together."""
    assert record.measurement is not None
    return RunResult(
        plan=record.plan,
        record=record,
        unprotected=measured.measurements[NONE],
        protected=record.measurement,
        gain=measured.gain(NONE, EXPORTED),
    )


def unprotected_state(bare: QuantizedModel) -> ModelState:
    """Return the state of a model that was quantized without protection, in memory."""
    return quantized_state(NONE, bare)


def check_folder(folder: Path, loaded: LoadedModel) -> bool:
    """Return whether the checksum of a folder's original was compared with this model's; see `check_original`.

    Raises:
        ConfigError: the folder was made from another model: the checksum or the embedding says so.
    """
    if check_original(folder, loaded.files):
        return True
    name = f"{loaded.family.embeddings[0]}.weight"
    on_disk = loaded.family.stored_name(name)
    checkpoint = open_checkpoint(folder)
    if on_disk in checkpoint.plain and recorded(folder) is not None:
        stored, here = checkpoint.tensor(on_disk), loaded.stored(name)
        if not torch.equal(here.to(stored.dtype), stored):
            raise ConfigError(
                f"{folder} was not made from {loaded.files.name}: their embeddings differ. Name the original"
            )
    return False


def measured_folder(
    measurement: Measurement, folder: Path, texts: TextSet, part: Part, *, compared: bool
) -> Measurement:
    """Return a folder's measurement with what its record says of the sentences, and how its original is known.

    Args:
        measurement: of the folder.
        folder: the checkpoint.
        texts: the whole text set that it was measured on.
        part: the part of it.
        compared: what `check_folder` returned.
    """
    record = recorded(folder)
    if record is None:
        held_out, condition = None, f"what {folder.name} was calibrated on is not recorded"
    elif not record.calibration and record.plan.source in ("none", "explicit"):
        held_out, condition = True, ""  # no sentence was used
    elif record.provenance.text_set != texts.name:
        held_out = None
        condition = f"made on {record.provenance.text_set}: whether {texts.name} shares sentences with it is not known"
    else:
        condition = used_before(texts, part)
        held_out = not condition
    return replace(measurement, held_out=held_out, condition=condition, original_compared=compared)


def exported_state(folder: Path, loaded: LoadedModel, *, name: str = EXPORTED) -> ModelState:
    """Return the state of a written checkpoint, read back from its files by our own dequantizer.

    It is computed where and in what the 16-bit model is, so that a difference is not one of devices or dtypes; block
    by block where the 16-bit model is, else as a whole.
    """
    device = loaded.model.device
    if isinstance(loaded, StreamedModel):
        try:
            streamed = stream_checkpoint(folder, loaded.tokenizer, dtype=loaded.compute, device=str(device))
            return block_state(name, streamed)
        except UnsupportedModelError as err:
            if loaded.memory_budget is not None:
                raise
            _logger.info("%s is loaded as a whole: %s", folder, err)
    model = load_quantized(folder, kernel="reference")
    for parameter in model.parameters():  # and no buffer: positions stay exact in bfloat16
        parameter.data = parameter.data.to(loaded.model.dtype)
    model.to(device)  # type: ignore[arg-type] # Transformers types `to` as if it were a method of the class
    return fixed_state(name, model)
