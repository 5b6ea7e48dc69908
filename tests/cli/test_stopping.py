"""A signal to stop is one line that says what was kept, and the exit status that shells expect."""

from __future__ import annotations

import errno
import os
import signal
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest

from quant_fairness_plugin.cli.main import run_guarded
from quant_fairness_plugin.cli.options import Place, describe_kept
from quant_fairness_plugin.cli.progress import progress
from quant_fairness_plugin.cli.stopping import SIGNALS, Stopped, stoppable


def run(work: Callable[[], object]) -> int:
    return run_guarded(lambda **_: work(), [], "quant-fairness")


def get(number: int) -> None:
    """Get a signal, and wait until Python has seen it."""
    os.kill(os.getpid(), number)
    time.sleep(5)


@pytest.mark.parametrize(
    ("number", "status", "how"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "stopped by SIGTERM"), (signal.SIGHUP, 129, "SIGHUP")],
)
def test_a_signal_is_one_line_and_its_status(
    capsys: pytest.CaptureFixture[str], number: int, status: int, how: str
) -> None:
    before = [signal.getsignal(one) for one in SIGNALS]
    assert run(lambda: get(number)) == status
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert line.endswith(f"{how}; nothing half-written was left behind")
    assert [signal.getsignal(one) for one in SIGNALS] == before


@pytest.mark.parametrize(
    ("work", "kept"),
    [
        (Path("w"), "finished layers are in w: give the same command again to go on"),
        (
            None,
            "nothing half-written was left behind, and nothing kept. With --work DIR, a run that is stopped goes on",
        ),
    ],
)
def test_it_says_how_far_the_work_was_and_what_is_kept(
    capsys: pytest.CaptureFixture[str], work: Path | None, kept: str
) -> None:
    def quantize() -> None:
        with progress(Place(work=work).kept) as tell:
            tell("quantize", 12, 30)
            get(signal.SIGTERM)

    assert run(quantize) == 143
    assert f"error: stopped by SIGTERM in 'quantize', 12 of 30; {kept}" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_something_removes_itself_is_not_lost(capfd: pytest.CaptureFixture[str], number: int) -> None:
    removed = []

    class Temporary:
        """Removes itself when nobody holds it any more."""

    def remove() -> None:
        os.kill(os.getpid(), number)
        sum(range(1000))  # Python sees the signal here, where an exception would be printed and forgotten
        removed.append(True)

    def work() -> None:
        kept = Temporary()
        weakref.finalize(kept, remove)
        del kept
        time.sleep(5)

    before = signal.getsignal(signal.SIGALRM)
    assert run(work) == 128 + number
    assert removed == [True]
    assert len(capfd.readouterr().err.splitlines()) == 1
    assert signal.getsignal(signal.SIGALRM) == before


def test_what_is_cleaned_up_is_not_stopped_again() -> None:
    cleaned = []

    def clean_up() -> None:
        try:
            get(signal.SIGTERM)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            cleaned.append(True)

    with pytest.raises(Stopped), stoppable():
        clean_up()
    assert cleaned == [True]


def test_what_nohup_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stoppable():
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.05)
    finally:
        signal.signal(signal.SIGHUP, before)


def fail(error: Exception) -> None:
    raise error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "s.json"), "s.json: No space left on device; results need"),
        (OSError(errno.EIO, "Input/output error"), "a file: Input/output error; results need"),
        (MemoryError(), "out of memory (MemoryError); with --memory-budget SIZE"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "fewer --langs take less"),
        (ImportError("libtorch.so: failed to map segment from shared object"), "a limit, with more memory"),
    ],
)
def test_a_full_disk_or_memory_is_one_line_wherever_it_is_met(
    capsys: pytest.CaptureFixture[str], error: Exception, message: str
) -> None:
    assert run(lambda: fail(error)) == 4
    [line] = capsys.readouterr().err.splitlines()
    assert message in line


def test_an_error_that_nobody_thought_of_is_still_called_that(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(lambda: fail(FileNotFoundError(errno.ENOENT, "gone"))) == 1
    assert "unexpected FileNotFoundError" in capsys.readouterr().err


def test_a_sweep_names_its_trials() -> None:
    assert describe_kept(Path("w"), "finished trials").startswith("finished trials are in w")
