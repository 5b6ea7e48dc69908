"""Progress on stderr: a bar with the time left on a terminal; elsewhere a line a step, and one more every 30 s."""

from __future__ import annotations

import sys
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
        yield Lines(time.monotonic).show
        return
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeLeftColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True) as bars:
        tasks: dict[str, TaskID] = {}

        def show(step: str, done: int, total: int) -> None:
            if step not in tasks:
                tasks[step] = bars.add_task(step, total=total)
            bars.update(tasks[step], completed=done, total=total)

        yield show


@dataclass(slots=True)
class _Step:
    started: float
    first: int
    """How much was done when it was first heard of: work that an interrupted run had left."""
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

    def show(self, step: str, done: int, total: int) -> None:
        """Write a line where a step is new, or where its last line is `SECONDS_BETWEEN_LINES` old."""
        now = self._clock()
        state = self._steps.get(step)
        if state is None:
            self._steps[step] = _Step(now, done, now)
            sys.stderr.write(f"{step} …\n")
        elif now - state.printed >= SECONDS_BETWEEN_LINES and done < total:
            state.printed = now
            sys.stderr.write(f"{step} … {done} of {total}{_left(state, now, done, total)}\n")


def _left(state: _Step, now: float, done: int, total: int) -> str:
    """Return `, about 1:20 left`; nothing before anything was done."""
    if done <= state.first:
        return ""
    seconds = round((now - state.started) * (total - done) / (done - state.first))
    return f", about {seconds // 60}:{seconds % 60:02d} left"
