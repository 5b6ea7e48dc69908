"""Tiny configs of architectures without a record, of every kind that tracing has to tell apart."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.tiny import VOCABULARY

_IDS = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
_SMALL = _IDS | {
    "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "max_position_embeddings": 128,
}  # fmt: skip
_LATENT = {
    "q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16,
    "num_key_value_heads": 4,
}  # fmt: skip
_LINEAR = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
}  # fmt: skip
_FALCON = {key: value for key, value in _SMALL.items() if key not in ("head_dim", "num_key_value_heads")}
CONFIGS: dict[str, dict[str, Any]] = {
    "granite": _SMALL,
    "phi3": _SMALL,
    "cohere2": _SMALL,
    "gemma2": _SMALL,
    "olmo2": _SMALL,
    "falcon": _FALCON | {"new_decoder_architecture": False, "multi_query": True, "parallel_attn": True},
    "gpt_bigcode": _IDS | {"n_embd": 64, "n_head": 4, "n_inner": 96, "n_positions": 128},
    "minicpm3": _SMALL | _LATENT,
    "nemotron": _SMALL,
    "xglm": _IDS | {"d_model": 64, "ffn_dim": 96, "attention_heads": 4, "pad_token_id": 1},
    "lfm2": _SMALL | {"block_auto_adjust_ff_dim": False},
    "qwen3_5_text": _SMALL | _LINEAR,
    "gemma4_text": _SMALL
    | {
        "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 32, "global_head_dim": 32,
        "num_kv_shared_layers": 2,
    },
}  # fmt: skip
_PATTERNS = {
    "lfm2": ("conv", "full_attention"),
    "qwen3_5_text": ("linear_attention", "linear_attention", "linear_attention", "full_attention"),
    "gemma4_text": ("sliding_attention", "full_attention"),
}
DEPTHS = {"lfm2": 4, "qwen3_5_text": 4, "gemma4_text": 6}
"""Fewest layers that hold every kind of block twice, or once each where that is enough."""


def traced_model(model_type: str, layers: int | None = None) -> PreTrainedModel:
    """A random model in evaluation mode."""
    depth = layers or DEPTHS.get(model_type, 2)
    fields = CONFIGS[model_type] | {key: depth for key in ("num_hidden_layers", "n_layer", "num_layers")}
    if model_type in _PATTERNS:
        pattern = _PATTERNS[model_type]
        fields["layer_types"] = [pattern[layer % len(pattern)] for layer in range(depth)]
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **fields))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.12)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.half().float().eval().requires_grad_(False)
