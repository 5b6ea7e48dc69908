"""What tokenizers give for a text, and what they would add to it; and the fastest one where only ids are needed.

Many tokenizers add tokens of their own: BOS in front, EOS behind, padding and a limit that `tokenizer.json` stores. A
text is encoded without any of them; what is to stand in front of it is chosen (`beginnings`), and a prompt keeps what
the tokenizer puts there.

Importing Transformers takes seconds. Where a folder's `tokenizer.json` is all there is to its tokenizer, the
`tokenizers` library alone, which Transformers runs on, gives the same ids; every other one is loaded as usual.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from quant_fairness_plugin.artifacts import TextSet
from quant_fairness_plugin.errors import ArtifactError
from quant_fairness_plugin.model.resolve import ModelFiles, tensor_shapes
from quant_fairness_plugin.model.weights import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tokenizing = Any
"""A tokenizer of Transformers, or a `QuickTokenizer`."""
_logger = logging.getLogger(__name__)
_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings", "embeddings")
"""Last part of the name under which files hold the token embedding."""
_PROBE = "a"
_PLAIN_CLASSES = frozenset({"TokenizersBackend", "PreTrainedTokenizerFast"})
"""Classes that take `tokenizer.json` as it is; others rebuild parts of it."""
_HARMLESS = frozenset(
    "added_tokens_decoder backend bos_token chat_template clean_up_tokenization_spaces eos_token extra_special_tokens "
    "is_local model_input_names model_max_length pad_token padding_side tokenizer_class unk_token".split()
)
"""Settings that do not change the ids of a text without special tokens."""
_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")


class QuickTokenizer:
    """The part of a Transformers tokenizer that counting needs, by the `tokenizers` library."""

    is_fast = True

    def __init__(self, backend: Any, special: dict[str, str]) -> None:
        backend.no_padding()
        backend.no_truncation()
        self._backend = backend
        self.bos_token_id, self.eos_token_id, self.unk_token_id, self.pad_token_id = (
            backend.token_to_id(special[name]) if name in special else None for name in _NAMED
        )

    @property
    def added_tokens_decoder(self) -> dict[int, Any]:
        """Id → token that was added to the vocabulary."""
        added: dict[int, Any] = self._backend.get_added_tokens_decoder()
        return added

    def __call__(self, texts: Sequence[str], *, add_special_tokens: bool, **_settings: object) -> dict[str, list[Any]]:
        """Ids of every text, and the characters that each token stands for; never cut, never padded."""
        encoded = self._backend.encode_batch(list(texts), add_special_tokens=add_special_tokens)
        return {"input_ids": [one.ids for one in encoded], "offset_mapping": [one.offsets for one in encoded]}

    def convert_ids_to_tokens(self, identifier: int) -> str:
        """Return the token of an id."""
        token: str = self._backend.id_to_token(identifier)
        return token


def text_ids(tokenizer: Tokenizing, texts: Sequence[str], *, offsets: bool = False) -> dict[str, list[Any]]:
    """Return the ids of whole texts as `input_ids`, with nothing added to them, and `offset_mapping` if wanted."""
    if not texts:  # tokenizers fail on nothing
        return {"input_ids": [], "offset_mapping": []}
    encoded: dict[str, list[Any]] = tokenizer(
        list(texts),
        add_special_tokens=False,
        padding=False,
        truncation=False,
        return_offsets_mapping=offsets,
        verbose=False,
    )
    return encoded


def prompt_ids(tokenizer: Tokenizing, prompt: str) -> list[int]:
    """Return the ids of a text that is to be continued: what the tokenizer adds in front, and the text itself.

    What it adds behind (EOS, by its post-processor or `add_eos_token`) would end the text, and is left out.
    """
    text: list[int] = text_ids(tokenizer, [prompt])["input_ids"][0]
    return [*added_in_front(tokenizer), *text]


def added_in_front(tokenizer: Tokenizing) -> list[int]:
    """Return the ids that a tokenizer puts before every text; none where it puts the text between other tokens."""
    bare: list[int] = text_ids(tokenizer, [_PROBE])["input_ids"][0]
    whole: list[int] = list(
        tokenizer([_PROBE], add_special_tokens=True, padding=False, truncation=False, verbose=False)["input_ids"][0]
    )
    starts = range(len(whole) - len(bare) + 1)
    return next((whole[:start] for start in starts if whole[start : start + len(bare)] == bare), [])


def check_vocabulary(tokenizer: Tokenizing, texts: TextSet, *, rows: int, name: str) -> None:
    """Check that the model has an embedding for every token that its tokenizer gives, before anything runs.

    Added tokens that neither stand before a text nor occur in one are only named in the log: published models have
    some (Gemma 3 1B), and nothing computes with them.

    Args:
        tokenizer: the model's.
        texts: the sentences that will be read.
        rows: of the model's embedding.
        name: the model's, for messages.

    Raises:
        ArtifactError: BOS, EOS, padding or a token of a sentence is outside of the embedding; names it.
    """
    named = [getattr(tokenizer, f"{kind}_token_id", None) for kind in ("bos", "eos", "pad")]
    check_ids(tokenizer, {index for index in named if index is not None}, rows=rows, name=name)
    for sentences in texts.sentences.values():
        used = {index for ids in text_ids(tokenizer, sentences)["input_ids"] for index in ids}
        check_ids(tokenizer, used, rows=rows, name=name)
    if outside := sorted(index for index in tokenizer.added_tokens_decoder if index >= rows):
        listed = ", ".join(f"{tokenizer.convert_ids_to_tokens(index)!r} (id {index})" for index in outside[:5])
        _logger.warning(
            "%s: the tokenizer has %d added tokens outside of the embedding's %d rows, first %s; no sentence here "
            "uses them, and a text that does cannot be computed", name, len(outside), rows, listed,
        )  # fmt: skip


def check_ids(tokenizer: Tokenizing, ids: Collection[int], *, rows: int, name: str) -> None:
    """Refuse a token that the model has no embedding for.

    Raises:
        ArtifactError: names the token, its id and the rows of the embedding.
    """
    outside = min((index for index in ids if not 0 <= index < rows), default=None)
    if outside is not None:
        raise ArtifactError(
            f"{name}: the tokenizer gives {tokenizer.convert_ids_to_tokens(outside)!r} the id {outside}, and the "
            f"model's embedding has {rows} rows, ids 0..{rows - 1}. Use the tokenizer that the model was trained with, "
            "or resize the embedding (model.resize_token_embeddings(len(tokenizer))) and train the new rows"
        )


def stored_embedding_rows(files: ModelFiles) -> int | None:
    """Return how many tokens a model has an embedding for, by the headers of its files; None where they do not tell."""
    if files.weights and files.weights[0].suffix == ".safetensors":
        for name, (_, shape) in tensor_shapes(files).items():
            if name.endswith(tuple(f"{kind}.weight" for kind in _EMBEDDINGS)) and len(shape) == 2:
                return shape[0]
    size = (files.config.get("text_config") or files.config).get("vocab_size")
    return size if type(size) is int else None


def counting_tokenizer(
    files: ModelFiles, *, trust_remote_code: bool = False, templates: bool = False
) -> PreTrainedTokenizerBase | QuickTokenizer:
    """Return a tokenizer that gives the ids of the model's tokenizer; with `templates` one that knows those of chats.

    Raises:
        ArtifactError: the tokenizer does not load.
    """
    quick = None if templates else quick_tokenizer(files)
    if quick is not None:
        return quick
    from quant_fairness_plugin.model.load import load_tokenizer

    return load_tokenizer(files, trust_remote_code=trust_remote_code)


def is_plain(files: ModelFiles) -> bool:
    """Return whether `tokenizer.json` is all there is to a model's tokenizer, so that the quick one equals it."""
    settings, path = files.folder / "tokenizer_config.json", files.folder / "tokenizer.json"
    if not settings.is_file() or not path.is_file():
        return False
    config = read_json(settings)
    return config.get("tokenizer_class") in _PLAIN_CLASSES and config.keys() <= _HARMLESS


def quick_tokenizer(files: ModelFiles) -> QuickTokenizer | None:
    """Return the quick tokenizer, or None where it is not certain to equal the model's."""
    if not is_plain(files):
        return None
    path, config = files.folder / "tokenizer.json", read_json(files.folder / "tokenizer_config.json")
    from tokenizers import Tokenizer

    try:
        backend = Tokenizer.from_file(str(path))
    except Exception:  # noqa: BLE001 - the library raises bare exceptions; the slow way says what is wrong
        return None
    added = {_content(entry): int(index) for index, entry in (config.get("added_tokens_decoder") or {}).items()}
    if any(backend.token_to_id(token) != index for token, index in added.items()):
        return None
    special = {name: _content(config[name]) for name in _NAMED if config.get(name) is not None}
    if any(backend.token_to_id(token) is None for token in special.values()):
        return None
    return QuickTokenizer(backend, special)


def _content(token: Any) -> str:
    return str(token["content"] if isinstance(token, dict) else token)
