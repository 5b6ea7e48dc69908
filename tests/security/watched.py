"""Run commands, one after another, in a process that notes and denies every use of a socket.

`python -m tests.security.watched SEEN COMMANDS`: COMMANDS is a JSON list of argument lists; SEEN gets the events and
the exit statuses. An audit hook cannot be removed, and also sees what libraries do.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

seen: list[str] = []


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    if event.startswith("socket.") and event != "socket.gethostname":
        seen.append(event)
        raise ConnectionError(f"{event} is denied here")


def main() -> None:
    result, commands = sys.argv[1:]
    sys.addaudithook(watch)

    import typer

    from quant_fairness_plugin.cli.main import app, run_guarded

    statuses = [run_guarded(typer.main.get_command(app), line, "quant-fairness") for line in json.loads(commands)]
    Path(result).write_text(json.dumps({"events": seen, "statuses": statuses}), encoding="utf-8")


if __name__ == "__main__":
    main()
