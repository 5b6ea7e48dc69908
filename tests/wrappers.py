"""Tiny random models whose text decoder is a part of them: Gemma 3, whose names differ on disk, and Qwen3-VL."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    AutoModelForMultimodalLM,
    Gemma3Config,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen3VLConfig,
)

from tests.tiny import VOCABULARY, byte_tokenizer

WRAPPERS = ("gemma3", "qwen3_vl")


def wrapper_config(kind: str, *, layers: int = 2, width: int = 32) -> PretrainedConfig:
    """The config of a tiny wrapper: a text decoder of 4 heads, and two blocks that see."""
    text = {
        "vocab_size": VOCABULARY,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": None,
    }
    if kind == "gemma3":
        return Gemma3Config(
            text_config=text | {"sliding_window": 16},
            vision_config={
                "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
                "image_size": 28, "patch_size": 14,
            },
            mm_tokens_per_image=4, image_token_index=263, boi_token_index=262, eoi_token_index=261,
        )  # fmt: skip
    if kind == "qwen2_5_vl":
        return Qwen2_5_VLConfig(
            text_config=text | {"rope_scaling": {"rope_type": "default", "mrope_section": [2, 1, 1]}},
            vision_config={
                "depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": width,
                "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "fullatt_block_indexes": [1],
            },
            image_token_id=263, video_token_id=262,
        )  # fmt: skip
    return Qwen3VLConfig(
        text_config=text
        | {"rope_scaling": {"rope_type": "default", "mrope_section": [2, 1, 1], "mrope_interleaved": True}},
        vision_config={
            "depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": width,
            "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
        image_token_id=263, video_token_id=262, vision_start_token_id=261, vision_end_token_id=260,
    )  # fmt: skip


def make_wrapper(kind: str, *, layers: int = 2, width: int = 32) -> PreTrainedModel:
    """A random wrapper in float32 whose predictions differ from uniform."""
    torch.manual_seed(0)
    config = wrapper_config(kind, layers=layers, width=width)
    model: PreTrainedModel = AutoModelForMultimodalLM.from_config(config)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0.0, 0.15)
            else:
                parameter.add_(0.05 * torch.randn_like(parameter))
    model.train(False)
    return model


def write_wrapper(folder: Path, kind: str, *, layers: int = 2, width: int = 32) -> None:
    """Write a random wrapper in bfloat16, as such models are published, its text decoder and its other parts alike."""
    model = make_wrapper(kind, layers=layers, width=width)
    model.to(torch.bfloat16)  # type: ignore[arg-type] # Transformers types `to` as if it were a method of the class
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
