"""Where stderr is no terminal, a long step says every 30 seconds how far it is."""

from __future__ import annotations

import pytest

from quant_fairness_plugin.cli.progress import Lines


def test_a_long_step_is_heard_of_every_30_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    now = 0.0
    lines = Lines(lambda: now)
    for done in range(11):
        now = 12.0 * done
        lines.show("quantize", done, 10)
    assert capsys.readouterr().err.splitlines() == [
        "quantize …",
        "quantize … 3 of 10, about 1:24 left",
        "quantize … 6 of 10, about 0:48 left",
        "quantize … 9 of 10, about 0:12 left",
    ]


def test_what_an_earlier_run_did_is_not_taken_for_speed(capsys: pytest.CaptureFixture[str]) -> None:
    now = 0.0
    lines = Lines(lambda: now)
    for seconds, done in ((0, 8), (40, 8), (80, 9)):
        now = float(seconds)
        lines.show("sweep", done, 10)
    assert capsys.readouterr().err.splitlines() == ["sweep …", "sweep … 8 of 10", "sweep … 9 of 10, about 1:20 left"]


def test_every_step_has_its_own_line(capsys: pytest.CaptureFixture[str]) -> None:
    lines = Lines(lambda: 0.0)
    for step in ("sweep", "quantize", "sweep"):
        lines.show(step, 1, 2)
    assert capsys.readouterr().err.splitlines() == ["sweep …", "quantize …"]


def test_a_step_that_begins_again_is_timed_anew(capsys: pytest.CaptureFixture[str]) -> None:
    now = 0.0
    lines = Lines(lambda: now)
    for seconds, done in ((0, 0), (20, 10), (1000, 0), (1031, 5)):
        now = float(seconds)
        lines.show("quantize", done, 10)
    assert capsys.readouterr().err.splitlines() == ["quantize …", "quantize …", "quantize … 5 of 10, about 0:31 left"]


def test_a_step_that_says_nothing_itself_is_heard_of_all_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    now = 0.0
    lines = Lines(lambda: now)
    lines.still()
    lines.show("write and verify", 0, 1)
    for seconds in (10, 31, 45, 62):
        now = float(seconds)
        lines.still()
    lines.show("write and verify", 1, 1)
    now = 200.0
    lines.still()
    assert capsys.readouterr().err.splitlines() == [
        "write and verify …",
        "write and verify … for 0:31",
        "write and verify … for 1:02",
    ]


def test_the_best_plan_so_far_is_a_line_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    lines = Lines(lambda: 0.0)
    lines.show("compare", 0, 4)
    lines.show("best plan so far: everything INT4 g128", 1, 1)
    lines.show("compare", 2, 4)
    assert capsys.readouterr().err.splitlines() == ["compare …", "best plan so far: everything INT4 g128"]
