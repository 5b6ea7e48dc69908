"""The model card: `README.md` of a checkpoint, rendered from its `ExportRecord` and the front matter of its source."""

from __future__ import annotations

import json
import re
from importlib import resources
from typing import Any

import jinja2

from quant_fairness_plugin.artifacts import ExportRecord, Interval, LanguageDamage, Number
from quant_fairness_plugin.artifacts.gates import Gate
from quant_fairness_plugin.checkpoint.readers import READERS, find_refusal
from quant_fairness_plugin.export.source_card import NO_CARD, SourceCard
from quant_fairness_plugin.recommend import describe_overrides
from quant_fairness_plugin.statistics.verdict import judge

_MARKUP = re.compile(r"([\\`*_{}\[\]<>|#~$&!])")


def render_card(record: ExportRecord, source: SourceCard = NO_CARD) -> str:
    """The card as Markdown with YAML front matter. Names and texts from outside are escaped.

    Args:
        record: what was exported; its `files` are not used.
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
        name=record.provenance.model.rstrip("/") if _is_hub_id(record) else record.provenance.model.split("/")[-1],
        front_matter=_front_matter(record, source),
        source=source,
        verdict=judge(measurement) if measurement else None,
        bound=Gate().most,
        rows=[_row(damage) for damage in measurement.languages] if measurement else [],
        refusals={reader: _refusal(record, reader) for reader in READERS},
    )


def _front_matter(record: ExportRecord, source: SourceCard) -> dict[str, Any]:
    """Return the card's metadata: the source's where it still holds, and what the export adds."""
    base = source.base_model or (record.provenance.model if _is_hub_id(record) else None)
    relation = source.relation if source.base_model else "quantized"
    measured = [damage.language for damage in record.measurement.languages] if record.measurement else []
    own = ("quant-fairness", record.format, record.method, f"int{record.plan.grid.bits}")
    content = {
        "base_model": base,
        "base_model_relation": relation if base else None,
        **source.kept,
        "language": source.languages or measured,
        "library_name": "transformers",
        "tags": list(dict.fromkeys([*own, *source.tags])),
    }
    return {key: value for key, value in content.items() if value is not None and value != []}


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


def _is_hub_id(record: ExportRecord) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", record.provenance.model, re.ASCII) is not None


def _row(damage: LanguageDamage) -> list[str]:
    """One language as table cells."""
    cells = [_plain(damage.language), f"{damage.baseline_bpb:.3f}", f"{damage.quantized_bpb:.3f}"]
    cells += [_number(damage.delta_bpb), _number(damage.kl_bits_per_byte), _number(damage.flip_rate)]
    return [*cells, damage.status if damage.status == "supported" else _plain(f"{damage.status}: {damage.reason}")]


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
