"""Reads a checkpoint with vLLM and writes what it saw as JSON. Runs in vLLM's own environment, never in ours.

    PYTHON vllm_reader.py CHECKPOINT REQUEST.json RESULT.json

REQUEST holds `prompts` (lists of token ids), and may hold the `quantization` method that vLLM is told to use. RESULT
holds each prompt with vLLM's greedy continuation, the log-probabilities that vLLM gave after each token (of the token
that follows in the prompt; of the five likeliest in the continuation), and, for each linear module under vLLM's own
fused name, what computes it.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

# Set before vllm is imported: it reads them at import. One process, so that a failure shows its own traceback.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
os.environ["HF_HUB_OFFLINE"] = "1"

import torch

NEW_TOKENS = 12
TOP = 5


def quantization_methods(model: torch.nn.Module) -> dict[str, str]:
    """Fused module name → class name of what computes it; vLLM gives every one of its linear modules a method."""
    from vllm.model_executor.layers.linear import LinearBase

    methods = {}
    for name, module in model.named_modules():
        if isinstance(module, LinearBase):
            scheme = getattr(module, "scheme", None)
            methods[name] = type(module.quant_method if scheme is None else scheme).__name__
    return methods


def sequence(output: Any) -> dict[str, Any]:
    """One prompt with its continuation; `predictions[i]` follows token i."""
    prompt, generated = list(output.prompt_token_ids), output.outputs[0]
    of_prompt = [{token: row[token]} for token, row in zip(prompt[1:], output.prompt_logprobs[1:], strict=True)]
    predictions = [*of_prompt, *generated.logprobs]
    return {
        "ids": prompt + list(generated.token_ids),
        "new": len(generated.token_ids),
        "predictions": [{str(token): entry.logprob for token, entry in row.items()} for row in predictions],
    }


def read(checkpoint: str, request: dict[str, Any]) -> dict[str, Any]:
    """Load the checkpoint with vLLM in one process, and run the prompts."""
    import vllm

    longest = max(map(len, request["prompts"])) + NEW_TOKENS
    llm = vllm.LLM(
        checkpoint,
        quantization=request.get("quantization"),
        enforce_eager=True,
        dtype="float16",
        max_model_len=longest,
        max_num_seqs=4,
        max_num_batched_tokens=4 * longest,
        enable_prefix_caching=False,
        seed=0,
    )
    sampling = vllm.SamplingParams(
        temperature=0.0,
        max_tokens=NEW_TOKENS,
        logprobs=TOP,
        prompt_logprobs=0,
        ignore_eos=True,
        detokenize=False,
    )
    prompts = [{"prompt_token_ids": ids} for ids in request["prompts"]]
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    return {
        "version": vllm.__version__,
        "methods": llm.apply_model(quantization_methods)[0],
        "sequences": [sequence(output) for output in outputs],
    }


def main() -> None:
    """Read the checkpoint that the command line names."""
    checkpoint, request, result = sys.argv[1:]
    answer = read(checkpoint, json.loads(Path(request).read_text(encoding="utf-8")))
    Path(result).write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    main()
