"""The model card: `README.md` of a checkpoint, rendered from its `ExportRecord` and the front matter of its source."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from importlib import resources
from typing import Any

import jinja2

from quant_fairness_plugin.artifacts import (
    FAULTS,
    RECORD_NAME,
    Answers,
    ExportRecord,
    Interval,
    LanguageDamage,
    Number,
    ReaderRun,
    Undefined,
)
from quant_fairness_plugin.artifacts.gates import Gate
from quant_fairness_plugin.checkpoint.readers import READERS, find_refusal
from quant_fairness_plugin.export.source_card import NO_CARD, SourceCard
from quant_fairness_plugin.model.resolve import BUNDLED
from quant_fairness_plugin.plans.precision_map import bits_of_record, layer_ranges, module_names, written_bits
from quant_fairness_plugin.quantize.backends import NATIVE
from quant_fairness_plugin.recommend import describe_overrides
from quant_fairness_plugin.statistics.configurations import SIXTEEN_BIT, Configuration, configurations
from quant_fairness_plugin.statistics.verdict import judge

_MARKUP = re.compile(r"([\\`*_{}\[\]<>|#~$&!])")


def render_card(record: ExportRecord, source: SourceCard = NO_CARD) -> str:
    """The card as Markdown with YAML front matter. Names and texts from outside are escaped.

    Args:
        record: what was exported; of its `files` only the bytes of the weights are used.
        source: what the card of the source says that holds for the export too.
    """
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # Markdown, not HTML: `plain` escapes for both
    )
    environment.filters |= {"yaml": _yaml, "plain": _plain, "number": _number}
    template = resources.files("quant_fairness_plugin.export").joinpath("templates/card.md.j2").read_text("utf-8")
    measurement = record.measurement
    return environment.from_string(template).render(
        record=record,
        plan=record.plan,
        overrides=describe_overrides(record.plan),
        wide=sum(bits != record.plan.grid.bits for bits in record.quantized_modules.values()),
        name=_name(record),
        front_matter=_front_matter(record, source),
        source=source,
        verdict=judge(measurement) if measurement else None,
        answers=measurement.answers if measurement and isinstance(measurement.answers, Answers) else None,
        unasked=measurement.answers.undefined if measurement and isinstance(measurement.answers, Undefined) else None,
        read_by=record.reader_run if isinstance(record.reader_run, ReaderRun) else None,
        unread=record.reader_run.undefined if isinstance(record.reader_run, Undefined) else None,
        faults=FAULTS,
        bits=list(_bit_rows(record)),
        command=command_again(record),
        bound=Gate().most,
        rows=[_row(damage) for damage in measurement.languages] if measurement else [],
        configurations=[_configuration(row) for row in configurations(record)] if record.weight_bytes else [],
        refusals={reader: _refusal(record, reader) for reader in READERS},
    )


def _front_matter(record: ExportRecord, source: SourceCard) -> dict[str, Any]:
    """Return the card's metadata: the source's where it still holds, and what the export adds."""
    base = source.base_model or (record.provenance.model if _is_hub_id(record) else None)
    relation = source.relation if source.base_model else "quantized"
    measured = [damage.language for damage in record.measurement.languages] if record.measurement else []
    own = ("quant-fairness", record.format, record.method, record.plan.grid.precision)
    content = {
        "base_model": base,
        "base_model_relation": relation if base else None,
        **source.kept,
        "language": source.languages or measured,
        "library_name": "transformers",
        "quantized_by": "quant-fairness",
        "tags": list(dict.fromkeys([*own, *source.tags])),
        "model-index": _model_index(record),
    }
    return {key: value for key, value in content.items() if value is not None and value != []}


def _model_index(record: ExportRecord) -> list[dict[str, Any]] | None:
    """Return the damage to each language the 16-bit model knows, as the Hub shows results; None where none is."""
    from huggingface_hub import EvalResult
    from huggingface_hub.repocard_data import eval_results_to_model_index

    measurement = record.measurement
    known = [row for row in measurement.languages if row.status != "unsupported"] if measurement else []
    if measurement is None or not known:
        return None
    results = [
        EvalResult(
            task_type="text-generation",
            task_name=f"The same sentences as the 16-bit model, {row.language}",
            dataset_type=record.provenance.text_set,
            dataset_name=record.provenance.text_set,
            dataset_config=row.language,
            dataset_split=measurement.part,
            metric_type=kind,
            metric_name=name,
            metric_value=round(value.estimate, 6),
        )
        for row in known
        for kind, name, value in (
            ("kl-bits-per-byte", "KL from the 16-bit model, bits per byte", row.kl_bits_per_byte),
            ("delta-bits-per-byte", "More bits per byte than the 16-bit model", row.delta_bpb),
        )
    ]
    index: list[dict[str, Any]] = eval_results_to_model_index(_name(record), results)
    return index


def command_again(record: ExportRecord) -> list[str]:
    """Return the words of a command that makes the checkpoint again: its plan is in the record, beside the card.

    Texts and models from files have only their names in a record; where they lie is for the reader to fill in.
    """
    known, summary = record.provenance.arguments, record.calibration
    model = record.provenance.model if _is_hub_id(record) or record.provenance.model in BUNDLED else "MODEL"
    words = ["quant-fairness", "quantize", model, "--plan", RECORD_NAME, "--method", record.method]
    words += ["--format", record.format, "--reader", str(known.get("reader", "transformers"))]
    if known.get("backend", NATIVE) != NATIVE:
        words += ["--backend", str(known["backend"])]
    texts = record.provenance.text_set
    words += [] if texts == "bundled" else ["--texts", texts if texts.startswith("datasets:") else "TEXTS"]
    if summary:
        tokens: dict[str, int] = summary["tokens_per_language"]
        measured = [row.language for row in record.measurement.languages] if record.measurement else []
        words += ["--langs", ",".join(measured or tokens), "--calibration", str(summary["weighting"])]
        alike = summary["weighting"] != "proportional" and len(set(tokens.values())) == 1
        words += ["--tokens-per-language", str(max(tokens.values()))] if alike else []
    return [*words, "--seed", str(record.provenance.seed)]


def _bit_rows(record: ExportRecord) -> Iterator[list[str]]:
    """Yield the precision map as rows of cells, the head first; layers that are alike share a row."""
    bits = bits_of_record(record)
    names = module_names(list(dict.fromkeys(place for _, place in bits)))
    yield ["layers", *names.values()]
    alike: dict[tuple[str, ...], list[int]] = {}
    for layer in sorted({layer for layer, _ in bits}):
        row = tuple(written_bits(bits.get((layer, place), set())) or "none" for place in names)
        alike.setdefault(row, []).append(layer)
    for row, layers in alike.items():
        yield [layer_ranges(layers), *row]


def _refusal(record: ExportRecord, reader: str) -> str | None:
    """Why a reader cannot load this checkpoint, or None where it can."""
    refusal = find_refusal(
        record.family,
        format=record.format,
        grid=record.plan.grid,
        reader=reader,
        overrides=record.plan.singled_out,
        group_sizes=record.sizes.values(),
    )
    return refusal.reason if refusal is not None else None


def _name(record: ExportRecord) -> str:
    return record.provenance.model.rstrip("/") if _is_hub_id(record) else record.provenance.model.split("/")[-1]


def _is_hub_id(record: ExportRecord) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", record.provenance.model, re.ASCII) is not None


def _row(damage: LanguageDamage) -> list[str]:
    """One language as table cells."""
    cells = [_plain(damage.language), f"{damage.baseline_bpb:.3f}", f"{damage.quantized_bpb:.3f}"]
    cells += [_number(damage.delta_bpb), _number(damage.kl_bits_per_byte), _number(damage.flip_rate)]
    return [*cells, damage.status if damage.status == "supported" else _plain(f"{damage.status}: {damage.reason}")]


def _configuration(row: Configuration) -> list[str]:
    """One state of the model as table cells."""
    cells = [_plain(row.name), str(row.bytes_), f"{row.of_16_bit:.0%}"]
    if row.name == SIXTEEN_BIT:
        return [*cells, "0", "", "", _plain(row.use)]
    return [*cells, _number(row.worst_kl), _number(row.disparity), _plain(row.label), _plain(row.use)]


def _number(value: Number) -> str:
    if isinstance(value, Interval):
        return f"{value.estimate:.4f} [{value.low:.4f}, {value.high:.4f}]"
    return _plain(f"undefined: {value.undefined}")


def _plain(text: object) -> str:
    """Text that Markdown and HTML show as it is, on one line."""
    return _MARKUP.sub(r"\\\1", " ".join(str(text).split())).replace("\\<", "&lt;").replace("\\>", "&gt;")


def _yaml(value: object) -> str:
    """A JSON scalar or list, which is YAML too."""
    return json.dumps(value, ensure_ascii=False)
