"""Reads a checkpoint with Transformers, as a user would, and writes what it saw as JSON.

    PYTHON transformers_reader.py CHECKPOINT REQUEST.json RESULT.json

Runs in our environment for `compressed-tensors`, and in gptqmodel's for `gptq` and `awq`, which Transformers reads
with its help. REQUEST holds `prompts` (lists of token ids). RESULT holds each prompt with the log-probabilities of the
five likeliest tokens after each token, and the class of each linear module.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

# gptqmodel sizes its thread pools from the cores at import, and refuses to start with fewer than two workers.
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from transformers import AutoModelForCausalLM, AwqConfig, GPTQConfig
from transformers.utils.quantization_config import AwqBackend

TOP = 5
LOADING_PROBLEMS = ("missing_keys", "unexpected_keys", "mismatched_keys")


def plain_kernel(checkpoint: str) -> dict[str, Any]:
    """Arguments that choose gptqmodel's plain torch kernel: its default one on a CPU computes in bfloat16."""
    config = json.loads((Path(checkpoint) / "config.json").read_text(encoding="utf-8"))
    method = (config.get("quantization_config") or {}).get("quant_method")
    if method == "gptq":
        return {"quantization_config": GPTQConfig(bits=4, backend="torch"), "device_map": "cpu"}
    if method == "awq":
        return {"quantization_config": AwqConfig(backend=AwqBackend.TORCH_AWQ), "device_map": "cpu"}
    return {}


def method(module: torch.nn.Module) -> str:
    """What computes a linear module; compressed-tensors leaves the class as it was."""
    scheme = getattr(module, "quantization_scheme", None)
    if scheme is None:
        return type(module).__name__
    return f"{type(module).__name__} from {scheme.weights.num_bits} bits"


@torch.no_grad()
def sequence(model: torch.nn.Module, ids: list[int]) -> dict[str, Any]:
    """One prompt; `predictions[i]` follows token i."""
    logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()
    best = logits.log_softmax(-1).topk(TOP)
    rows = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    predictions = [dict(zip(map(str, tokens), values, strict=True)) for tokens, values in rows]
    return {"ids": ids, "new": 0, "predictions": predictions}


def copied(checkpoint: str) -> set[str]:
    """Return the tensors that the folder's record says were only copied, which no module need have."""
    record = Path(checkpoint) / "quant_fairness.json"
    content = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    return set(content.get("copied_tensors") or ())


def model_class(checkpoint: str) -> Any:
    """Return the class that the config names where the text decoder is a part of the model, else the causal one."""
    config = json.loads((Path(checkpoint) / "config.json").read_text(encoding="utf-8"))
    named = next(iter(config.get("architectures") or ()), "")
    return getattr(transformers, named) if named.endswith("ForConditionalGeneration") else AutoModelForCausalLM


def read(checkpoint: str, request: dict[str, Any]) -> dict[str, Any]:
    """Load, refuse gaps that Transformers would have filled with random numbers, and run the prompts."""
    loaded: Any = model_class(checkpoint).from_pretrained(
        checkpoint, dtype=torch.float16, output_loading_info=True, **plain_kernel(checkpoint)
    )
    model, info = loaded
    gaps = {
        problem: sorted(set(map(str, info.get(problem) or ())) - copied(checkpoint))[:5] for problem in LOADING_PROBLEMS
    }
    if any(gaps.values()):
        raise ValueError(f"Transformers reports {gaps}")
    model.train(False)
    linears = {
        name: method(module)
        for name, module in model.named_modules()
        if "Linear" in type(module).__name__ or hasattr(module, "quantization_scheme")
    }
    return {
        "version": transformers.__version__,
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
