"""A tiny model with random weights of any causal architecture of Transformers, as a checkpoint folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerFast

SEED = 0
VOCABULARY, MOST_VALUES = 264, 30_000_000
_IDS = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
_PLAIN = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128,
}  # fmt: skip
_GPT = {"n_embd": 64, "n_layer": 4, "n_head": 4, "n_inner": 96, "n_positions": 128, "n_ctx": 128, "rotary_dim": 8}
_MPT = {"d_model": 64, "n_layers": 4, "n_heads": 4, "ffn_dim": 96, "attention_heads": 4, "num_layers": 4, "dff": 96}
_ALL = _IDS | _PLAIN | _GPT | _MPT
_LATENT = {
    "q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16,
    "num_key_value_heads": 4,
}  # fmt: skip
_LINEAR = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
}  # fmt: skip
_ROUTED = {
    "num_experts": 4, "n_routed_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1,
}  # fmt: skip
_LATE = {"n_shared_experts": 1, "first_k_dense_replace": 1}
_TEXT = _IDS | _PLAIN
_GEMMA3_EYE = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
_EYE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28}
_QWEN_EYE = {
    "depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64, "patch_size": 4,
    "spatial_merge_size": 2, "temporal_patch_size": 2, "num_position_embeddings": 16, "deepstack_visual_indexes": [],
}  # fmt: skip
_QWEN_ROTARY = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
_OWN: Mapping[str, Mapping[str, Any]] = {
    "gemma3": {
        "text_config": _TEXT | {"sliding_window": 16}, "vision_config": _GEMMA3_EYE, "mm_tokens_per_image": 4,
        "image_token_index": 263, "boi_token_index": 262, "eoi_token_index": 261,
    },
    "qwen3_5": {
        "text_config": _TEXT | _LINEAR | {"rope_parameters": _QWEN_ROTARY | {"partial_rotary_factor": 1.0}},
        "vision_config": _QWEN_EYE, "image_token_id": 263, "video_token_id": 262, "vision_start_token_id": 261,
        "vision_end_token_id": 260,
    },
    "qwen3_5_moe": {
        "text_config": _TEXT | _LINEAR | _ROUTED | {
            "shared_expert_intermediate_size": 32, "rope_parameters": _QWEN_ROTARY | {"partial_rotary_factor": 1.0},
        },
        "vision_config": _QWEN_EYE, "image_token_id": 263, "video_token_id": 262, "vision_start_token_id": 261,
        "vision_end_token_id": 260,
    },
    "qwen4_exp_text": {
        "rope_parameters": _QWEN_ROTARY | {"partial_rotary_factor": 1.0}, "shared_expert_intermediate_size": 32,
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 64,
        "indexer_compress_ratio": 4, "hc_lowrank": 8, "ple_embed_dim": 16, "ngram_vocab_size_base": 64,
        "split_ngram_parts": 2, "heads_per_ngram": 2, "make_ngram_vocab_size_divisible_by": 8,
    },
    "longcat_flash": _LATENT | {
        "n_routed_experts": 4, "zero_expert_num": 2, "moe_topk": 2, "expert_ffn_hidden_size": 32, "ffn_hidden_size": 96,
        "num_layers": 2,
    },
    "llama4": {
        "text_config": _TEXT | _ROUTED | {"intermediate_size_mlp": 96, "attention_chunk_size": 32},
        "vision_config": _EYE | {"vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16},
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64},
    },
    "emu3": {
        "text_config": _TEXT | {"pad_token_id": 0}, "vocabulary_map": {"image": 263},
        "vq_config": {"base_channels": 32},
    },
    "gemma4": {
        "text_config": _TEXT | {
            "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 32, "global_head_dim": 32,
            "num_hidden_layers": 6, "num_kv_shared_layers": 2, "pad_token_id": 0,
            "layer_types": ["sliding_attention", "full_attention"] * 3,
        },
    },
    "deepseek_v2": _LATENT | _ROUTED | _LATE,
    "dots1": _ROUTED | _LATE,
    "falcon": {"num_kv_heads": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "glm": {"partial_rotary_factor": 0.5},
    "glm4": {"partial_rotary_factor": 0.5},
    "gemma4_text": {
        "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 32, "global_head_dim": 32,
        "num_hidden_layers": 6, "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 3,
    },
    "gemma3n_text": {
        "num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"] * 2,
        "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 32, "num_hidden_layers": 4,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2, "num_hidden_layers": 4,
        "rope_parameters": dict.fromkeys(
            ("sliding_attention", "full_attention"),
            {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [3, 3, 2]},
        ),
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2": {"block_auto_adjust_ff_dim": False, "layer_types": ["conv", "full_attention"] * 2},
    "minicpm3": _LATENT,
    "youtu": _LATENT,
    "doge": {"num_key_value_heads": 4},
    "xglm": {"pad_token_id": 1},
    "biogpt": {"pad_token_id": 1},
    "nemotron_h": {
        "hybrid_override_pattern": "M-*-", "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 16,
        "n_groups": 1,
    },
}  # fmt: skip
"""What some architectures need beside the sizes that all are given."""
_WITHOUT: Mapping[str, tuple[str, ...]] = {
    "falcon": ("head_dim", "num_key_value_heads"),
    "lfm2": ("head_dim",),
}


def tiny_config(model_type: str) -> Iterator[PretrainedConfig]:
    """Yield small configs of an architecture: of sizes that fit most, and its own sizes made narrow."""
    from transformers import AutoConfig

    from quant_fairness_plugin.model.small import narrowed, shortened

    try:
        empty = AutoConfig.for_model(model_type)
        known = {*empty.to_dict(), *empty.attribute_map} - {key for key in _ROUTED if getattr(empty, key, None) is None}
    except Exception:  # noqa: BLE001 - some configs have no defaults
        known = {*_ALL, *_ROUTED}
    left_out = _WITHOUT.get(model_type, ())
    sizes = {key: value for key, value in (_ALL | _LINEAR | _ROUTED).items() if key in known and key not in left_out}
    own = _OWN.get(model_type, {})
    latent = {key: value for key, value in _LATENT.items() if key in known}
    deeper = {key: 6 for key in ("num_hidden_layers",) if key in sizes}  # a pattern of six kinds of layers
    for given in (sizes | dict(own), sizes | latent | dict(own), sizes | deeper | dict(own)):
        try:
            yield AutoConfig.for_model(model_type, **given)
        except Exception:  # noqa: BLE001 - configs check themselves in ways of their own
            continue
    try:
        default = AutoConfig.for_model(model_type)
        yield type(default).from_dict(narrowed(shortened(default.to_dict(), 4)) | _IDS)
    except Exception:  # noqa: BLE001 - as above
        return


def write_tiny(model_type: str, folder: Path) -> str:
    """Write a random model as a checkpoint folder; return why none could be made, or nothing."""
    import torch
    from transformers import AutoModelForCausalLM

    from quant_fairness_plugin.model.small import randomize

    problem = "no tiny config of it builds"
    for config in tiny_config(model_type):
        try:
            with torch.device("meta"):
                values = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
            if values > MOST_VALUES:
                problem = f"not tried: the smallest config of it that is made here holds {values:,} values"
                continue
            torch.manual_seed(SEED)
            model = AutoModelForCausalLM.from_config(config).float().eval()
            randomize(model)
            ids = torch.arange(2, 12)[None]
            with torch.no_grad():
                if not torch.isfinite(model(input_ids=ids, use_cache=False).logits).all():
                    raise ValueError("its logits are not finite")
            model.half().save_pretrained(folder)
        except Exception as err:  # noqa: BLE001 - code of any architecture runs here
            problem = f"no tiny model of it runs ({type(err).__name__}: {' '.join(str(err).split())[:100]})"
            continue
        byte_tokenizer().save_pretrained(folder)
        return ""
    return problem


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and one that begins and ends a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    end = "<|endoftext|>"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({end: 0} | {symbol: i + 1 for i, symbol in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=end, eos_token=end)
