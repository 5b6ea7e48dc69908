"""Checkpoints: what an export would meet, writing one, and measuring what was written."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from quant_fairness_plugin.artifacts import CheckpointFormat, ExportRecord, Measurement, Part, TextSet
from quant_fairness_plugin.artifacts.evidence import RunResult
from quant_fairness_plugin.checkpoint.dequantize import open_checkpoint
from quant_fairness_plugin.checkpoint.in_blocks import stream_checkpoint
from quant_fairness_plugin.checkpoint.original import check_original, recorded
from quant_fairness_plugin.checkpoint.others import weights_alone
from quant_fairness_plugin.checkpoint.readers.compare import HALF_PRECISION_KERNELS
from quant_fairness_plugin.config import FairConfig
from quant_fairness_plugin.errors import ConfigError, UnsupportedModelError
from quant_fairness_plugin.export.trial import try_architecture
from quant_fairness_plugin.export.writer import Measure, export
from quant_fairness_plugin.measure.measurement import Measured
from quant_fairness_plugin.measure.scoring import ModelState, block_state, fixed_state
from quant_fairness_plugin.model.activations import LARGEST_FLOAT16, largest_activation, probe_rows
from quant_fairness_plugin.model.load import LoadedModel, empty_model, load_tokenizer
from quant_fairness_plugin.model.resolve import ModelFiles
from quant_fairness_plugin.model.streamed import StreamedModel, largest_in_blocks
from quant_fairness_plugin.plans.plan_set import NONE
from quant_fairness_plugin.quantize.in_blocks import quantized_state
from quant_fairness_plugin.quantize.quantized import QuantizedModel
from quant_fairness_plugin.serve.load import load_quantized
from quant_fairness_plugin.steps.held_out import held_out_of
from quant_fairness_plugin.steps.opening import probe_sentences
from quant_fairness_plugin.texts.parts import used_before

_logger = logging.getLogger(__name__)

EXPORTED = "exported"


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


def write(
    quantized: QuantizedModel,
    out: Path,
    texts: TextSet,
    config: FairConfig,
    *,
    overwrite: bool = False,
    measure: Measure | None = None,
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


def name_measuring(states: Sequence[ModelState]) -> str:
    """Return what is measured, in words for people who wait for it."""
    words = {NONE: "the model without protection", EXPORTED: "the checkpoint"}
    named = [words.get(state.name, f"checkpoint {state.name}") for state in states] or ["the 16-bit model"]
    return f"measure {' and '.join(named)}"


def unprotected_state(bare: QuantizedModel) -> ModelState:
    """Return the state of a model that was quantized without protection, in memory."""
    return quantized_state(NONE, bare)


def exported_state(folder: Path, loaded: LoadedModel, *, name: str = EXPORTED) -> ModelState:
    """Return the state of a written checkpoint, read back from its files by our own dequantizer.

    It is computed where and in what the 16-bit model is, so that a difference is not one of devices or dtypes; block
    by block where the 16-bit model is, else as a whole.
    """
    if isinstance(loaded, StreamedModel):
        try:
            device = str(loaded.model.device)
            streamed = stream_checkpoint(folder, loaded.tokenizer, dtype=loaded.compute, device=device)
            return block_state(name, replace(streamed, memory_budget=loaded.memory_budget))
        except UnsupportedModelError as err:
            if loaded.memory_budget is not None:
                raise
            _logger.warning("%s is loaded as a whole, which takes more memory: %s", folder, err)
    return fixed_state(name, whole_checkpoint(folder, loaded))


def whole_checkpoint(folder: Path, loaded: LoadedModel) -> PreTrainedModel:
    """Return the model of a written checkpoint by our own dequantizer, in the dtype and place of the 16-bit model."""
    model = load_quantized(folder, kernel="reference")
    for parameter in model.parameters():  # and no buffer: positions stay exact in bfloat16
        parameter.data = parameter.data.to(loaded.model.dtype)
    model.to(loaded.model.device)  # type: ignore[arg-type] # Transformers types `to` as if it were a method of the class
    return model


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
    measurement: Measurement, folder: Path, texts: TextSet, part: Part, *, compared: bool, made_here: bool = False
) -> Measurement:
    """Return a folder's measurement with what its record says of the sentences, and how its original is known.

    Args:
        measurement: of the folder.
        folder: the checkpoint.
        texts: the whole text set that it was measured on.
        part: the part of it.
        compared: what `check_folder` returned.
        made_here: it was made from these texts, and has no record.
    """
    record = None if made_here else recorded(folder)
    if made_here:
        condition = used_before(texts, part)
        held_out: bool | None = not condition
    elif record is None:
        held_out, condition = None, f"what {folder.name} was calibrated on is not recorded"
    else:
        held_out, condition = held_out_of(record, texts, part)
    condition = "; ".join(filter(None, [condition, weights_alone(folder)]))
    return replace(measurement, held_out=held_out, condition=condition, original_compared=compared)
