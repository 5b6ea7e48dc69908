"""Serve a checkpoint with vLLM; run this in vLLM's own environment, which needs nothing of ours.

    python serve_with_vllm.py CHECKPOINT [PROMPT ...]

For a server instead: `vllm serve CHECKPOINT`, and a client of the OpenAI API. vLLM reads the quantization from the
checkpoint's config.json; which families and formats it loads was run and is listed in docs/readers.md. On a CPU it
wants nearly all memory, unless VLLM_CPU_KVCACHE_SPACE=4 says how many GiB.
"""

from __future__ import annotations

import sys

from vllm import LLM, SamplingParams


def main(checkpoint: str, *prompts: str) -> None:
    llm = LLM(checkpoint, max_model_len=128, enforce_eager=True)  # on a GPU leave out enforce_eager: it is faster
    greedy = SamplingParams(temperature=0.0, max_tokens=16)
    for answer in llm.generate(list(prompts or ("In the beginning",)), greedy):
        print(repr(answer.prompt), "→", repr(answer.outputs[0].text))


if __name__ == "__main__":
    main(*sys.argv[1:])
