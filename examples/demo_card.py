"""The card of a bundled model, from the record of its training."""

from __future__ import annotations

from typing import Any

from demo_corpus import VOCABULARY


def model_card(record: dict[str, Any]) -> str:
    """The card of the bundled folder, every figure taken from `training.json`."""
    arguments, versions = record["arguments"], record["versions"]
    shape = "Llama, 4 heads, 2 kv heads" if arguments["arch"] == "llama" else "GPT-2, 4 heads"
    rows = "\n".join(
        f"| {tag} | {record['mixture'][tag]:.0%} | {row['train_bytes']:,} | {row['bits_per_byte']:.3f} "
        f"| {row['byte_bigram_bits_per_byte']:.3f} | {_better(row)} |"
        for tag, row in record["held_out"].items()
    )
    curve = "\n".join(
        f"| {row['step']} | {row['tokens']:,} | {row['train_nats']:.3f} |" for row in record["curve"][4::10]
    )
    return f"""---
license: cc0-1.0
library_name: transformers
pipeline_tag: text-generation
language: [{", ".join(record["mixture"])}]
---

# Bundled model of quant-fairness ({shape}, 12 layers x 256)

A small language model with a *controlled* resource imbalance, to show and test language-by-language quantization
offline. It knows the Bible and nothing else; do not use it for anything but that.

Trained on public-domain and CC0 Bible translations (English: Berean Standard Bible), each language cut to the share of
chapters below. Byte-level BPE of {VOCABULARY} tokens fitted on that mixture, head tied to the embedding, float16.

| language | share of chapters | training bytes | test BPB | byte bigram BPB | better than the bigram |
|---|---|---|---|---|---|
{rows}

Test = isolated verses of held-out chapters (no synoptic duplicates). The bigram is fitted on the same training text.

Command: `{record["command"]}`
Seed {arguments["seed"]}, {record["steps"]:,} steps, {record["tokens"]:,} tokens, {record["seconds"]:,} s on
{arguments["device"]} ({arguments["threads"]} thread(s)); torch {versions["torch"]}, transformers
{versions["transformers"]}.

| step | tokens | training loss, nats per token |
|---|---|---|
{curve}

The whole curve and every argument: `training.json`.
"""


def _better(row: dict[str, float]) -> str:
    return "yes" if row["bits_per_byte"] < row["byte_bigram_bits_per_byte"] else "no"
