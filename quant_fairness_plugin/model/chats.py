"""Conversations as a model's chat template writes them: the one place that runs templates.

Templates may ask for the date (`strftime_now`, as those of Llama 3 and gpt-oss do). It would be another one tomorrow,
and with it rows, beginnings and answers, so that an interrupted run did not go on: templates are always told `TODAY`.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from quant_fairness_plugin.errors import ConfigError

TODAY = datetime(2024, 7, 26, tzinfo=UTC)
"""What templates are told that it is: the date that Llama 3's own template says where it is told none."""


def write_chat(tokenizer: Any, messages: Sequence[tuple[str, str]], *, to_answer: bool = False) -> str:
    """Return a conversation as the chat template writes it, on the same day forever.

    Args:
        tokenizer: has a chat template.
        messages: roles and what they say.
        to_answer: end where an answer begins, and with no thinking before it if the template can leave that out.

    Raises:
        ConfigError: the template refuses it, or there is none; says why, in one line.
    """
    template = str(getattr(tokenizer, "chat_template", None))
    # Only what a template reads: tokenizers with templates of their own kind refuse what they do not know.
    known: dict[str, Any] = {"strftime_now": TODAY.strftime, "enable_thinking": False if to_answer else None}
    given = {name: value for name, value in known.items() if value is not None and name in template}
    chat = [{"role": role, "content": content} for role, content in messages]
    try:
        return str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=to_answer, **given))
    except Exception as err:  # templates are programs of others, which raise whatever they like
        said = " ".join(str(err).split())[:120] or type(err).__name__
        raise ConfigError(
            f"a conversation of {', '.join(role for role, _ in messages[:4])}{' …' * (len(messages) > 4)} is refused "
            f"by the chat template ({said}); accepted is what the template takes. Mend it, or leave it out"
        ) from err
