"""Which models that bring code Transformers can load without it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

CODE_KEYS = ("auto_map", "model_file")
"""Keys of config.json and tokenizer_config.json that name code of the folder."""


WRAPPER_ENDING = "ForConditionalGeneration"
"""Of the class names of models whose text decoder is a part of them. Encoder-decoders have it too."""
_PARTS = ("text_config", "vision_config", "audio_config")


def is_wrapper(config: Mapping[str, Any]) -> bool:
    """Return whether a config is that of a model whose text decoder is a part of it."""
    architectures = config.get("architectures") or ()
    parts = any(isinstance(config.get(key), Mapping) for key in _PARTS)
    return parts and (not architectures or any(str(name).endswith(WRAPPER_ENDING) for name in architectures))


def auto_class(config: Mapping[str, Any]) -> Any:
    """Return the class of Transformers that builds and loads a model of this `config.json`. Imports Transformers."""
    from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM

    return AutoModelForMultimodalLM if is_wrapper(config) else AutoModelForCausalLM


def is_native(folder: Path, config: Mapping[str, Any], tokenizer: Mapping[str, Any]) -> bool:
    """Return whether Transformers has a language model of this type, and a tokenizer, of its own.

    Imports Transformers, which takes seconds; asked only of models that name code.

    Args:
        folder: the model.
        config: its `config.json`.
        tokenizer: its `tokenizer_config.json`, empty where there is none.
    """
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    )
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

    known_types = MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES if is_wrapper(config) else MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if config.get("model_type") not in known_types:
        return False
    if not any(key in tokenizer for key in CODE_KEYS):
        return True
    known = {_plain(name) for name in TOKENIZER_MAPPING_NAMES.values() if name}
    known |= {"PreTrainedTokenizer", "TokenizersBackend"}
    # What it has no class for, Transformers reads from tokenizer.json alone.
    return _plain(str(tokenizer.get("tokenizer_class"))) in known or (folder / "tokenizer.json").is_file()


def _plain(name: str) -> str:
    return name.removesuffix("Fast")
