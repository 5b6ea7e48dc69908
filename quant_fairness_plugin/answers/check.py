"""Check prompts by the tokenizer alone, before a model is read: hours later nothing could be asked. No torch."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from typing import Any

from quant_fairness_plugin.answers.prompts import NEW_TOKENS, Prompts, load_prompts
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.model.chats import write_chat
from quant_fairness_plugin.model.tokenizer import prompt_ids
from quant_fairness_plugin.texts.sources import BUNDLED


def has_chat_template(tokenizer: Any) -> bool:
    """Return whether prompts go through a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def encode_prompt(tokenizer: Any, prompt: str) -> list[int]:
    """Return the ids of a prompt: what a user says in the chat template, or where there is none a text to go on with.

    Raises:
        ConfigError: the template refuses it.
    """
    if not has_chat_template(tokenizer):
        return prompt_ids(tokenizer, prompt)
    text = write_chat(tokenizer, [("user", prompt)], to_answer=True)
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]  # the template writes its own
    return ids


def find_prompts(source: str, languages: Sequence[str]) -> Prompts | None:
    """Read prompts; None where nothing is to be asked.

    Raises:
        ConfigError: a file that holds no prompt in a measured language; otherwise as `load_prompts`.
    """
    prompts = load_prompts(source)
    if prompts is None or prompts.source == BUNDLED or any(prompts.texts.get(language) for language in languages):
        return prompts
    raise ConfigError(
        f"{prompts.source} has prompts in {', '.join(prompts.texts)}, and none in {', '.join(languages)}, which are "
        "measured; accepted are prompts in one of these. Add some, or leave out --prompts"
    )


def check_prompts(prompts: Prompts, languages: Sequence[str], tokenizer: Any, *, limit: int, name: str) -> None:
    """Refuse a prompt that the model could not answer.

    Args:
        prompts: the prompts.
        languages: those that are measured.
        tokenizer: the model's, with its chat template if it has one.
        limit: how many tokens the model takes at once.
        name: the model's, for messages.

    Raises:
        ConfigError: one with too many tokens, or that the chat template refuses; says which.
    """
    chat = has_chat_template(tokenizer)
    for language in languages:
        for prompt in prompts.of(language, chat=chat):
            which = f"{prompts.source}: the prompt {reprlib.repr(prompt)} ({language})"
            try:
                count = len(encode_prompt(tokenizer, prompt))
            except ConfigError as err:
                raise ConfigError(f"{which}: {err}. --prompts none asks nothing") from err
            if count + NEW_TOKENS > limit:
                raise ConfigError(
                    f"{which} has {count} tokens, and {name} takes {limit}, of which {NEW_TOKENS} are for the answer; "
                    f"accepted are {max(0, limit - NEW_TOKENS)}. Shorten it; --prompts none asks nothing"
                )
