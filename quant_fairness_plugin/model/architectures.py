"""Step 1, the layouts of the supported architectures: pure data, read by `families.detect_family`.

To add an architecture, add a `Layout` here and a tiny random model of it to `tests/tiny.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Unit:
    """A fusion group of a block: modules that servers merge into one, so they must share a precision."""

    name: str
    """`qkv`, `o`, `gate_up`, `down`, `fc_in`, `fc_out`; in a generic family the module's own name."""
    modules: tuple[str, ...]
    """Names relative to the block, in the order in which servers concatenate them."""
    fused: str | None
    """The name of the merged module in servers, relative to the block; None where the module keeps its own name."""


@dataclass(frozen=True, slots=True)
class Layout:
    """What the blocks of one or several families look like, and where the rest of the model is."""

    families: tuple[str, ...]
    """Structurally equal families; the first one stands for any other `model_type` of this structure."""
    blocks: str
    units: tuple[Unit, ...]
    norms: frozenset[str]
    embeddings: tuple[str, ...]
    final_norm: str
    conv1d: bool = False
    biased: frozenset[str] | None = None
    """The modules that have a bias, where that is what tells the family apart."""


def _single(name: str, module: str) -> Unit:
    return Unit(name, (module,), None)


_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_GATED_UNITS = (
    Unit("qkv", _QKV, "self_attn.qkv_proj"),
    _single("o", "self_attn.o_proj"),
    Unit("gate_up", ("mlp.gate_proj", "mlp.up_proj"), "mlp.gate_up_proj"),
    _single("down", "mlp.down_proj"),
)
_GATED_NORMS = frozenset({"input_layernorm", "post_attention_layernorm"})


def _gated(*families: str, norms: frozenset[str] = _GATED_NORMS, biased: frozenset[str] | None = None) -> Layout:
    embeddings = ("model.embed_tokens",)
    return Layout(families, "model.layers", _GATED_UNITS, norms, embeddings, "model.norm", biased=biased)


# The first layout that fits is taken, so the more specific ones come first.
LAYOUTS = (
    _gated("qwen3", norms=_GATED_NORMS | {"self_attn.q_norm", "self_attn.k_norm"}),
    _gated("qwen2", biased=frozenset(_QKV)),
    _gated("llama", "mistral", "gemma"),
    Layout(
        ("opt",),
        "model.decoder.layers",
        (
            Unit("qkv", _QKV, "self_attn.qkv_proj"),
            _single("o", "self_attn.out_proj"),
            _single("fc_in", "fc1"),
            _single("fc_out", "fc2"),
        ),
        frozenset({"self_attn_layer_norm", "final_layer_norm"}),
        ("model.decoder.embed_tokens", "model.decoder.embed_positions"),
        "model.decoder.final_layer_norm",
    ),
    Layout(
        ("gpt_neox",),
        "gpt_neox.layers",
        (
            _single("qkv", "attention.query_key_value"),
            _single("o", "attention.dense"),
            _single("fc_in", "mlp.dense_h_to_4h"),
            _single("fc_out", "mlp.dense_4h_to_h"),
        ),
        _GATED_NORMS,
        ("gpt_neox.embed_in",),
        "gpt_neox.final_layer_norm",
    ),
    Layout(
        ("gpt2",),
        "transformer.h",
        (
            _single("qkv", "attn.c_attn"),
            _single("o", "attn.c_proj"),
            _single("fc_in", "mlp.c_fc"),
            _single("fc_out", "mlp.c_proj"),
        ),
        frozenset({"ln_1", "ln_2"}),
        ("transformer.wte", "transformer.wpe"),
        "transformer.ln_f",
        conv1d=True,
    ),
    Layout(
        ("bloom",),
        "transformer.h",
        (
            _single("qkv", "self_attention.query_key_value"),
            _single("o", "self_attention.dense"),
            _single("fc_in", "mlp.dense_h_to_4h"),
            _single("fc_out", "mlp.dense_4h_to_h"),
        ),
        _GATED_NORMS,
        ("transformer.word_embeddings",),
        "transformer.ln_f",
    ),
)

KNOWN_FAMILIES = tuple(sorted(name for layout in LAYOUTS for name in layout.families))


@dataclass(frozen=True, slots=True)
class Fold:
    """The module of a block that the input scale of a fusion group is folded into."""

    unit: str
    """The fusion group whose weights are multiplied."""
    source: str
    """The norm or linear module that is divided, relative to the block."""
    offset: float = 0.0
    """What a norm adds to its weight before it multiplies."""


_LLAMA = (
    Fold("qkv", "input_layernorm"),
    Fold("o", "self_attn.v_proj"),
    Fold("gate_up", "post_attention_layernorm"),
    Fold("down", "mlp.up_proj"),
)


_NEOX = (Fold("qkv", "input_layernorm"), Fold("fc_in", "post_attention_layernorm"))


FOLDS: Mapping[str, tuple[Fold, ...]] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": tuple(replace(fold, offset=1.0) if "norm" in fold.source else fold for fold in _LLAMA),
    "opt": (
        Fold("qkv", "self_attn_layer_norm"),
        Fold("o", "self_attn.v_proj"),
        Fold("fc_in", "final_layer_norm"),
        Fold("fc_out", "fc1"),
    ),
    "gpt_neox": (*_NEOX, Fold("fc_out", "mlp.dense_h_to_4h")),
    "gpt2": (Fold("qkv", "ln_1"), Fold("fc_in", "ln_2"), Fold("fc_out", "mlp.c_fc")),
    "bloom": _NEOX,
}


_SEVEN = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


GGUF_NAMES: dict[str, dict[str, str]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma"), _SEVEN),
    "gpt_neox": {
        "attention.query_key_value": "attn_qkv",
        "attention.dense": "attn_output",
        "mlp.dense_h_to_4h": "ffn_up",
        "mlp.dense_4h_to_h": "ffn_down",
    },
    "gpt2": {"attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"},
    "bloom": {
        "self_attention.query_key_value": "attn_qkv",
        "self_attention.dense": "attn_output",
        "mlp.dense_h_to_4h": "ffn_up",
        "mlp.dense_4h_to_h": "ffn_down",
    },
}
"""Family → module of a block → what llama.cpp calls its weight in `blk.<layer>.<name>.weight`."""


SCALED_ACTIVATIONS = {"bloom": ("gelu_impl", "dense_h_to_4h"), "gpt_neox": ("act", "dense_h_to_4h")}
"""`model_type` → (activation, the module before it). Transformers wraps these activations of every block of an AWQ
model in one that divides by `<activation>.scales`, and leaves NaN there where the file has none."""
