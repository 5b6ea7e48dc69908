"""What vLLM calls when it starts (entry point `vllm.general_plugins`): one more quantization method to ask for.

`vllm serve DIR --quantization quant_fairness` computes the 4-bit modules of a checkpoint with our kernels. Without that
option nothing changes: `compressed-tensors`, `gptq` and `awq` stay with vLLM's own.
"""

from __future__ import annotations

from quant_fairness_plugin.serve import VLLM_METHOD


def register() -> None:
    """Make the method known to this process. May be called again, and imports vLLM only here."""
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config

    if VLLM_METHOD in QUANTIZATION_METHODS:
        return
    from quant_fairness_plugin.serve.vllm_quantization import QuantFairnessConfig

    register_quantization_config(VLLM_METHOD)(QuantFairnessConfig)
