"""Progress on stderr: a bar on a terminal, one line a step elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


@contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """Return a callback `(step, done, in all)` that shows on stderr how far the work is."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _lines()
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        tasks: dict[str, object] = {}

        def show(step: str, done: int, total: int) -> None:
            task = tasks.setdefault(step, bars.add_task(step, total=total)) if step not in tasks else tasks[step]
            bars.update(task, completed=done, total=total)  # type: ignore[arg-type] # rich's TaskID is an int

        yield show


def _lines() -> Callable[[str, int, int], None]:
    seen: set[str] = set()

    def show(step: str, done: int, total: int) -> None:
        if step not in seen:
            seen.add(step)
            sys.stderr.write(f"{step} …\n")

    return show
