"""Which models that bring code Transformers can load without it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

CODE_KEYS = ("auto_map", "model_file")
"""Keys of config.json and tokenizer_config.json that name code of the folder."""


def is_native(folder: Path, config: Mapping[str, Any], tokenizer: Mapping[str, Any]) -> bool:
    """Return whether Transformers has a causal language model of this type, and a tokenizer, of its own.

    Imports Transformers, which takes seconds; asked only of models that name code.

    Args:
        folder: the model.
        config: its `config.json`.
        tokenizer: its `tokenizer_config.json`, empty where there is none.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

    if config.get("model_type") not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return False
    if not any(key in tokenizer for key in CODE_KEYS):
        return True
    known = {_plain(name) for name in TOKENIZER_MAPPING_NAMES.values() if name}
    known |= {"PreTrainedTokenizer", "TokenizersBackend"}
    # What it has no class for, Transformers reads from tokenizer.json alone.
    return _plain(str(tokenizer.get("tokenizer_class"))) in known or (folder / "tokenizer.json").is_file()


def _plain(name: str) -> str:
    return name.removesuffix("Fast")
