"""Damage of each language by calibration (English only, uniform, minimax), without and with recommended protection.

    python benchmarks/calibration_table.py measure         # about half an hour on one core; writes the rows
    python benchmarks/calibration_table.py render          # rewrites the tables of docs/calibration.md

Everything is GPTQ in memory. The protected layers are those that `protection_table.py` recommended for the same model
and width on the `search` sentences; its rows are read. Calibration and minimax weights come from the `calibrate`
sentences; everything is reported on the `confirm` sentences, all combinations under the same resamples.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any

from pages import write_tables

from quant_fairness_plugin.artifacts import Bootstrap, Interval, Undefined, package_versions, write_atomically

ROOT = Path(__file__).parents[1]
ROWS = ROOT / "benchmarks" / "results" / "cpu" / "calibration_table.jsonl"
PROTECTION = ROWS.with_name("protection_table.jsonl")
PAGE = ROOT / "docs" / "calibration.md"
MODELS = ("demo", "demo-gpt2")
WIDTHS = (4, 3)
WITH_MATRIX = ("demo", 3)
CALIBRATIONS = ("english", "uniform", "minimax")
ALL = "all supported"
SEED = 0


def measure(models: Sequence[str], widths: Sequence[int]) -> None:
    """Measure these models and put their rows in place of their old ones."""
    for model, bits in product(models, widths):
        new = list(measure_model(model, bits))
        kept = [row for row in read_rows(ROWS) if (row["model"], row["bits"]) != (model, bits)]
        rows = sorted(kept + new, key=lambda row: (MODELS.index(row["model"]), -row["bits"]))
        write_atomically(ROWS, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


def read_rows(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def recommended_layers(model: str, bits: int) -> tuple[int, ...]:
    return next(
        tuple(row["recommended"]) for row in read_rows(PROTECTION) if (row["model"], row["bits"]) == (model, bits)
    )


def measure_model(model: str, bits: int) -> Iterator[dict[str, Any]]:
    """One row per combination and language, one per combination for all; then effects, then the matrix."""
    import torch

    from quant_fairness_plugin import FairQuantizer
    from quant_fairness_plugin.analysis.calibration import Calibrations, compare_calibrations

    torch.set_num_threads(1)
    quantizer = FairQuantizer.from_pretrained(
        model, bits=bits, protect_layers=recommended_layers(model, bits), seed=SEED
    )
    result = compare_calibrations(
        quantizer.loaded,
        quantizer.texts,
        quantizer.recommend(),
        Calibrations(weightings=CALIBRATIONS, matrix=(model, bits) == WITH_MATRIX),
        bootstrap=Bootstrap(None, quantizer.config.draws, SEED),
        progress=lambda what, done, total: print(f"{model} int{bits} {what} {done}/{total}", file=sys.stderr),
    )
    common = {
        "model": model,
        "bits": bits,
        "grid": str(result.plan.grid),
        "method": result.method,
        "source": "in memory",
        "part": "confirm",
        "plan": list(result.plan.protected_layers),
        "seed": SEED,
        "versions": package_versions(),
        "machine": f"{platform.machine()}, {platform.system()}, CPU, 1 thread",
        "command": "python benchmarks/calibration_table.py measure",
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "model_sha256": result.provenance.model_sha256,
        "text_sha256": result.provenance.text_sha256,
    }
    yield from (common | row for row in outcome_rows(result))
    for table in result.tables:
        pair = {"kind": "effects", "first": table.first, "other": table.other}
        yield from (common | pair | asdict(effects) for effects in table.effects)
    if result.matrix is not None:
        yield from (common | row for row in matrix_rows(result.matrix))


def outcome_rows(result: Any) -> Iterator[dict[str, Any]]:
    for outcome in result.outcomes:
        head = {"kind": "damage", "calibration": outcome.calibration, "protected": outcome.protected}
        yield from (head | asdict(damage) for damage in outcome.languages)
        whole = {"language": ALL, "worst_kl": asdict(outcome.worst_kl), "mean_kl": asdict(outcome.mean_kl)}
        yield head | whole | {"calibrated_on": outcome.summary}


def matrix_rows(matrix: Any) -> Iterator[dict[str, Any]]:
    for row in matrix.rows:
        for damage in row.languages:
            kl, status = asdict(damage.kl_bits_per_byte), damage.status
            head = {"kind": "matrix", "calibration": row.calibration, "language": damage.language}
            yield head | {"status": status, "kl_bits_per_byte": kl}
        whole = {"worst_kl": asdict(row.worst_kl), "mean_kl": asdict(row.mean_kl), "calibrated_on": row.summary}
        yield {"kind": "matrix", "calibration": row.calibration, "language": ALL} | whole
    for own in matrix.own:
        yield {"kind": "own language", "verdict": matrix.verdict} | asdict(own)


def render() -> None:
    write_tables(PAGE, tables(read_rows(ROWS)))


def tables(rows: list[dict[str, Any]]) -> dict[str, str]:
    """Name of each table of the page → Markdown."""
    found = {f"{model}-int{bits}": table(rows, model, bits) for model in MODELS for bits in WIDTHS}
    return found | {"matrix": matrix_table(rows), "coverage": coverage_table(rows)}


def table(rows: list[dict[str, Any]], model: str, bits: int) -> str:
    """KL per language by calibration and plan, the effects on the worst language, and what they say in words."""
    mine = [row for row in rows if (row["model"], row["bits"]) == (model, bits)]
    if not mine:
        return "Not measured yet.\n"
    cells = {(r["calibration"], r["protected"], r["language"]): r for r in mine if r["kind"] == "damage"}
    columns = [(name, kept) for kept in (False, True) for name in CALIBRATIONS]
    layers = ",".join(map(str, mine[0]["plan"]))
    head = ["language", *(f"{name}, {layers if kept else 'none'}" for name, kept in columns)]
    languages = [language for name, kept, language in cells if (name, kept) == columns[0] and language != ALL]
    lines = markdown_head(head)
    for language in languages:
        found = [cells[name, kept, language] for name, kept in columns]
        status = found[0]["status"]
        label = language if status == "supported" else f"{language} ({status})"
        lines.append(markdown_row(label, *(figure(cell["kl_bits_per_byte"]) for cell in found)))
    for label, key in (("**worst KL**", "worst_kl"), ("mean KL", "mean_kl")):
        lines.append(markdown_row(label, *(figure(cells[name, kept, ALL][key]) for name, kept in columns)))
    return "\n".join([*lines, "", *effects_table([row for row in mine if row["kind"] == "effects"]), ""])


def effects_table(rows: list[dict[str, Any]]) -> list[str]:
    names = ("calibration", "calibration_protected", "protection", "protection_calibrated", "interaction")
    heads = ("calibration alone", "calibration, protected", "protection alone", "protection, calibrated", "interaction")
    lines = markdown_head(["2×2, worst KL lowered by", *heads, "relative interaction"])
    worst = [row for row in rows if row["subject"] == "worst"]
    for row in worst:
        factor = figure(row["relative_interaction"], scale=1, digits=3)
        lines.append(markdown_row(f"{row['first']} → {row['other']}", *(figure(row[name]) for name in names), factor))
    changed = []
    for row in worst:
        mine = [r for r in rows if (r["first"], r["other"]) == (row["first"], row["other"]) and r["subject"] != "worst"]
        signs = [sign(r["interaction"]) for r in mine if "undefined" not in r["interaction"]]
        changed.append(
            f"{row['first']} → {row['other']}: interaction above 0 in {signs.count(1)}, below 0 in {signs.count(-1)}, "
            f"not distinguishable from 0 in {signs.count(0)} of {len(signs)} languages."
        )
    return [*lines, "", *(f"- {in_words(row)}" for row in worst), *(f"- {line}" for line in changed)]


def in_words(row: dict[str, Any]) -> str:
    """What the effects on the worst language say, as a sentence."""
    from quant_fairness_plugin.analysis.effects import Effects, TwoByTwo

    numbers = {
        field.name: Undefined(**row[field.name]) if "undefined" in row[field.name] else Interval(**row[field.name])
        for field in fields(Effects)
        if field.name != "subject"
    }
    verdict = TwoByTwo(first=row["first"], other=row["other"], effects=(Effects(subject="worst", **numbers),)).verdict
    return f"{verdict[:1].upper()}{verdict[1:]}."


def matrix_table(rows: list[dict[str, Any]]) -> str:
    """Calibration language by row, evaluation language by column."""
    mine = [row for row in rows if row["kind"] == "matrix"]
    own = [row for row in rows if row["kind"] == "own language"]
    if not mine:
        return "Not measured yet.\n"
    cells = {(row["calibration"], row["language"]): row for row in mine}
    names = list(dict.fromkeys(row["calibration"] for row in mine))
    languages = [r["language"] for r in mine if r["calibration"] == names[0] and r.get("status") == "supported"]
    lines = markdown_head(["calibrated on", *languages, "worst", "mean"])
    for name in names:
        estimates = [1000 * cells[name, language]["kl_bits_per_byte"]["estimate"] for language in languages]
        whole = [figure(cells[name, ALL][key]) for key in ("worst_kl", "mean_kl")]
        lines.append(markdown_row(name, *(f"{value:.1f}" for value in estimates), *whole))
    verdict = own[0]["verdict"] if own else ""
    return "\n".join([*lines, "", f"{verdict[:1].upper()}{verdict[1:]}.", ""])


def coverage_table(rows: list[dict[str, Any]]) -> str:
    """What each calibration of each model was made on, and the weights of minimax."""
    lines = markdown_head(["model", "bits", "calibration", "layers", "tokens", "largest weights", "tokens_sha256"])
    for row in rows:
        if row["kind"] != "damage" or row["language"] != ALL:
            continue
        made = row["calibrated_on"]
        tokens = made["tokens_per_language"]
        weights = sorted(made["weights"].items(), key=lambda item: -item[1])[:3]
        lines.append(
            markdown_row(
                row["model"],
                str(row["bits"]),
                row["calibration"],
                ",".join(map(str, row["plan"])) if row["protected"] else "none",
                f"{sum(tokens.values())} in {len(tokens)} languages",
                ", ".join(f"{name} {weight:.3f}" for name, weight in weights),
                made["tokens_sha256"][:12],
            )
        )
    return "\n".join([*lines, ""])


def markdown_head(names: Sequence[str]) -> list[str]:
    return [markdown_row(*names), "|" + "---|" * len(names)]


def markdown_row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def sign(value: dict[str, Any]) -> int:
    return (value["low"] > 0) - (value["high"] < 0)


def figure(value: dict[str, Any], *, scale: int = 1000, digits: int = 1) -> str:
    if "undefined" in value:
        return "undefined"
    low, high = (f"{scale * value[end]:.{digits}f}" for end in ("low", "high"))
    return f"{scale * value['estimate']:.{digits}f} [{low}, {high}]"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("measure", "render"))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--bits", nargs="+", type=int, choices=WIDTHS, default=WIDTHS)
    given = parser.parse_args()
    if given.what == "measure":
        measure(given.models, given.bits)
    else:
        render()
