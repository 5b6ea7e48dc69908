"""What 16-bit input channels inside the quantized modules buy, in bytes and in damage, on a bundled model.

    python benchmarks/columns.py --langs en,fi

For every width and share, GPTQ on all layers, judged on the confirm part. `ours` is the model with its channels,
`others` is what every other reader computes from the same checkpoint, whose integers alone it reads. Rows go to
`benchmarks/results/cpu/columns.jsonl`; those of the same model, languages, width and share are replaced.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pages import write_tables

from quant_fairness_plugin.artifacts import Interval, package_versions, write_atomically
from quant_fairness_plugin.fair_quantizer import FairQuantizer
from quant_fairness_plugin.plans.costs import with_columns
from quant_fairness_plugin.quantize.in_blocks import quantized_state
from quant_fairness_plugin.steps import plan_of_layers

ROWS = Path(__file__).parent / "results" / "cpu" / "columns.jsonl"
PAGE = Path(__file__).parents[1] / "docs" / "serving.md"
BITS, SHARES = (4, 3), (0.0, 0.01, 0.05)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--langs", default="en,fi")
    parser.add_argument("--draws", type=int, default=500)
    options = parser.parse_args()
    rows = [measure(options, bits, share) for bits in BITS for share in SHARES]
    keep(rows)
    render()


def measure(options: argparse.Namespace, bits: int, share: float) -> dict[str, Any]:
    quantizer = FairQuantizer.from_pretrained(
        options.model,
        bits=bits,
        protect_layers="none",
        protect_columns=share,
        languages=options.langs.split(","),
        draws=options.draws,
    )
    quantized = quantizer.quantize()
    plan = with_columns(plan_of_layers(quantizer.loaded, quantizer.config, ()), quantizer.loaded, share)
    ours, others = quantized_state("ours", quantized), quantized_state("others", replace(quantized, columns={}))
    found = quantizer.measure(ours, others).measurements
    damage = {
        state: {row.language: numbers(row.kl_bits_per_byte) for row in measurement.languages}
        for state, measurement in found.items()
        if state in ("ours", "others")
    }
    return {
        "benchmark": "columns",
        "model": options.model,
        "languages": options.langs,
        "grid": str(quantizer.config.grid),
        "share": share,
        "channels": sum(len(kept.index) for kept in quantized.columns.values()),
        "extra_bytes": plan.extra_bytes,
        "overhead": plan.overhead,
        "kl_bits_per_byte": damage,
        "command": " ".join(sys.argv),
        "machine": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "versions": package_versions(),
        "seed": quantizer.config.seed,
    }


def numbers(value: Any) -> list[float] | None:
    return [value.estimate, value.low, value.high] if isinstance(value, Interval) else None


def keep(rows: list[dict[str, Any]]) -> None:
    def key(row: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(row[name] for name in ("model", "languages", "grid", "share"))

    old = [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.exists() else []
    fresh = {key(row) for row in rows}
    kept = [row for row in old if key(row) not in fresh] + rows
    ROWS.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(ROWS, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept).encode())


def render() -> None:
    """Write the tables into their page."""
    write_tables(PAGE, tables())


def tables() -> dict[str, str]:
    """The table of docs/serving.md, from the rows."""
    rows = [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()]
    languages = rows[0]["languages"].split(",")
    heads = [f"{name}, {who}" for name in languages for who in ("ours", "others")]
    lines = [
        f"| Grid | Channels | Extra bytes | {' | '.join(heads)} |",
        f"| --- | {' | '.join(['---:'] * (2 + len(heads)))} |",
    ]
    for row in rows:
        damage = row["kl_bits_per_byte"]
        cells = [f"{damage[who][name][0]:.5f}" for name in languages for who in ("ours", "others")]
        lines.append(f"| {row['grid']} | {row['share']:.0%} | {row['overhead']:.1%} | {' | '.join(cells)} |")
    return {"columns": "\n".join(lines) + "\n"}


if __name__ == "__main__":
    main()
