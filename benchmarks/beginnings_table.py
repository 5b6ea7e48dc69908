"""What stands before a text: what the 16-bit model makes of it, and what calibrating behind it does behind the others.

    python benchmarks/beginnings_table.py read demo             # bits per byte of the 16-bit model, by beginning
    python benchmarks/beginnings_table.py calibrate demo        # KL by calibration and by beginning, GPTQ INT4
    python benchmarks/beginnings_table.py read SmolLM2-135M --folder out/smollm2-135m --langs en,fr,es,ru,ar,zh
    python benchmarks/beginnings_table.py render                # the tables of docs/calibration.md

`read` counts the same tokens for every beginning: all but the first of each sentence. All sentences are of the
`confirm` part of the bundled text set.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from math import log
from pathlib import Path
from typing import Any

from pages import write_tables
from rows import conditions

from quant_fairness_plugin.artifacts import Start, write_atomically

ROOT = Path(__file__).parents[1]
ROWS = ROOT / "benchmarks" / "results" / "cpu" / "beginnings_table.jsonl"
PAGE = ROOT / "docs" / "calibration.md"
MODELS = ("demo", "demo-gpt2", "SmolLM2-135M")
MIXED = "in turn"
UNMEASURED = "Not measured yet; `make effort` does.\n"
SEED = 0


def measure(given: argparse.Namespace) -> None:
    """Measure a model and put its rows in place of its old ones of the same kind."""
    import torch

    torch.set_num_threads(1)
    work = read if given.what == "read" else partial(calibrate, behind=given.behind)
    names = ("langs", "sentences", "behind")
    options = "".join(f" --{name} {value}" for name in names if (value := getattr(given, name)))
    made = conditions(command=f"python benchmarks/beginnings_table.py {given.what} {given.model}{options}", seed=SEED)
    new = [{"kind": given.what, "model": given.model} | made | row for row in work(opened(given))]
    kept = [row for row in read_rows() if (row["kind"], row["model"]) != (given.what, given.model)]
    rows = sorted(kept + new, key=lambda row: (row["kind"], MODELS.index(row["model"])))
    write_atomically(ROWS, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


def opened(given: argparse.Namespace) -> Any:
    """Return the model with its texts: the bundled ones, with so many sentences of the confirm part."""
    from quant_fairness_plugin import FairQuantizer

    base = FairQuantizer.from_pretrained(
        given.folder or given.model, seed=SEED, protect_layers="none", clip="mse",
        languages=None if given.langs is None else tuple(given.langs.split(",")),
        reader="vllm" if given.model == "demo-gpt2" else "transformers",
    )  # fmt: skip
    confirm = [i for i, part in enumerate(base.texts.parts) if part == "confirm"]
    some = given.sentences or len(confirm)
    kept = {confirm[i * len(confirm) // some] for i in range(some)}
    base.texts = base.texts.take([i for i, part in enumerate(base.texts.parts) if part != "confirm" or i in kept])
    return base


def read(base: Any) -> Iterator[dict[str, Any]]:
    """One row per beginning: bits per byte of the 16-bit model in every language."""
    from quant_fairness_plugin.model.beginnings import all_beginnings, find_start

    usual = find_start(base.loaded.tokenizer, "auto")
    for start, ids in all_beginnings(base.loaded.tokenizer).items():
        found = bits_per_byte(base.loaded, replace(base.texts.part("confirm"), start=start))
        yield {
            "start": start, "ids": list(ids), "usual": start == usual, "bpb": found, "text_sha256": base.texts.sha256,
            "sentences": len(base.texts.part("confirm")), "model_sha256": model_sha256(base),
        }  # fmt: skip
        sys.stderr.write(f"{start}: {found}\n")


def bits_per_byte(loaded: Any, texts: Any) -> dict[str, float]:
    """Return the bits per byte of each language over all tokens but the first of each sentence."""
    import torch
    from torch.nn.functional import cross_entropy

    from quant_fairness_plugin.measure.rows import TokenRows, tokenize_for
    from quant_fairness_plugin.model.beginnings import beginning

    rows = tokenize_for(loaded.model, loaded.tokenizer, texts, context=2048).rows
    later = len(beginning(loaded.tokenizer, texts.start)) + 1
    counted = TokenRows(texts, tuple(row._replace(first=later) for row in rows), {})
    nats = dict.fromkeys(texts.languages, 0.0)
    for batch in counted.batches(2048):
        with torch.no_grad():
            logits = loaded.model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).logits
        losses = cross_entropy(logits.flatten(0, 1)[batch.positions], batch.targets, reduction="none").double()
        sums = torch.zeros(len(batch.rows), dtype=torch.float64).index_add_(0, batch.owners, losses)
        for row, value in zip(batch.rows, sums.tolist(), strict=True):
            nats[row.language] += value
    plain = tokenize_for(loaded.model, loaded.tokenizer, replace(texts, start="plain"), context=2048).encoded
    bits = {language: value / log(2) for language, value in nats.items()}
    return {name: round(value / sum(text.bytes_ for text in plain[name]), 4) for name, value in bits.items()}


def calibrate(base: Any, *, behind: str | None) -> Iterator[dict[str, Any]]:
    """One row per calibration and beginning: the KL of GPTQ INT4 calibrated behind one beginning, or all in turn."""
    from quant_fairness_plugin.artifacts import ProtectionPlan
    from quant_fairness_plugin.measure.scoring import ModelState
    from quant_fairness_plugin.model.beginnings import all_beginnings
    from quant_fairness_plugin.model.exchange import swapped
    from quant_fairness_plugin.quantize.calibration import build_calibration
    from quant_fairness_plugin.quantize.stream import quantize_model

    starts: list[Start] = list(all_beginnings(base.loaded.tokenizer))
    plan, texts = ProtectionPlan.unprotected(base.loaded.files.name, base.loaded.layers, base.config.grid), base.texts
    states, sets, seconds = [], {}, {}
    for name in (MIXED, *(starts if behind is None else behind.split(","))):
        chosen = () if name == MIXED else (name,)
        sets[name] = build_calibration(base.loaded.tokenizer, texts.part("calibrate"), starts=chosen)
        began = time.process_time()
        quantized = quantize_model(base.loaded, plan, method="gptq", calibration=sets[name])
        seconds[name] = time.process_time() - began
        states.append(ModelState(name, partial(swapped, base.loaded, quantized.dense_weights())))
        sys.stderr.write(f"{name}: {seconds[name]:.0f} s\n")
    for start in starts:
        base.texts = replace(texts, start=start)
        measured = base.measure(*states)
        for name in sets:
            result = measured.measurements[name]
            yield {
                "calibration": name, "start": start, "grid": str(plan.grid), "calibrated_on": sets[name].summary(),
                "part": "confirm", "sentences": result.languages[0].sentences, "cpu_seconds": seconds[name],
                "worst_kl": asdict(result.worst_kl), "mean_kl": asdict(result.mean_kl),
                "kl": {row.language: asdict(row.kl_bits_per_byte) | {"status": row.status} for row in result.languages},
                "gain_in_turn": None if name == MIXED else asdict(measured.gain(name, MIXED)),
                "model_sha256": result.provenance.model_sha256, "text_sha256": result.provenance.text_sha256,
            }  # fmt: skip


def model_sha256(base: Any) -> str:
    """Return the checksum of the model's files."""
    from quant_fairness_plugin.model.resolve import model_sha256

    return model_sha256(base.loaded.files)


def read_rows() -> list[dict[str, Any]]:
    """Return the stored rows."""
    return [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()] if ROWS.exists() else []


def tables() -> dict[str, str]:
    """Return the Markdown tables by name."""
    rows = read_rows()
    return {"read": read_table(rows) or UNMEASURED, "beginnings": calibration_table(rows) or UNMEASURED}


def read_table(rows: list[dict[str, Any]]) -> str:
    """Return bits per byte of the 16-bit models, by beginning."""
    mine = [row for row in rows if row["kind"] == "read"]
    if not mine:
        return ""
    lines = ["| model | before the text | tokens | English | mean | languages |", "|---|---|---:|---:|---:|---:|"]
    for row in mine:
        name = f"**{row['start']}**" if row["usual"] else row["start"]
        bpb = row["bpb"]
        mean = sum(bpb.values()) / len(bpb)
        lines.append(f"| {row['model']} | {name} | {len(row['ids'])} | {bpb['en']:.3f} | {mean:.3f} | {len(bpb)} |")
    return "\n".join([*lines, ""])


def calibration_table(rows: list[dict[str, Any]]) -> str:
    """Return the worst language's KL by calibration (rows) and by beginning (columns)."""
    parts = []
    for model in MODELS:
        mine = {(r["calibration"], r["start"]): r for r in rows if r["kind"] == "calibrate" and r["model"] == model}
        if not mine:
            continue
        starts, names = (list(dict.fromkeys(key[place] for key in mine)) for place in (1, 0))
        first = next(iter(mine.values()))
        parts += [f"`{model}`, {first['grid']}, {first['sentences']} sentences a language:", ""]
        parts += ["| calibrated behind | " + " | ".join(f"{s}: worst, mean" for s in starts) + " |"]
        parts += ["|---|" + "---|" * len(starts)]
        for name in names:
            cells = [f"{figure(mine[name, s]['worst_kl'])}, {figure(mine[name, s]['mean_kl'])}" for s in starts]
            parts.append(f"| {name} | " + " | ".join(cells) + " |")
        parts.append("")
    return "\n".join(parts)


def figure(value: dict[str, Any]) -> str:
    """Return `419 [388, 455]`, thousandths."""
    if "undefined" in value:
        return "undefined"
    return f"{1000 * value['estimate']:.1f} [{1000 * value['low']:.1f}, {1000 * value['high']:.1f}]"


def render() -> None:
    write_tables(PAGE, tables())


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("read", "calibrate", "render"))
    parser.add_argument("model", nargs="?", default="demo", choices=MODELS)
    parser.add_argument("--folder", help="where the model lies, unless it is bundled")
    parser.add_argument("--langs")
    parser.add_argument("--behind", help="beginnings to calibrate behind, such as bos,plain; all by default")
    parser.add_argument("--sentences", type=int, help="of the confirm part; all by default")
    given = parser.parse_args()
    if given.what == "render":
        render()
    else:
        measure(given)


if __name__ == "__main__":
    main()
