"""What the commands print on a terminal of 80 columns, into docs/terminal.md: real output, nothing typed.

    python benchmarks/terminal.py               # every command of the page, in this order
    python benchmarks/terminal.py verify        # one of them again

Standard output is a terminal, whose colours are left out. Progress goes to a file, where it is lines; of these the page
has the first of each step, as later ones say how busy the machine was.
"""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from commands import ENTRY
from pages import write_tables

DOCUMENT = Path(__file__).parents[1] / "docs" / "terminal.md"
COLUMNS = 80
COMMANDS = {
    "run": "quant-fairness run --model demo --langs en,he,ar,hi --output demo-int4-fair",
    "verify": "quant-fairness verify demo-int4-fair",
    "measure": "quant-fairness measure demo-int4-fair --langs en,he --gate worst=0.2",
    "sweep": "quant-fairness sweep --model demo --langs en,he,ar",
    "doctor": "quant-fairness doctor",
}
"""The later ones read what `run` wrote."""
_FURTHER = re.compile(r" … (\d+ of \d+|for \d+:)")
_COLOUR = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


def main() -> None:
    wanted = sys.argv[1:] or list(COMMANDS)
    folder = Path(os.environ.get("TERMINAL_FOLDER") or tempfile.mkdtemp(prefix="terminal-"))
    folder.mkdir(exist_ok=True)
    for name in wanted:
        shown = record(COMMANDS[name], folder)
        write_tables(DOCUMENT, {name: f"```\n$ {COMMANDS[name]}\n{shown}```\n"})
        sys.stdout.write(f"{name}: {len(shown.splitlines())} lines; {folder}\n")


def record(command: str, folder: Path) -> str:
    """Return what a command prints, its exit status behind it where that is not 0."""
    arguments = [sys.executable, "-c", ENTRY, *command.split()[1:]]
    ours, theirs = pty.openpty()
    environment = os.environ | {"COLUMNS": str(COLUMNS), "LINES": "50", "TERM": "xterm-256color"}
    with tempfile.TemporaryFile() as progress:
        process = subprocess.Popen(arguments, cwd=folder, stdout=theirs, stderr=progress, env=environment)
        os.close(theirs)
        printed = _read(ours)
        status = process.wait()
        progress.seek(0)
        steps = progress.read().decode()
    steps = "".join(f"{line}\n" for line in steps.splitlines() if not _FURTHER.search(line))
    text = _COLOUR.sub("", printed).replace("\r\n", "\n")
    lines = [line.rstrip() for line in f"{steps}{text}".splitlines()]
    return "".join(f"{line}\n" for line in lines) + (f"(exit status {status})\n" if status else "")


def _read(terminal: int) -> str:
    pieces = []
    while True:
        try:
            piece = os.read(terminal, 65536)
        except OSError:  # Linux says so at the end of a terminal
            break
        if not piece:
            break
        pieces.append(piece)
    os.close(terminal)
    return b"".join(pieces).decode()


if __name__ == "__main__":
    main()
