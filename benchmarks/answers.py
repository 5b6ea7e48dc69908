"""How long it takes to ask a 16-bit model and a checkpoint the bundled prompts, and how many answers are faulty.

    python benchmarks/answers.py --model SmolLM2-135M --checkpoint DIR --langs en,fr,es,ru,ar,zh     # adds a row

Both models are in memory before the clock starts. Seconds of the processor are user and system time of one thread, so
that what else the machine does hardly matters.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rows import conditions

from quant_fairness_plugin.answers.ask import has_chat_template, write_answers
from quant_fairness_plugin.answers.faults import find_faults
from quant_fairness_plugin.answers.prompts import NEW_TOKENS, load_prompts
from quant_fairness_plugin.artifacts import FAULTS, write_atomically
from quant_fairness_plugin.checkpoint.folder import load_record
from quant_fairness_plugin.model.load import load_model
from quant_fairness_plugin.serve.load import load_quantized

ROWS = Path(__file__).parents[1] / "benchmarks" / "results" / "cpu" / "answers.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True, help="the 16-bit model: a folder or a name")
    parser.add_argument("--name", help="what to call it in the row; default: its name")
    parser.add_argument("--checkpoint", type=Path, required=True, help="a checkpoint made from it")
    parser.add_argument("--langs", required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    row = measure(options.model, options.checkpoint, options.langs.split(","))
    row |= {"model": options.name or Path(options.model).name}
    command = f"python benchmarks/answers.py --model {row['model']} --checkpoint DIR --langs {options.langs}"
    row |= conditions(command=command, seed=0)
    sys.stdout.write(json.dumps(row, indent=1, ensure_ascii=False) + "\n")
    lines = ROWS.read_text(encoding="utf-8") if ROWS.exists() else ""
    write_atomically(ROWS, (lines + json.dumps(row, ensure_ascii=False) + "\n").encode())


def measure(name: str, folder: Path, languages: Sequence[str]) -> dict[str, Any]:
    loaded, record, prompts = load_model(name), load_record(folder), load_prompts("bundled")
    assert prompts is not None
    chat = has_chat_template(loaded.tokenizer)
    texts = {language: prompts.of(language, chat=chat) for language in languages}
    row: dict[str, Any] = {
        "kind": "answers",
        "checkpoint": f"{record.method} {record.grids}, {record.format}, {record.plan.source}",
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "threads": 1,
        "languages": list(languages),
        "prompts": sum(map(len, texts.values())),
        "new_tokens": NEW_TOKENS,
        "chat_template": chat,
    }
    flat = [(language, text) for language, rows in texts.items() for text in rows]
    for state, model in (("sixteen_bit", loaded.model), ("checkpoint", load_quantized(folder, kernel="reference"))):
        cpu, wall = time.process_time(), time.perf_counter()
        written = write_answers(model, loaded.tokenizer, [text for _, text in flat])
        row[f"{state}_cpu_seconds"] = round(time.process_time() - cpu, 2)
        row[f"{state}_wall_seconds"] = round(time.perf_counter() - wall, 2)
        found = [find_faults(answer, texts[lang]) for (lang, _), answer in zip(flat, written, strict=True)]
        row[f"{state}_faults"] = {fault: sum(fault in faults for faults in found) for fault in FAULTS}
        row[f"{state}_answers"] = [f"{lang}: {text}" for (lang, _), text in zip(flat, written, strict=True)]
    return row


if __name__ == "__main__":
    main()
