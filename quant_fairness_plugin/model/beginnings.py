"""The tokens that stand before a text: how the model really meets it.

The first token of a row is where attention goes that has nowhere else to go, and what it is changes every activation
after it: a model that is calibrated or measured behind a token that it never meets is not the model that is used.
Nothing is ever added behind a text, and nothing is padded or cut here.
"""

from __future__ import annotations

from typing import Any, get_args

from quant_fairness_plugin.artifacts import Start
from quant_fairness_plugin.artifacts.documents import Chat
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.model.chats import write_chat
from quant_fairness_plugin.model.resolve import ModelFiles
from quant_fairness_plugin.model.tokenizer import Tokenizing, added_in_front, text_ids
from quant_fairness_plugin.model.weights import read_json

Beginning = tuple[int, ...]
"""The ids that stand before a text."""
_PROBE = "Qwertz"
"""A message that no chat template holds."""


def find_start(tokenizer: Tokenizing, start: Start) -> Start:
    """Return how rows begin where `auto` is asked for: as the tokenizer encodes text, else as documents do.

    A tokenizer that puts nothing in front and has one token as BOS and EOS at once is of the GPT-2 kind: the token
    parts documents in training, so that text begins behind it. With another BOS, or none, text begins with itself.
    """
    if start != "auto":
        return start
    if added_in_front(tokenizer):
        return "encoded"
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    return "plain" if bos is None or bos != eos else "eos"


def beginning(tokenizer: Tokenizing, start: Start) -> Beginning:
    """Return the ids that stand before every text.

    Raises:
        ConfigError: a start that the tokenizer does not have; says which it has.
    """
    beginning = _beginning(tokenizer, find_start(tokenizer, start))
    if beginning is None:
        usable = [name for name in get_args(Start) if name == "auto" or _beginning(tokenizer, name) is not None]
        raise ConfigError(f"start {start!r}: {_LACKING[start]}; accepted here are {', '.join(usable)}")
    return beginning


def all_beginnings(tokenizer: Tokenizing) -> dict[Start, Beginning]:
    """Return every way in which a text can begin under a tokenizer, each once, that of `auto` first."""
    usual = find_start(tokenizer, "auto")
    beginnings: dict[Start, Beginning] = {}
    others: tuple[Start, ...] = ("plain", "bos", "eos", "chat")
    for name in (usual, *others):
        ids = _beginning(tokenizer, name)
        if ids is not None and ids not in beginnings.values():
            beginnings[name] = ids
    return beginnings


def has_chat_template(files: ModelFiles) -> bool:
    """Return whether a model's folder holds a chat template; reads no model and runs no template."""
    if (files.folder / "chat_template.jinja").is_file():
        return True
    settings = files.folder / "tokenizer_config.json"
    return settings.is_file() and bool(read_json(settings).get("chat_template"))


def chat_ids(tokenizer: Any, chat: Chat) -> Beginning:
    """Return the ids of a whole conversation as the chat template writes it.

    Raises:
        ConfigError: the tokenizer has no template, or one that refuses these roles in this order.
    """
    return tuple(text_ids(tokenizer, [write_chat(tokenizer, chat)])["input_ids"][0])


def _beginning(tokenizer: Tokenizing, start: Start) -> Beginning | None:
    """Return the ids of a start; None where the tokenizer has no such thing."""
    match start:
        case "encoded":
            return tuple(added_in_front(tokenizer))
        case "plain":
            return ()
        case "chat":
            return _chat_beginning(tokenizer)
        case _:
            identifier = tokenizer.bos_token_id if start == "bos" else tokenizer.eos_token_id
            return None if identifier is None else (int(identifier),)


def _chat_beginning(tokenizer: Any) -> Beginning | None:
    """Return what the chat template puts before the first message of a user."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    try:
        said = write_chat(tokenizer, [("user", _PROBE)])
    except ConfigError:
        return None
    before, probe, _ = said.partition(_PROBE)
    return tuple(text_ids(tokenizer, [before])["input_ids"][0]) if probe and before else None


_LACKING = {
    "bos": "the tokenizer names no BOS token",
    "eos": "the tokenizer names no EOS token",
    "chat": "the tokenizer has no chat template that takes a user's message",
}
