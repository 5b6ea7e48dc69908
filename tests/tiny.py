"""Tiny random models of every supported family, with a byte-level tokenizer, written as Hugging Face folders."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    BloomConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from quant_fairness_plugin.model.native import auto_class
from tests.tiny_mixtures import MIXTURES as MIXTURES
from tests.tiny_mixtures import mixture_config

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "opt", "gpt_neox", "gpt2", "bloom")
VOCABULARY = 264
END_OF_TEXT = "<|endoftext|>"
NOTHING: Mapping[str, Any] = MappingProxyType({})


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, plus `<|endoftext|>` as BOS and EOS; lossless on every text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {END_OF_TEXT: 0} | {symbol: i + 1 for i, symbol in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT)


def tiny_config(family: str, *, layers: int, width: int) -> PretrainedConfig:
    """The config of a tiny model: 4 heads (2 kv heads where grouped), MLP twice the width."""
    ids = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    modern = ids | {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
    }
    grouped = modern | {"num_key_value_heads": 2, "head_dim": max(8, width // 4)}
    match family:
        case "llama":
            return LlamaConfig(**grouped)
        case "mistral":
            return MistralConfig(**grouped, sliding_window=None)
        case "qwen2":
            return Qwen2Config(**{k: v for k, v in grouped.items() if k != "head_dim"})
        case "qwen3":
            return Qwen3Config(**grouped)
        case "gemma":
            return GemmaConfig(**grouped)
        case "opt":
            sizes = {"hidden_size": width, "word_embed_proj_dim": width, "ffn_dim": 2 * width}
            rest = {"num_hidden_layers": layers, "num_attention_heads": 4, "max_position_embeddings": 256}
            return OPTConfig(**(ids | sizes | rest))
        case "gpt_neox":
            return GPTNeoXConfig(**modern)
        case "gpt2":
            return GPT2Config(**ids, n_embd=width, n_layer=layers, n_head=4, n_positions=256, n_inner=2 * width)
        case "bloom":
            return BloomConfig(**ids, hidden_size=width, n_layer=layers, n_head=4)
        case _:
            return mixture_config(family, grouped, width)


def write_tiny_model(
    folder: Path,
    family: str,
    *,
    layers: int = 2,
    width: int = 32,
    dtype: str = "float16",
    changes: Mapping[str, Any] = NOTHING,
) -> None:
    """Write a random model whose weights are large enough that its predictions differ from uniform."""
    torch.manual_seed(0)
    config = tiny_config(family, layers=layers, width=width)
    config = type(config).from_dict(config.to_dict() | dict(changes))
    model = auto_class(config.to_dict()).from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0.0, 0.15)
            else:
                parameter.add_(0.05 * torch.randn_like(parameter))
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
