"""A `QuantizedModel` in, a verified checkpoint folder and its `ExportRecord` out; complete, or not there."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quant_fairness_plugin.artifacts import (
    BeforeAndAfter,
    CheckpointFormat,
    ExportRecord,
    Measurement,
    Part,
    TextSet,
    UsedSentences,
    join_digests,
    save,
    sentence_digests,
)
from quant_fairness_plugin.artifacts.plans import UNSEARCHED
from quant_fairness_plugin.checkpoint.columns import check_difference, read_columns, write_columns
from quant_fairness_plugin.checkpoint.dequantize import iterate_dense
from quant_fairness_plugin.checkpoint.folder import RECORD, check_recorded_files, file_record, list_files
from quant_fairness_plugin.checkpoint.formats import stored_format
from quant_fairness_plugin.checkpoint.formats.format import Format
from quant_fairness_plugin.checkpoint.module_map import module_map, own_widths, stored_name
from quant_fairness_plugin.checkpoint.original import IN_MEMORY
from quant_fairness_plugin.checkpoint.readers import check_exportable
from quant_fairness_plugin.errors import ArtifactError, ConfigError, ResourceError
from quant_fairness_plugin.export.card import render_card
from quant_fairness_plugin.export.companions import Companions, companions_of
from quant_fairness_plugin.export.contents import checkpoint_tensors
from quant_fairness_plugin.export.copies import Copies, copies_of
from quant_fairness_plugin.export.shards import write_shards
from quant_fairness_plugin.export.source_card import SourceCard, read_source_card
from quant_fairness_plugin.export.staging import check_output, staged_folder
from quant_fairness_plugin.export.verify import VerifyReport, verify
from quant_fairness_plugin.model.activations import ROW_TOKENS
from quant_fairness_plugin.model.freed import returned_when_freed
from quant_fairness_plugin.model.linear import is_conv1d
from quant_fairness_plugin.model.load import LoadedModel
from quant_fairness_plugin.model.provenance import provenance
from quant_fairness_plugin.model.source_format import QUANTIZATION_KEYS
from quant_fairness_plugin.model.streamed import budget_of
from quant_fairness_plugin.quantize.methods import find_method
from quant_fairness_plugin.quantize.quantized import QuantizedModel

Measure = Callable[[Path], Measurement | BeforeAndAfter]
_logger = logging.getLogger(__name__)


def export(
    quantized: QuantizedModel,
    out: str | Path,
    *,
    texts: TextSet,
    format: CheckpointFormat = "compressed-tensors",
    reader: str = "transformers",
    seed: int = 0,
    overwrite: bool = False,
    measure: Measure | None = None,
) -> ExportRecord:
    """Write a checkpoint folder beside its final name, verify it, measure it, and only then give it that name.

    Args:
        quantized: the quantized model; not changed.
        out: the folder to make.
        texts: the text set that the plan, the calibration and the measurement come from.
        format: one of `checkpoint.formats.FORMATS`.
        reader: who must be able to load it, one of `checkpoint.readers.READERS`.
        seed: the seed of the whole line, recorded.
        overwrite: replace an earlier export of that name.
        measure: measures a written folder, and may add what the same quantization without protection does; its result
            goes into the record and the card.

    Returns:
        The content of `quant_fairness.json`.

    Raises:
        ConfigError: `out` exists, or holds the source model.
        UnsupportedModelError: the reader cannot load this model in this format, or computes something else.
        ArtifactError: what was written is not what was quantized.
        ResourceError: no space or permission. In all cases nothing is left behind.
    """
    out, loaded, plan = Path(out), quantized.loaded, quantized.plan
    _check_exportable(quantized, format, reader)
    layout = stored_format(format, plan.grid)
    check_output(out.resolve(), overwrite=overwrite)
    _check_source(quantized, out)
    companions, copies = companions_of(loaded), copies_of(loaded)
    card = read_source_card(loaded.files, companions)
    record = _new_record(quantized, texts, layout, copies, reader=reader, seed=seed)
    with staged_folder(out, overwrite=overwrite) as folder:
        _check_space(quantized, folder)
        _write_model(quantized, folder, layout, copies)
        _copy_companions(loaded, companions, folder)
        record = _describe(record, card, folder)
        _compare_with_memory(quantized, folder, layout)
        report = verify(folder, rows=_served_rows(quantized), memory_budget=budget_of(loaded))
        _say_what_was_left_out(out, report, budget_of(loaded))
        record = _describe(replace(record, reader_run=report.reader_run), card, folder)
        if measure is not None:
            record = _describe(_measured(record, measure(folder)), card, folder)
        check_recorded_files(folder, record)
    if (summary := copies.summary()) and loaded.files.weights:
        _logger.warning("%s: %s", out, summary)
    return record


def _check_exportable(quantized: QuantizedModel, format: CheckpointFormat, reader: str) -> None:
    """Refuse a model that the reader cannot load in this format."""
    loaded, plan = quantized.loaded, quantized.plan
    check_exportable(
        loaded.family,
        format=format,
        grid=plan.grid,
        reader=reader,
        overrides=plan.singled_out,
        group_sizes={grid.group_size for grid in quantized.module_grids.values()},  # no integers are read for this
        dtype=str(loaded.storage_dtype).removeprefix("torch."),
    )


def _measured(record: ExportRecord, found: Measurement | BeforeAndAfter) -> ExportRecord:
    """Return the record with what was measured; a plan is a prediction until sentences that are new to it were read."""
    before = found.unprotected if isinstance(found, BeforeAndAfter) else None
    measured = found.protected if isinstance(found, BeforeAndAfter) else found
    plan = replace(record.plan, predicted=record.plan.predicted and measured.held_out is False)
    return replace(record, plan=plan, measurement=measured, unprotected=before)


def _say_what_was_left_out(out: Path, report: VerifyReport, memory_budget: int | None) -> None:
    """Warn of checks that a memory budget kept from being run."""
    for check in () if memory_budget is None else report.checks:
        if check.outcome == "not run":
            _logger.warning("%s: %s not run: %s", out, check.name, check.detail)


def _new_record(
    quantized: QuantizedModel, texts: TextSet, layout: Format, copies: Copies, *, reader: str, seed: int
) -> ExportRecord:
    """Return what is known of a checkpoint before its files are written."""
    loaded, plan = quantized.loaded, quantized.plan
    arguments: dict[str, Any] = {
        "format": layout.name,
        "reader": reader,
        "method": quantized.method,
        "plan": plan.source,
    }
    if loaded.files.memory_sha256 is not None:
        arguments[IN_MEMORY] = True
    made = provenance(
        loaded,
        texts,
        seed=seed,
        arguments=arguments | {"backend": quantized.backend, "settings": dict(quantized.settings)},
    )
    return ExportRecord(
        provenance=replace(made, versions=made.versions | dict(quantized.versions)),
        method=quantized.method,
        format=layout.name,
        plan=plan,
        family=loaded.family.name,
        quantized_modules=quantized.bits,
        group_sizes={
            name: grid.group_size
            for name, grid in quantized.module_grids.items()
            if grid.group_size != plan.grid.group_size
        },
        kept_modules=quantized.kept,
        linear_modules=sum(len(loaded.linears(layer)) for layer in range(loaded.layers)),
        sixteen_bit_bytes=2 * loaded.parameters,
        calibration=quantized.calibration.summary() if quantized.calibration is not None else {},
        measurement=None,
        experts=quantized.experts,
        copied_tensors=copies.checksums(),
        protected_columns={n: len(c.index) for n, c in quantized.columns.items()} if layout.packs else {},
        sentences=_used_sentences(quantized, texts),
    )


def _used_sentences(quantized: QuantizedModel, texts: TextSet) -> UsedSentences:
    """Return what a checkpoint was made with: its calibration text, and the sentences that its plan was searched on."""
    calibration = quantized.calibration
    calibrated = "" if calibration is None else calibration.sentences
    if calibration is not None and calibration.weighting == "minimax":  # the weights are chosen by losses on these
        calibrated = join_digests(calibrated, _digests_of(texts, "calibrate"))
    searched = quantized.plan.source not in UNSEARCHED
    return UsedSentences(calibrated=calibrated, searched=_digests_of(texts, "search") if searched else "")


def _digests_of(texts: TextSet, part: Part) -> str:
    return sentence_digests(text for rows in texts.part(part).sentences.values() for text in rows)


def _served_rows(quantized: QuantizedModel) -> list[tuple[int, ...]]:
    """Return the beginning of a calibration row of every language; none where nothing was calibrated."""
    rows = quantized.calibration.rows if quantized.calibration is not None else {}
    return [some[0][:ROW_TOKENS] for some in rows.values() if some]


def _check_source(quantized: QuantizedModel, out: Path) -> None:
    """Refuse an output that would swallow the source."""
    source = quantized.loaded.files.folder.resolve()
    if out.resolve() in (source, *source.parents):
        raise ConfigError(f"{out} holds the source model; the output must be another folder. Choose another name.")


def _check_space(quantized: QuantizedModel, folder: Path) -> None:
    """Refuse before writing what cannot fit. A tenth is added for scales, metadata and the file system."""
    packed = sum(prod(quantized.loaded.matrix(name)) for name in quantized.tensors)
    parameters = sum(parameter.numel() for parameter in quantized.loaded.model.parameters())
    needed = int(1.1 * (2 * (parameters - packed) + packed))
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ResourceError(
            f"{folder.parent}: {free} bytes are free, about {needed} are needed. Free space, or write elsewhere."
        )


@returned_when_freed()
def _write_model(quantized: QuantizedModel, folder: Path, layout: Format, copies: Copies) -> None:
    """Weights, `config.json`, and the format's side files."""
    loaded = quantized.loaded
    columns = quantized.columns if layout.packs else {}
    tensors = chain(checkpoint_tensors(quantized, layout), copies.read())
    write_shards(tensors, folder, indexed=bool(columns))
    write_columns(columns, folder)
    config = {key: value for key, value in loaded.files.config.items() if key not in QUANTIZATION_KEYS}
    config |= _dtypes(loaded) | _tying(loaded)
    if layout.packs:
        bits = own_widths(quantized.bits)
        sizes = {name: grid.group_size for name, grid in quantized.module_grids.items()}
        modules = module_map(
            loaded.model, loaded.family, quantized.tensors, bits=bits, sizes=sizes, unread=copies.roots
        )
        grid = replace(quantized.grid, group_size=modules.usual_size(quantized.grid.group_size))
        config["quantization_config"] = layout.quantization_config(modules, grid)
        for name, content in layout.side_files(modules, grid).items():
            _write_json(folder / name, content)
    _write_json(folder / "config.json", config)


def _dtypes(loaded: LoadedModel) -> dict[str, Any]:
    """Return what the config has to say of the storage dtype, in its part for text too where that says one."""
    dtype, config = str(loaded.storage_dtype).removeprefix("torch."), loaded.files.config
    changed: dict[str, Any] = {"dtype": dtype} | ({"torch_dtype": dtype} if "torch_dtype" in config else {})
    text = config.get("text_config")
    if isinstance(text, dict):
        said = {key: dtype for key in ("dtype", "torch_dtype") if text.get(key) is not None}
        changed["text_config"] = text | said
    return changed


def _tying(loaded: LoadedModel) -> dict[str, bool]:
    """Return what the config has to say where the file holds a head that the source's config ties to the embedding."""
    untied = not loaded.family.tied_head and getattr(loaded.model.config, "tie_word_embeddings", False)
    return {"tie_word_embeddings": False} if untied else {}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _copy_companions(loaded: LoadedModel, companions: Companions, folder: Path) -> None:
    """Tokenizer, generation config, chat templates, licence: what a reader or a person needs, byte for byte."""
    companions.copy(folder)
    if not loaded.files.weights:  # a model that was only in memory has no folder
        loaded.tokenizer.save_pretrained(folder)
        if loaded.model.generation_config is not None:
            # `save_pretrained` refuses what Transformers itself loads and publishes, such as a temperature alone.
            loaded.model.generation_config.to_json_file(folder / "generation_config.json")


def _describe(record: ExportRecord, source: SourceCard, folder: Path) -> ExportRecord:
    """Write the card and `quant_fairness.json`; returns the record with all files in it.

    Weights that the record lists already are not read again for it.
    """
    (folder / "README.md").write_text(render_card(record, source), encoding="utf-8")
    known = {name: file for name, file in record.files.items() if name.endswith(".safetensors")}
    record = replace(record, files={name: known.get(name) or file_record(folder / name) for name in list_files(folder)})
    save(record, folder / RECORD)
    return record


@returned_when_freed()
def _compare_with_memory(quantized: QuantizedModel, folder: Path, layout: Format) -> None:
    """What the files say must be the integers that were quantized and the values that were folded, bit for bit."""
    expected = _expected_values(quantized, twin=not layout.packs)
    for name, stored in iterate_dense(folder, names=frozenset(expected)):
        if not torch.equal(stored, expected.pop(name)()):
            raise ArtifactError(f"{folder / name}: what was written is not what was quantized. Report this as a bug.")
    if expected:
        raise ArtifactError(
            f"{folder}: {len(expected)} tensors were not written, first {min(expected)}. Report this as a bug."
        )
    if layout.packs:
        _compare_columns(quantized, folder)


def _compare_columns(quantized: QuantizedModel, folder: Path) -> None:
    """The side file must hold what the integers lack; where scales were moved, it is compared with memory alone."""
    in_file = read_columns(folder)
    for name in sorted(in_file.keys() | quantized.columns.keys()):
        kept, written = quantized.columns.get(name), in_file.get(name)
        if kept is None or written is None or not torch.equal(kept.delta.cpu(), written.delta):
            raise ArtifactError(f"{folder}: the columns of {name} are not what was kept. Report this as a bug.")
        if not find_method(quantized.method).moves_scales:
            weight = quantized.loaded.stored(f"{name}.weight").float()
            weight = weight.t() if is_conv1d(quantized.loaded.model.get_submodule(name)) else weight
            check_difference(name, written, weight, quantized.tensors[name].dequantize().cpu())


def _expected_values(quantized: QuantizedModel, *, twin: bool) -> dict[str, partial[Tensor]]:
    """Tensor name on disk → how to compute its float32 value, one at a time."""
    loaded = quantized.loaded

    def weight(module: str) -> Tensor:
        dense = (quantized.dense_weight(module) if twin else quantized.tensors[module].dequantize()).cpu()
        dense = dense.t() if is_conv1d(loaded.model.get_submodule(module)) else dense
        return dense.to(loaded.storage_dtype).float() if twin else dense

    def folded(name: str) -> Tensor:
        return quantized.folded[name].to("cpu", loaded.storage_dtype).float()

    weights = {f"{stored_name(name, loaded.family)}.weight": partial(weight, name) for name in quantized.tensors}
    rest = {stored_name(name, loaded.family): partial(folded, name) for name in quantized.folded}
    return rest | weights
