"""Serve: load an exported checkpoint with our own kernels and run it.

`load.load_quantized` takes a folder, `swap.use_kernels` a model that Transformers has loaded; both put the module of
`linear` in the place of every 4-bit one. `kernels` chooses what computes, `planes` repacks, `generate` writes text.
"""

from __future__ import annotations

VLLM_METHOD = "quant_fairness"
"""What vLLM calls our quantization method: `vllm serve DIR --quantization quant_fairness`."""
