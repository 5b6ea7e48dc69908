"""Runs a reader script over many checkpoints in turn. Runs in the reader's environment; needs nothing but Python.

    .venv-vllm/bin/python tests/readers/batch.py SCRIPT JOBS.json [--fork]

SCRIPT has `read(checkpoint, request)`, and is imported once. JOBS is a list of `checkpoint`, `request` and `result`
(paths) and `seconds`. A result is what `read` returned, or `error` with the traceback's end. With `--fork` every
checkpoint is read by a child of its own, which cannot hand anything on to the next one.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any, NoReturn

ERROR_CHARACTERS = 4000
Job = dict[str, Any]


def load(script: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(script.stem, script)
    if spec is None or spec.loader is None:
        raise ValueError(f"{script} is no Python script")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def answer(reader: ModuleType, job: Job) -> dict[str, Any]:
    """What the reader says, or how it failed. Everything that a reader can raise is a result here, also an exit."""
    signal.signal(signal.SIGALRM, _too_late)
    signal.alarm(job["seconds"])
    try:
        request = json.loads(Path(job["request"]).read_text(encoding="utf-8"))
        result: dict[str, Any] = reader.read(job["checkpoint"], request)
    except (Exception, SystemExit):  # noqa: BLE001 # a failure is what some checkpoints are read for
        return {"error": traceback.format_exc()[-ERROR_CHARACTERS:]}
    finally:
        signal.alarm(0)
    return result


def run(reader: ModuleType, job: Job) -> None:
    begin = time.monotonic()
    result = answer(reader, job) | {"seconds": round(time.monotonic() - begin, 1)}
    Path(job["result"]).write_text(json.dumps(result), encoding="utf-8")
    print(f"{job['result']}: {result['seconds']} s", "FAILED" if "error" in result else "read", flush=True)  # noqa: T201


def run_in_child(reader: ModuleType, job: Job) -> None:
    child = os.fork()
    if child == 0:
        try:
            run(reader, job)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)  # no clean-up of what belongs to the parent
    os.waitpid(child, 0)


def main() -> None:
    script, jobs, *options = sys.argv[1:]
    reader = load(Path(script))
    one = run_in_child if "--fork" in options else run
    for job in json.loads(Path(jobs).read_text(encoding="utf-8")):
        one(reader, job)


def _too_late(number: int, frame: FrameType | None) -> NoReturn:
    raise TimeoutError("the reader took longer than its job allows")


if __name__ == "__main__":
    main()
