"""A run that cannot go on from what a folder holds says what differs; one that can says nothing."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from quant_fairness_plugin.artifacts import held, note_circumstances
from quant_fairness_plugin.errors import ConfigError

QUESTION = {"model": "a", "plan": [0, 1]}
HERE = {"threads": 1, "versions": {"torch": "2.13.0", "numpy": "2.4"}}


def said(caplog: pytest.LogCaptureFixture, folder: Path, **changes: object) -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        note_circumstances(folder, QUESTION, HERE | changes)
    return [record.getMessage() for record in caplog.records]


def test_other_circumstances_are_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert said(caplog, tmp_path) == []
    assert said(caplog, tmp_path) == []
    assert said(caplog, tmp_path, threads=2) == [
        f"{tmp_path}: what is there gives other last bits and is not gone on from (threads 1 there, 2 here)"
    ]
    assert said(caplog, tmp_path, threads=2) == [], "by now there is work of two threads as well"
    assert said(caplog, tmp_path) == []
    [line] = said(caplog, tmp_path, versions={"torch": "2.14.0", "numpy": "2.4"})
    assert line.endswith("(threads 2 there, 1 here; versions.torch '2.13.0' there, '2.14.0' here)")


def test_another_question_is_no_difference(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    said(caplog, tmp_path)
    with caplog.at_level(logging.WARNING):
        note_circumstances(tmp_path, QUESTION | {"plan": [2]}, HERE | {"threads": 9})
    assert caplog.records == []


def test_a_note_that_nobody_can_read_is_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    said(caplog, tmp_path)
    [note] = tmp_path.iterdir()
    for torn in (b"", b"[1", b"\xff", b"7", b"[7]"):
        note.write_bytes(torn)
        assert said(caplog, tmp_path) == []
    assert said(caplog, tmp_path, threads=2) != []


def test_a_folder_that_another_process_works_in_is_refused(tmp_path: Path) -> None:
    with held(tmp_path), pytest.raises(ConfigError, match="is in use by another process"), held(tmp_path):
        pass
    with held(tmp_path):
        pass
