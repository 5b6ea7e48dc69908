"""Prose keeps to the terminal's width, and stays as it is in a file."""

from __future__ import annotations

import io
import sys

import pytest

from quant_fairness_plugin.cli.say import say

LINE = "verify       passed   one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen"


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def said(monkeypatch: pytest.MonkeyPatch, text: str, indent: int = 2) -> str:
    """What a terminal of 50 columns is told. The stream is put in its place here: pytest has its own in fixtures."""
    monkeypatch.setenv("COLUMNS", "50")
    monkeypatch.setenv("TERM", "xterm")
    made = Terminal()
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", made)
        say(text, indent=indent)
    return made.getvalue()


def test_a_terminal_gets_lines_that_fit_with_what_follows_below_what_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = said(monkeypatch, LINE, 22).splitlines()
    assert len(lines) > 1
    assert all(len(line) <= 50 for line in lines)
    assert {len(line) - len(line.lstrip()) for line in lines[1:]} == {22}
    assert " ".join(" ".join(lines).split()) == " ".join(LINE.split())


def test_a_word_that_is_too_long_is_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    path = "/".join(["folder"] * 12)
    text = said(monkeypatch, f"written to {path}\nshort")
    assert path in text
    assert text.endswith("\nshort\n")


def test_a_file_gets_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "50")
    say(LINE)
    say(LINE, err=True)
    captured = capsys.readouterr()
    assert captured.out == captured.err == f"{LINE}\n"
