"""Progress on stderr: a bar with the time left on a terminal; elsewhere a line a step, and one more every 30 s."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as TimeLeftColumn

from quant_fairness_plugin.cli.stopping import NOTHING_LEFT, Stopped

SECONDS_BETWEEN_LINES = 30.0


Show = Callable[[str, int, int], None]


@contextmanager
def progress(kept: str = NOTHING_LEFT) -> Iterator[Show]:
    """Return a callback `(step, done, in all)` that shows on stderr how far the work is.

    Args:
        kept: what is said of the work that was done, where it is stopped.
    """
    last: list[str] = []
    with _shown() as show:

        def tell(step: str, done: int, total: int) -> None:
            if not done == total == 1:
                last[:] = [f" in {step!r}, {done} of {total}"]
            show(step, done, total)

        try:
            yield tell
        except Stopped as err:
            err.add_note(f"{''.join(last)}; {kept}")
            raise


@contextmanager
def _shown() -> Iterator[Show]:
    console = Console(stderr=True)
    if not console.is_terminal:
        lines, ended = Lines(time.monotonic), threading.Event()
        beat = threading.Thread(target=_beat, args=(lines, ended), daemon=True)
        beat.start()
        try:
            yield lines.show
        finally:
            ended.set()
            beat.join()
        return
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeLeftColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True) as bars:
        tasks: dict[str, TaskID] = {}

        def show(step: str, done: int, total: int) -> None:
            if _is_said(step, done, total, known=step in tasks):
                bars.console.print(step, markup=False, highlight=False)
                return
            if step not in tasks:
                tasks[step] = bars.add_task(step, total=None)  # which moves to and fro
            elif done < bars.tasks[tasks[step]].completed:  # it begins again
                bars.reset(tasks[step])
            known = None if total == 1 and done == 0 else total
            bars.update(tasks[step], completed=done, total=known)

        yield show


def _is_said(step: str, done: int, total: int, *, known: bool) -> bool:
    """Return whether a step is something to say, such as the best plan so far: done when it is first heard of."""
    return not known and done == total == 1


def _beat(lines: Lines, ended: threading.Event) -> None:
    """Let a step be heard of that says nothing itself, until all is done."""
    while not ended.wait(1.0):
        lines.still()


@dataclass(slots=True)
class _Step:
    name: str
    started: float
    first: int
    """How much was done when it was first heard of: work that an interrupted run had left."""
    done: int
    total: int
    printed: float


class Lines:
    """Progress where stderr is a file or a pipe."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """Start with no step.

        Args:
            clock: seconds of a monotonic clock.
        """
        self._clock = clock
        self._steps: dict[str, _Step] = {}
        self._now: _Step | None = None
        self._lock = threading.Lock()

    def show(self, step: str, done: int, total: int) -> None:
        """Write a line where a step is new, or where its last line is `SECONDS_BETWEEN_LINES` old."""
        with self._lock:
            now, state = self._clock(), self._steps.get(step)
            if _is_said(step, done, total, known=state is not None):
                sys.stderr.write(f"{step}\n")
                return
            if state is None or done < state.done:  # a step that begins again is timed anew
                state = self._steps[step] = _Step(step, now, done, done, total, now)
                sys.stderr.write(f"{step} …\n")
            state.done, state.total = done, total
            self._now = state
            self._write(state, now)

    def still(self) -> None:
        """Write the line of the step that goes on, where its last one is old."""
        with self._lock:
            if self._now is not None:
                self._write(self._now, self._clock())

    def _write(self, state: _Step, now: float) -> None:
        if now - state.printed < SECONDS_BETWEEN_LINES or state.done >= state.total:
            return
        state.printed = now
        if state.total == 1:
            sys.stderr.write(f"{state.name} … for {_clock_time(now - state.started)}\n")
        else:
            sys.stderr.write(f"{state.name} … {state.done} of {state.total}{_left(state, now)}\n")


def _left(state: _Step, now: float) -> str:
    """Return `, about 1:20 left`; nothing before anything was done."""
    if state.done <= state.first:
        return ""
    seconds = (now - state.started) * (state.total - state.done) / (state.done - state.first)
    return f", about {_clock_time(seconds)} left"


def _clock_time(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole // 60}:{whole % 60:02d}"
