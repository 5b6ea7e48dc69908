"""Quantizes a model folder with llm-compressor's GPTQ on given token rows. Runs in its own environment, never in ours.

    .venv-gptqmodel/bin/python benchmarks/peers/llmcompressor_quantize.py MODEL REQUEST.json OUT

REQUEST holds `rows` (lists of token ids), `bits`, `group_size` and `symmetric`; everything else is its default. OUT
becomes its `compressed-tensors` folder, with `peer.json` beside the weights.
"""

from __future__ import annotations

import json
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer


def quantize(folder: str, request: dict[str, Any], out: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16)
    tokens = [torch.tensor(row) for row in request["rows"]]
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in tokens]
    weights = {
        "num_bits": request["bits"], "type": "int", "symmetric": request["symmetric"], "strategy": "group",
        "group_size": request["group_size"],
    }  # fmt: skip
    recipe = GPTQModifier(config_groups={"group_0": {"targets": ["Linear"], "weights": weights}}, ignore=["lm_head"])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    oneshot(model=model, tokenizer=tokenizer, dataset=DataLoader(rows, batch_size=1), recipe=recipe)
    model.save_pretrained(out, save_compressed=True)
    names = ("llmcompressor", "compressed-tensors", "torch", "transformers", "numpy")
    settings = {"dampening_frac": recipe.dampening_frac, "actorder": str(recipe.actorder)}
    peer = {"versions": {name: metadata.version(name) for name in names}, "settings": settings}
    (out / "peer.json").write_text(json.dumps(peer, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    folder, request, out = sys.argv[1:]
    torch.set_num_threads(1)
    quantize(folder, json.loads(Path(request).read_text(encoding="utf-8")), Path(out))


if __name__ == "__main__":
    main()
