"""What more work does for the same bytes: GPTQ as published, and what comes behind it here, on the same rows.

    python benchmarks/effort_table.py measure demo --variants refined  # one variant on one model; adds its rows
    python benchmarks/effort_table.py measure SmolLM2-135M --folder out/smollm2-135m --langs en,fr,es,ru,ar,zh
    python benchmarks/effort_table.py render                      # the table of docs/calibration.md

INT4 with `--clip mse`, no unit singled out, calibrated on the bundled rows, in memory, measured on the `confirm` part.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from beginnings_table import UNMEASURED, opened
from pages import write_tables
from rows import conditions

from quant_fairness_plugin.artifacts import write_atomically
from quant_fairness_plugin.quantize.methods.gptq import Gptq

ROOT = Path(__file__).parents[1]
ROWS = ROOT / "benchmarks" / "results" / "cpu" / "effort_table.jsonl"
PAGE = ROOT / "docs" / "calibration.md"
MODELS = ("demo", "demo-gpt2", "SmolLM2-135M")
VARIANTS = {
    "fast": Gptq().at("fast"),
    "refined": Gptq(compensates=False),
    "compensated": Gptq(refinements=0),
    "normal": Gptq(),
    "best": Gptq().at("best"),
    "damp-0.05": Gptq(damp=0.05),
    "normal, documents": Gptq(),
}
"""The efforts of `--effort`, what `normal` does apart, `normal` with a damping that no number of tokens changes, and
`normal` with the bundled documents, too."""
REMOVED = ("fast, turned", "normal, turned")
"""Variants of an option that gained nothing and is no longer in the code. Their rows stay, under their revision."""
ORDER = (*VARIANTS, *REMOVED)
SEED = 0
DRAWS = 2000


def measure(given: argparse.Namespace) -> None:
    """Measure variants and put their rows in place of their old ones."""
    torch.set_num_threads(1)
    base = opened(given)
    options = "".join(f" --{name} {value}" for name in ("langs", "sentences") if (value := getattr(given, name)))
    for variant in given.variants:
        command = f"python benchmarks/effort_table.py measure {given.model} --variants {variant}{options}"
        row = {"model": given.model, "variant": variant} | conditions(command=command, seed=SEED)
        row |= run(base, variant)
        kept = [r for r in read_rows() if (r["model"], r["variant"]) != (given.model, variant)]
        rows = sorted([*kept, row], key=lambda r: (MODELS.index(r["model"]), ORDER.index(r["variant"])))
        write_atomically(ROWS, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows).encode())


def run(base: Any, variant: str) -> dict[str, Any]:
    """Return the row of a variant, with the KL of every sentence."""
    from quant_fairness_plugin.measure.guards import byte_unigram_bpb, support
    from quant_fairness_plugin.measure.metrics import bits_per_byte
    from quant_fairness_plugin.measure.scoring import fixed_state, score_states
    from quant_fairness_plugin.quantize.calibration import build_calibration
    from quant_fairness_plugin.quantize.in_blocks import quantized_state
    from quant_fairness_plugin.quantize.stream import quantize_model
    from quant_fairness_plugin.texts.documents import documents_of

    loaded, texts = base.loaded, base.texts.part("confirm")
    long = variant.endswith("documents")
    rows = documents_of(base.texts) if long else base.texts
    calibration = build_calibration(loaded.tokenizer, rows)
    began = time.process_time()
    quantized = quantize_model(loaded, base.recommend(), method=VARIANTS[variant], calibration=calibration)
    seconds = time.process_time() - began
    states = [fixed_state("16 bit", loaded.model), quantized_state(variant, quantized)]
    scores = score_states(states, loaded.tokenizer, texts)
    sums = {n: {"kl_nats": list(s.kl_nats), "bytes": list(s.bytes_)} for n, s in scores[variant].languages.items()}
    spent = {n: bits_per_byte(sum(s.nll_nats), sum(s.bytes_)) for n, s in scores["16 bit"].languages.items()}
    supported = [n for n, bits in spent.items() if support(bits, byte_unigram_bpb(texts.sentences[n])) is None]
    sys.stderr.write(f"{variant}: {seconds:.0f} s\n")
    return {
        "grid": str(base.config.grid), "quantize_cpu_seconds": seconds, "sentences": len(texts), "kl": sums,
        "supported": supported, "calibrated_on": calibration.summary(), "text_sha256": texts.sha256, "part": "confirm",
    }  # fmt: skip


def read_rows() -> list[dict[str, Any]]:
    """Return the stored rows."""
    return [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()] if ROWS.exists() else []


def resampled(row: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Return the worst and the mean KL in bits per byte: the estimate, then `DRAWS` resamples of the sentences."""
    count = row["sentences"]
    draws = np.random.default_rng(SEED).integers(0, count, (DRAWS, count))
    picks = np.concatenate([np.arange(count)[None], draws])
    by_language = []
    for language in row["supported"]:
        kl, sizes = (np.array(row["kl"][language][key], dtype=float) for key in ("kl_nats", "bytes"))
        by_language.append(kl[picks].sum(1) / sizes[picks].sum(1) / np.log(2))
    table = np.stack(by_language)
    return table.max(0), table.mean(0)


def tables() -> dict[str, str]:
    """Return the Markdown table by name."""
    lines = [
        "| model | variant | worst KL | lowered by | mean KL | lowered by | CPU s |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    rows = read_rows()
    if not rows:
        return {"effort": UNMEASURED}
    for row in rows:
        first = next(r for r in rows if r["model"] == row["model"] and r["variant"] == "fast")
        cells = []
        for before, after in zip(resampled(first), resampled(row), strict=True):
            gain = "" if row is first else figure(before - after)
            cells += [f"{1000 * after[0]:.1f}", gain]
        lines.append(f"| {row['model']} | {row['variant']} | {' | '.join(cells)} | {row['quantize_cpu_seconds']:.0f} |")
    return {"effort": "\n".join([*lines, ""])}


def figure(values: np.ndarray) -> str:
    """Return `3.1 [1.0, 5.2]`, thousandths: the estimate and its 95 % interval."""
    low, high = np.quantile(values[1:], (0.025, 0.975))
    return f"{1000 * values[0]:.1f} [{1000 * low:.1f}, {1000 * high:.1f}]"


def render() -> None:
    write_tables(PAGE, tables())


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("measure", "render"))
    parser.add_argument("model", nargs="?", default="demo", choices=MODELS)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--folder", help="where the model lies, unless it is bundled")
    parser.add_argument("--langs")
    parser.add_argument("--sentences", type=int, help="of the confirm part; all by default")
    given = parser.parse_args()
    if given.what == "render":
        render()
    else:
        measure(given)


if __name__ == "__main__":
    main()
