"""Reads a checkpoint with gptqmodel and writes what it saw as JSON. Runs in gptqmodel's own environment, never in ours.

    PYTHON gptqmodel_reader.py CHECKPOINT REQUEST.json RESULT.json

REQUEST holds `prompts` (lists of token ids). RESULT holds each prompt with gptqmodel's log-probabilities of the five
likeliest tokens after each token, and the class of each linear module.
"""

from __future__ import annotations

import json
import os
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

# gptqmodel sizes its thread pools from the cores at import, and refuses to start with fewer than two workers.
os.environ["GPTQMODEL_CPU_WORKERS"] = "2"
os.environ["HF_HUB_OFFLINE"] = "1"

import torch

TOP = 5


@torch.no_grad()
def sequence(model: torch.nn.Module, ids: list[int]) -> dict[str, Any]:
    """One prompt; `predictions[i]` follows token i."""
    logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()
    best = logits.log_softmax(-1).topk(TOP)
    rows = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    predictions = [dict(zip(map(str, tokens), values, strict=True)) for tokens, values in rows]
    return {"ids": ids, "new": 0, "predictions": predictions}


def read(checkpoint: str, request: dict[str, Any]) -> dict[str, Any]:
    """Load the checkpoint with gptqmodel's plain kernel, and run the prompts."""
    from gptqmodel import BACKEND, GPTQModel

    wrapper = GPTQModel.load(checkpoint, device="cpu", backend=BACKEND.TORCH, dtype=torch.float16)
    model = wrapper.model
    linears = {name: type(m).__name__ for name, m in model.named_modules() if "Linear" in type(m).__name__}
    return {
        "version": metadata.version("gptqmodel"),
        "methods": linears,
        "sequences": [sequence(model, ids) for ids in request["prompts"]],
    }


def main() -> None:
    """Read the checkpoint that the command line names."""
    checkpoint, request, result = sys.argv[1:]
    torch.set_num_threads(1)
    answer = read(checkpoint, json.loads(Path(request).read_text(encoding="utf-8")))
    Path(result).write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    main()
