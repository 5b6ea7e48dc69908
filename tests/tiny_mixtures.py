"""Configs of tiny mixtures of every family that is taken: four experts a layer, two for each token.

Experts are as wide as the model. Layer 1 has some in every family; layer 0 of several is dense.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import AutoConfig, PretrainedConfig

DENSE_FIRST = (
    "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1", "glm4_moe", "glm4_moe_lite", "ernie4_5_moe", "exaone_moe",
    "afmoe", "axk1", "hy_v3", "laguna", "mimo_v2_flash", "lfm2_moe",
)  # fmt: skip
"""Families whose first layer has no experts."""
SHARED = (
    "qwen2_moe", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1", "glm4_moe", "glm4_moe_lite", "ernie4_5_moe",
    "exaone_moe", "afmoe", "axk1", "hy_v3", "laguna", "solar_open", "hunyuan_v1_moe", "qwen3_next", "qwen3_5_moe",
    "qwen3_5_moe_text",
)  # fmt: skip
"""Families with an expert that every token passes."""
LATENT = ("axk1", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite")
"""Families whose attention keeps a compressed state."""
MIXTURES = (
    *DENSE_FIRST,
    *(name for name in SHARED if name not in DENSE_FIRST),
    "qwen3_moe", "mixtral", "olmoe", "flex_olmo", "cohere2_moe", "mellum", "minimax_m2", "phimoe",
)  # fmt: skip
_HEADLESS = ("qwen2_moe", "olmoe", "deepseek_v3", "phimoe", "lfm2_moe", "flex_olmo", "dots1")
"""Families that are built without `head_dim`, which they read off the width."""
_WHOLE = ("mixtral", "minimax_m2", "phimoe", "hunyuan_v1_moe", "flex_olmo", "cohere2_moe")
"""Families whose experts are as wide as `intermediate_size`."""


def mixture_config(family: str, sizes: Mapping[str, Any], width: int) -> PretrainedConfig:
    """The config of a tiny mixture.

    Args:
        family: one of `MIXTURES`.
        sizes: of a dense model of grouped attention.
        width: of the model and of its experts.
    """
    if family == "qwen3_5_moe":
        return _wrapped(sizes, width)
    fields = {key: value for key, value in sizes.items() if key != "head_dim" or family not in _HEADLESS}
    fields |= _routed(width) | (_latent(family) if family in LATENT else {})
    fields |= {"intermediate_size": width} if family in _WHOLE else {}
    empty = AutoConfig.for_model(family)
    known = {*empty.to_dict(), *empty.attribute_map, "head_dim", "num_key_value_heads"}
    own = _own(family, int(sizes["num_hidden_layers"]), width)
    return AutoConfig.for_model(family, **{key: value for key, value in fields.items() if key in known}, **own)


def _routed(width: int) -> dict[str, Any]:
    experts = dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4)
    chosen = dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk"), 2)
    shared = dict.fromkeys(("n_shared_experts", "moe_num_shared_experts"), 1)
    dense = dict.fromkeys(("first_k_dense_replace", "moe_layer_start_index", "num_dense_layers"), 1)
    groups = {"n_group": 1, "topk_group": 1, "moe_intermediate_size": width}
    return experts | chosen | shared | dense | groups | {"shared_expert_intermediate_size": 2 * width}


def _latent(family: str) -> dict[str, Any]:
    fields = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
    fields |= {"num_key_value_heads": 4}
    if family == "deepseek_v32":
        return fields | {"index_topk": 16, "index_head_dim": 16, "index_n_heads": 4, "head_dim": 8}
    return fields | {"head_dim": 8}


def _own(family: str, layers: int, width: int) -> dict[str, Any]:
    """What a family calls by names of its own, or has no default for."""
    linear = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8}
    linear |= {"linear_value_head_dim": 8}
    late = ["dense", *["sparse"] * (layers - 1)]

    def turns(*kinds: str) -> dict[str, Any]:
        return {"layer_types": [kinds[layer % len(kinds)] for layer in range(layers)]}

    match family:
        case "mixtral":
            return {"sliding_window": None}
        case "qwen3_next" | "qwen3_5_moe_text":
            return linear | turns("full_attention", "linear_attention")
        case "lfm2_moe":
            return turns("conv", "full_attention")
        case "glm4_moe_lite" | "hy_v3" | "laguna" | "mimo_v2_flash":
            return {"mlp_layer_types": late}
        case "minimax_m2":
            return {"rotary_dim": 4}
        case "ernie4_5_moe":
            return {"moe_layer_end_index": layers - 1, "tie_word_embeddings": False}
        case _:
            return {}


def _wrapped(sizes: Mapping[str, Any], width: int) -> PretrainedConfig:
    """A text decoder beside a tiny vision tower."""
    text = mixture_config("qwen3_5_moe_text", sizes, width).to_dict()
    eye = {"depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "patch_size": 4}
    eye |= {"out_hidden_size": width, "num_position_embeddings": 16, "deepstack_visual_indexes": []}
    ids = {"image_token_id": 263, "video_token_id": 262, "vision_start_token_id": 261, "vision_end_token_id": 260}
    return AutoConfig.for_model("qwen3_5_moe", text_config=text, vision_config=eye, **ids)
