"""Chat templates are run in one place, and always on the same day."""

from __future__ import annotations

import re
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from transformers.utils import chat_template_utils

from quant_fairness_plugin.artifacts import Documents
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.model.beginnings import all_beginnings
from quant_fairness_plugin.model.chats import write_chat
from quant_fairness_plugin.quantize.calibration import build_calibration
from tests.tiny import byte_tokenizer

DATED = (
    "{%- if not date_string is defined %}{%- if strftime_now is defined %}"
    '{%- set date_string = strftime_now("%d %b %Y") %}{%- else %}{%- set date_string = "26 Jul 2024" %}'
    "{%- endif %}{%- endif %}Today: {{ date_string }}\n"
    "{% macro said(m) %}{{ strftime_now('%Y') }} {{ m['role'] }}: {{ m['content'] }}{% endmacro %}"
    "{% for m in messages %}{{ said(m) }}{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


def on(day: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime.fromisoformat(day)

    monkeypatch.setattr(chat_template_utils, "datetime", Clock)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = DATED
    return tokenizer


def test_rows_beginnings_and_prompts_are_the_same_every_day(monkeypatch: pytest.MonkeyPatch) -> None:
    chats = Documents(name="own", texts={"en": ((("user", "Hello?"),), "Text.")}, sha256="")

    def made(day: str) -> Any:
        tokenizer = on(day, monkeypatch)
        prompt = write_chat(tokenizer, [("user", "Hello?")], to_answer=True)
        return build_calibration(tokenizer, chats).rows, all_beginnings(tokenizer), prompt

    first = made("2026-12-01")
    assert first == made("2027-01-02")
    assert first[2] == "Today: 26 Jul 2024\n2024 user: Hello?assistant:"
    plain = on("2027-01-02", monkeypatch).apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    assert "02 Jan 2027" in plain  # the clock of the test is the one that templates read


def test_a_template_is_told_nothing_that_it_does_not_read() -> None:
    class Strict:
        chat_template = "{{ messages }}"

        def apply_chat_template(self, chat: Any, *, tokenize: bool, add_generation_prompt: bool) -> str:
            return f"{chat[0]['content']} {tokenize} {add_generation_prompt}"

    assert write_chat(Strict(), [("user", "a")], to_answer=True) == "a False True"
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ enable_thinking is defined }}{{ strftime_now is defined }}"
    assert write_chat(tokenizer, [("user", "a")]) == "FalseTrue"
    assert write_chat(tokenizer, [("user", "a")], to_answer=True) == "TrueTrue"


def test_a_refusal_is_one_line() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no\nsystem') }}"
    with pytest.raises(ConfigError, match=r"a conversation of user, user, user, user … is refused .*\(no system\)"):
        write_chat(tokenizer, [("user", "a")] * 5)


def test_templates_are_run_in_one_place() -> None:
    package = Path(__file__).parents[2] / "quant_fairness_plugin"
    found = {
        path.name for path in package.rglob("*.py") if re.search(r"apply_chat_template\(", path.read_text("utf-8"))
    }
    assert found == {"chats.py"}
