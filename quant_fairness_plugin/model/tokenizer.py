"""A tokenizer without the model: the fastest one that will do where only token counts are needed.

Importing Transformers takes seconds. Where a folder's `tokenizer.json` is all there is to its tokenizer, the
`tokenizers` library alone, which Transformers runs on, gives the same ids; every other one is loaded as usual.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from quant_fairness_plugin.model.resolve import ModelFiles
from quant_fairness_plugin.model.weights import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PLAIN_CLASSES = frozenset({"TokenizersBackend", "PreTrainedTokenizerFast"})
"""Classes that take `tokenizer.json` as it is; others rebuild parts of it."""
_HARMLESS = frozenset(
    "added_tokens_decoder backend bos_token chat_template clean_up_tokenization_spaces eos_token extra_special_tokens "
    "is_local model_input_names model_max_length pad_token padding_side tokenizer_class unk_token".split()
)
"""Settings that do not change the ids of a text without special tokens."""


class QuickTokenizer:
    """The part of a Transformers tokenizer that counting needs, by the `tokenizers` library."""

    is_fast = True

    def __init__(self, backend: Any, special: dict[str, str]) -> None:
        backend.no_padding()
        backend.no_truncation()
        self._backend = backend
        self.bos_token_id, self.eos_token_id, self.unk_token_id = (
            backend.token_to_id(special[name]) if name in special else None
            for name in ("bos_token", "eos_token", "unk_token")
        )

    def __call__(
        self, texts: Sequence[str], *, add_special_tokens: bool, return_offsets_mapping: bool, verbose: bool
    ) -> dict[str, list[Any]]:
        """Ids of every text, and the characters that each token stands for."""
        encoded = self._backend.encode_batch(list(texts), add_special_tokens=add_special_tokens)
        return {"input_ids": [one.ids for one in encoded], "offset_mapping": [one.offsets for one in encoded]}

    def convert_ids_to_tokens(self, identifier: int) -> str:
        """Return the token of an id."""
        token: str = self._backend.id_to_token(identifier)
        return token


def counting_tokenizer(
    files: ModelFiles, *, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase | QuickTokenizer:
    """Return a tokenizer that gives the ids of the model's tokenizer.

    Raises:
        ArtifactError: the tokenizer does not load.
    """
    quick = _quick(files)
    if quick is not None:
        return quick
    from quant_fairness_plugin.model.load import load_tokenizer

    return load_tokenizer(files, trust_remote_code=trust_remote_code)


def _quick(files: ModelFiles) -> QuickTokenizer | None:
    """Return the quick tokenizer, or None where it is not certain to equal the model's."""
    settings, path = files.folder / "tokenizer_config.json", files.folder / "tokenizer.json"
    if not settings.is_file() or not path.is_file():
        return None
    config = read_json(settings)
    if config.get("tokenizer_class") not in _PLAIN_CLASSES or not config.keys() <= _HARMLESS:
        return None
    from tokenizers import Tokenizer

    try:
        backend = Tokenizer.from_file(str(path))
    except Exception:  # noqa: BLE001 - the library raises bare exceptions; the slow way says what is wrong
        return None
    added = {_content(entry): int(index) for index, entry in (config.get("added_tokens_decoder") or {}).items()}
    if any(backend.token_to_id(token) != index for token, index in added.items()):
        return None
    names = ("bos_token", "eos_token", "unk_token")
    special = {name: _content(config[name]) for name in names if config.get(name) is not None}
    if any(backend.token_to_id(token) is None for token in special.values()):
        return None
    return QuickTokenizer(backend, special)


def _content(token: Any) -> str:
    return str(token["content"] if isinstance(token, dict) else token)
