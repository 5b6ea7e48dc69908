"""The records of the known architectures."""

from __future__ import annotations

from dataclasses import replace

from quant_fairness_plugin.model.architectures.architecture import Architecture, Fold, FusionGroup, ScaledActivation


def _single(name: str, module: str) -> FusionGroup:
    return FusionGroup(name, (module,), None)


_QKV = FusionGroup("qkv", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn.qkv_proj")
_NORMS = frozenset({"input_layernorm", "post_attention_layernorm"})
_NORM_FOLDS = (Fold("qkv", "input_layernorm"), Fold("fc_in", "post_attention_layernorm"))

_LLAMA = Architecture(
    families=("llama", "mistral"),
    blocks="model.layers",
    units=(
        _QKV,
        _single("o", "self_attn.o_proj"),
        FusionGroup("gate_up", ("mlp.gate_proj", "mlp.up_proj"), "mlp.gate_up_proj"),
        _single("down", "mlp.down_proj"),
    ),
    norms=_NORMS,
    embeddings=("model.embed_tokens",),
    final_norm="model.norm",
    folds=(
        Fold("qkv", "input_layernorm"),
        Fold("o", "self_attn.v_proj"),
        Fold("gate_up", "post_attention_layernorm"),
        Fold("down", "mlp.up_proj"),
    ),
    gguf_names={
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    },
)
_GEMMA = replace(
    _LLAMA,
    families=("gemma",),
    # Its norms multiply by 1 + weight.
    folds=tuple(replace(fold, offset=1.0) if fold.source in _NORMS else fold for fold in _LLAMA.folds),
    tied_by_default=True,
)
_QWEN2 = replace(_LLAMA, families=("qwen2",), biased=frozenset(_QKV.modules))
_QWEN3 = replace(_LLAMA, families=("qwen3",), norms=_NORMS | {"self_attn.q_norm", "self_attn.k_norm"})

_OPT = Architecture(
    families=("opt",),
    blocks="model.decoder.layers",
    units=(_QKV, _single("o", "self_attn.out_proj"), _single("fc_in", "fc1"), _single("fc_out", "fc2")),
    norms=frozenset({"self_attn_layer_norm", "final_layer_norm"}),
    embeddings=("model.decoder.embed_tokens", "model.decoder.embed_positions"),
    final_norm="model.decoder.final_layer_norm",
    tied_by_default=True,
    folds=(
        Fold("qkv", "self_attn_layer_norm"),
        Fold("o", "self_attn.v_proj"),
        Fold("fc_in", "final_layer_norm"),
        Fold("fc_out", "fc1", activated=True),
    ),
)

_GPT_NEOX = Architecture(
    families=("gpt_neox",),
    blocks="gpt_neox.layers",
    units=(
        _single("qkv", "attention.query_key_value"),
        _single("o", "attention.dense"),
        _single("fc_in", "mlp.dense_h_to_4h"),
        _single("fc_out", "mlp.dense_4h_to_h"),
    ),
    norms=_NORMS,
    embeddings=("gpt_neox.embed_in",),
    final_norm="gpt_neox.final_layer_norm",
    head_on_disk="embed_out",
    folds=(*_NORM_FOLDS, Fold("fc_out", "mlp.dense_h_to_4h", activated=True)),
    scaled_activation=ScaledActivation("act", before="dense_h_to_4h"),
    gguf_names={
        "attention.query_key_value": "attn_qkv",
        "attention.dense": "attn_output",
        "mlp.dense_h_to_4h": "ffn_up",
        "mlp.dense_4h_to_h": "ffn_down",
    },
)

_GPT2 = Architecture(
    families=("gpt2",),
    blocks="transformer.h",
    units=(
        _single("qkv", "attn.c_attn"),
        _single("o", "attn.c_proj"),
        _single("fc_in", "mlp.c_fc"),
        _single("fc_out", "mlp.c_proj"),
    ),
    norms=frozenset({"ln_1", "ln_2"}),
    embeddings=("transformer.wte", "transformer.wpe"),
    final_norm="transformer.ln_f",
    conv1d=True,
    tied_by_default=True,
    default_positions=1024,
    folds=(Fold("qkv", "ln_1"), Fold("fc_in", "ln_2"), Fold("fc_out", "mlp.c_fc", activated=True)),
    gguf_names={
        "attn.c_attn": "attn_qkv",
        "attn.c_proj": "attn_output",
        "mlp.c_fc": "ffn_up",
        "mlp.c_proj": "ffn_down",
    },
)

_BLOOM = Architecture(
    families=("bloom",),
    blocks="transformer.h",
    units=(
        _single("qkv", "self_attention.query_key_value"),
        _single("o", "self_attention.dense"),
        _single("fc_in", "mlp.dense_h_to_4h"),
        _single("fc_out", "mlp.dense_4h_to_h"),
    ),
    norms=_NORMS,
    embeddings=("transformer.word_embeddings",),
    final_norm="transformer.ln_f",
    tied_by_default=True,
    folds=_NORM_FOLDS,
    scaled_activation=ScaledActivation("gelu_impl", before="dense_h_to_4h"),
    gguf_names={
        "self_attention.query_key_value": "attn_qkv",
        "self_attention.dense": "attn_output",
        "mlp.dense_h_to_4h": "ffn_up",
        "mlp.dense_4h_to_h": "ffn_down",
    },
    static_cache=False,
)

ARCHITECTURES = (_QWEN3, _QWEN2, _LLAMA, _GEMMA, _OPT, _GPT_NEOX, _GPT2, _BLOOM)
"""The first record that a block matches is taken, so the more specific ones come first."""
