"""Command lines in processes of their own, forked from one that has imported every command, and no torch.

What a start of Python and the imports take, more than a second, is spent once. As a program this is that process: it
reads a request a line, and answers each with how the command ended.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

MODULES = {"quant-fairness": "main", "gptq-quantize": "gptq_quantize", "awq-quantize": "awq_quantize"}


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    returncode: int
    stdout: str
    stderr: str
    imported_torch: bool


class Commands:
    """The process that commands are forked from."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def run(self, command: str, *arguments: str, cwd: Path, environment: Mapping[str, str] | None = None) -> Done:
        """Run an entry point with these arguments, in a folder."""
        request = {"argv": [command, *arguments], "cwd": str(cwd), "environment": dict(environment or {})}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return Done(**json.loads(self._process.stdout.readline()))


@contextmanager
def command_processes() -> Iterator[Commands]:
    """Yield what starts commands; its process ends with the block."""
    command = [sys.executable, "-m", "tests.cli.fresh"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
    ) as process:
        yield Commands(process)
        assert process.stdin is not None
        process.stdin.close()


def _serve() -> None:
    for module in MODULES.values():
        importlib.import_module(f"quant_fairness_plugin.cli.{module}")
    for line in sys.stdin:
        sys.stdout.write(json.dumps(asdict(_answer(json.loads(line)))) + "\n")
        sys.stdout.flush()


def _answer(request: dict[str, object]) -> Done:
    with TemporaryFile("w+") as out, TemporaryFile("w+") as err, TemporaryFile("w+") as torch:
        child = os.fork()
        if child == 0:
            _become(request, out, err, torch)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        for file in (out, err, torch):
            file.seek(0)
        return Done(status, out.read(), err.read(), torch.read() == "True")


def _become(request: dict[str, object], out: IO[str], err: IO[str], torch: IO[str]) -> None:
    """Be the command: exactly what its entry point does, and never return."""
    status = 70
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        os.chdir(str(request["cwd"]))
        os.environ.update(request["environment"])  # type: ignore[call-overload]
        sys.argv = request["argv"]  # type: ignore[assignment]
        try:
            importlib.import_module(f"quant_fairness_plugin.cli.{MODULES[sys.argv[0]]}").main()
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        torch.write(str("torch" in sys.modules))
        torch.flush()
        os._exit(status)


if __name__ == "__main__":
    _serve()
