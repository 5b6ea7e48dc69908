"""Architectures that are refused by what they are, each with its reason. Data; asked before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quant_fairness_plugin.model.native import is_wrapper

_DENSE = "expected a decoder-only transformer whose blocks are attention and a dense MLP. Use a model of that shape."
_RECURRENT = (
    "mamba", "mamba2", "falcon_mamba", "rwkv", "xlstm", "recurrent_gemma", "bamba", "falcon_h1", "zamba", "zamba2",
    "plamo2", "kimi_linear", "jamba", "nemotron_h",
)  # fmt: skip
_DECODERS = (
    "bart", "mbart", "marian", "blenderbot", "blenderbot-small", "bigbird_pegasus", "pegasus", "plbart", "mvp",
    "prophetnet", "xlm-prophetnet", "whisper", "trocr", "speech_to_text_2", "musicgen", "musicgen_melody", "moshi",
)  # fmt: skip
_ENCODER_DECODERS = (
    "t5", "mt5", "umt5", "longt5", "switch_transformers", "t5gemma", "t5gemma2", "m2m_100", "nllb-moe", "led", "fsmt",
    "encoder-decoder", "vision-encoder-decoder", "speech-encoder-decoder", "speech_to_text", "pegasus_x", "udop",
)  # fmt: skip
_ENCODERS = (
    "bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert",
    "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm", "xlm-roberta", "xlm-roberta-xl",
    "xlnet", "xmod", "distilbert", "deberta", "deberta-v2", "albert", "modernbert", "mpnet", "esm", "longformer",
    "eurobert", "nomic_bert", "clip", "siglip",
)  # fmt: skip
_REASONS = {
    **dict.fromkeys(_RECURRENT, "a recurrent or state-space model, whose state no calibration of single layers covers"),
    **dict.fromkeys(_DECODERS, "the decoder of an encoder-decoder model, whose encoder is not there"),
    **dict.fromkeys(_ENCODER_DECODERS, "an encoder-decoder model"),
    **dict.fromkeys(_ENCODERS, "an encoder, which does not predict the next token by its training"),
    "bitnet": "a model of ternary weights, which are already quantized",
    "blt": "a model of byte patches, whose encoder and decoder work around the blocks",
    "hrm_text": "a model that runs the same blocks in cycles, so that one layer cannot be protected alone",
    "reformer": "a model of reversible blocks with hashed attention, which cannot be run block by block",
    "git": "a captioning model, whose text decoder attends to an image",
    "mllama": "a model some of whose blocks attend to images alone, which no text calibrates",
}
_OTHER_SENSES = ("vision_config", "audio_config")


def refusal_of(model_type: str, config: Mapping[str, Any]) -> str | None:
    """Return why a model of this type is refused, with what is accepted; None where its structure decides.

    Args:
        model_type: what its config calls it.
        config: its `config.json`.
    """
    reason = _REASONS.get(model_type)
    if reason is None and not is_wrapper(config) and any(isinstance(config.get(key), Mapping) for key in _OTHER_SENSES):
        reason = "a model of text with images or sound, whose class does not say that it wraps a text decoder"
    return None if reason is None else f"{model_type or 'the model'} is {reason}; {_DENSE}"
