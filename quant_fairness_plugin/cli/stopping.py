"""Signals that ask a command to stop: an exception where the work is, so that everything is put back, and one line.

Ctrl-C (SIGINT), `kill` and batch systems (SIGTERM), and a terminal that closes (SIGHUP) are treated alike.
"""

from __future__ import annotations

import signal
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_CLEANING = weakref.finalize.__call__.__code__
_LATER_SECONDS = 0.02
NOTHING_LEFT = "nothing half-written was left behind"


class Stopped(BaseException):
    """A signal asked to stop. No KeyboardInterrupt: Typer turns that into an exit status without a word."""

    def __init__(self, number: int) -> None:
        self.number = signal.Signals(number)
        super().__init__(self.number.name)


@contextmanager
def stoppable() -> Iterator[None]:
    """Raise `Stopped` in the main thread when a signal arrives inside the context; only the first time, but for Ctrl-C.

    What is cleaned up after the first signal must not be stopped half-way by the same signal again, which batch systems
    send to every process of a group and once more to the first. A signal that is ignored (`nohup`) stays ignored. One
    that arrives while something removes itself is put off: Python would print the exception there, and go on.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        if _is_cleaning(frame):
            signal.signal(signal.SIGALRM, lambda _, later: stop(number, later))
            signal.setitimer(signal.ITIMER_REAL, _LATER_SECONDS)
            return
        if number != signal.SIGINT:
            for other in replaced:
                signal.signal(other, signal.SIG_IGN)
        raise Stopped(number)

    usual = (signal.SIG_DFL, signal.default_int_handler)
    replaced = {number: signal.getsignal(number) for number in SIGNALS if signal.getsignal(number) in usual}
    alarm = signal.getsignal(signal.SIGALRM)
    try:
        for number in replaced:
            signal.signal(number, stop)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, alarm)
        for number, before in replaced.items():
            signal.signal(number, before)


def _is_cleaning(frame: FrameType | None) -> bool:
    """Return whether a finalizer is at work, in which an exception has nowhere to go."""
    while frame is not None and frame.f_code is not _CLEANING:
        frame = frame.f_back
    return frame is not None


def describe_stop(err: Stopped) -> tuple[str, int]:
    """Return the line and the exit status of a command that was stopped; what was kept stands in the error's notes."""
    how = "interrupted" if err.number == signal.SIGINT else f"stopped by {err.number.name}"
    return f"{how}{' '.join(getattr(err, '__notes__', [f'; {NOTHING_LEFT}']))}", 128 + err.number
