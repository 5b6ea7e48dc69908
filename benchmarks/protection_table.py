"""Damage of each language under GPTQ, for no protection, the seeds' layers {0, 9, 11}, and three recommended layers.

    python benchmarks/protection_table.py measure          # about half an hour on two cores; writes the rows
    python benchmarks/protection_table.py render           # rewrites the tables of docs/results.md

INT4 is measured on the exported checkpoint as read back from its files; INT3, which no server reads, in memory. The
layers are recommended on the `search` part of the bundled sentences and everything is reported on the `confirm` part.
All three plans of a table cost the same bytes but the first.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any

from pages import write_tables

from quant_fairness_plugin.artifacts import package_versions, write_atomically

ROOT = Path(__file__).parents[1]
ROWS = ROOT / "benchmarks" / "results" / "cpu" / "protection_table.jsonl"
PAGE = ROOT / "docs" / "results.md"
SEED_LAYERS = (0, 9, 11)
PLANS = ("none", "0,9,11", "recommended")
MODELS = ("demo", "demo-gpt2")
WIDTHS = (4, 3)
SEED = 0


def measure(models: Sequence[str]) -> None:
    """Measure these models and put their rows in place of their old ones."""
    for model, bits in product(models, WIDTHS):
        new = list(measure_model(model, bits))
        kept = [row for row in read_rows() if (row["model"], row["bits"]) != (model, bits)] if ROWS.exists() else []
        rows = sorted(kept + new, key=lambda row: (MODELS.index(row["model"]), -row["bits"]))
        write_atomically(ROWS, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


def read_rows() -> list[dict[str, Any]]:
    return [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()]


def measure_model(model: str, bits: int) -> Iterator[dict[str, Any]]:
    """One row per plan and language, and one per plan for the summary."""
    from quant_fairness_plugin import FairQuantizer
    from quant_fairness_plugin.measure.scoring import ModelState
    from quant_fairness_plugin.model.exchange import swapped
    from quant_fairness_plugin.steps import exported_state

    # GPT-2 in compressed-tensors is read by vLLM only; Transformers would load it as silent garbage.
    reader = "transformers" if model == "demo" else "vllm"
    base = FairQuantizer.from_pretrained(model, bits=bits, top=3, seed=SEED, reader=reader)
    recommended = base.recommend()
    states, layers = [], {"none": (), "0,9,11": SEED_LAYERS, "recommended": recommended.protected_layers}
    with tempfile.TemporaryDirectory() as folder:
        for plan, protected in layers.items():
            quantizer = base.protecting(protected)
            if bits == 4:
                out = Path(folder) / plan
                quantizer.save_pretrained(out, measure=None)
                states.append(exported_state(out, quantizer.loaded, name=plan))
            else:
                weights = quantizer.quantize().dense_weights()
                states.append(ModelState(plan, lambda weights=weights: swapped(base.loaded, weights)))
            sys.stderr.write(f"{model} int{bits} {plan} {protected}\n")
        measured = base.measure(*states)
    common = {
        "model": model,
        "bits": bits,
        "grid": str(base.config.grid),
        "source": "exported checkpoint" if bits == 4 else "in memory",
        "part": "confirm",
        "recommended": list(recommended.protected_layers),
        "stable": recommended.stable,
        "why": recommended.reasons[0],
        "seed": SEED,
        "versions": package_versions(),
        "machine": f"{platform.machine()}, {platform.system()}, CPU",
        "command": "python benchmarks/protection_table.py measure",
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    for plan in layers:
        result = measured.measurements[plan]
        common |= {"model_sha256": result.provenance.model_sha256, "text_sha256": result.provenance.text_sha256}
        for damage in result.languages:
            yield common | {"plan": plan, "protected": list(layers[plan])} | asdict(damage)
        summary = {"worst_kl": result.worst_kl, "mean_kl": result.mean_kl, "mean_delta_bpb": result.mean_delta_bpb}
        gain = None if plan == "none" else asdict(measured.gain("none", plan))
        yield (
            common
            | {"plan": plan, "protected": list(layers[plan]), "language": "all supported"}
            | {name: asdict(value) for name, value in summary.items()}
            | {"gain_over_none": gain}
        )


def render() -> None:
    rows = read_rows()
    tables = {f"{model}-int{bits}": table(rows, model, bits) for model in MODELS for bits in WIDTHS}
    write_tables(PAGE, tables)


def table(rows: list[dict[str, Any]], model: str, bits: int) -> str:
    """A Markdown table, figures in thousandths of a bit per byte, and one sentence on what protection bought."""
    mine = [row for row in rows if row["model"] == model and row["bits"] == bits]
    by_key = {(row["plan"], row["language"]): row for row in mine}
    languages = [row["language"] for row in mine if row["plan"] == "none" and row["language"] != "all supported"]
    layers = ",".join(map(str, mine[0]["recommended"]))
    plans = {"none": "none", "0,9,11": "0,9,11", "recommended": f"recommended ({layers})"}
    head = ["language", "16-bit BPB", *(f"ΔBPB, {p}" for p in plans.values()), *(f"KL, {p}" for p in plans.values())]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for language in languages:
        cells = [by_key[plan, language] for plan in plans]
        name = language if cells[0]["status"] == "supported" else f"{language} ({cells[0]['status']})"
        figures = [figure(c["delta_bpb"]) for c in cells] + [figure(c["kl_bits_per_byte"]) for c in cells]
        lines.append("| " + " | ".join([name, f"{cells[0]['baseline_bpb']:.3f}", *figures]) + " |")
    worst = [figure(by_key[plan, "all supported"]["worst_kl"]) for plan in plans]
    lines.append("| " + " | ".join(["**worst KL**", "", "", "", "", *worst]) + " |")
    sentences = [
        verdict(plans[plan], by_key[plan, "all supported"]["gain_over_none"]) for plan in ("0,9,11", "recommended")
    ]
    stability = "stable" if mine[0]["stable"] else "not stable"
    note = f"Three layers recommended by a sweep at this width; their ranking is {stability} ({mine[0]['why']})."
    return "\n".join([*lines, "", " ".join([*sentences, note]), ""])


def figure(value: dict[str, Any]) -> str:
    if "undefined" in value:
        return "undefined"
    return f"{1000 * value['estimate']:.1f} [{1000 * value['low']:.1f}, {1000 * value['high']:.1f}]"


def verdict(plan: str, gain: dict[str, Any]) -> str:
    if "undefined" in gain:
        return f"What {plan} bought is undefined: {gain['undefined']}."
    if gain["low"] > 0:
        return f"Protecting {plan} lowers the worst language's KL by {figure(gain)}."
    if gain["high"] < 0:
        return f"Protecting {plan} makes the worst language's KL worse: the change is {figure(gain)} downwards."
    return f"Protecting {plan} does not measurably lower the worst language's KL: {figure(gain)}."


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("measure", "render"))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    given = parser.parse_args()
    if given.what == "measure":
        measure(given.models)
    else:
        render()
