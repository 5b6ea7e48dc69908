"""Real readers in Pythons of their own: a checkpoint and prompts in, what the reader computed out. No torch.

vLLM and gptqmodel pin other packages than we do, so each is run as a script (in `scripts/`, which imports nothing of
this package) by the Python that has it: the one that the user names, this one, or the one that an environment variable
names. `compare` compares the result with our own dequantizer.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quant_fairness_plugin.artifacts import temporary_folder
from quant_fairness_plugin.checkpoint.readers import READERS, find_reader
from quant_fairness_plugin.checkpoint.readers.reader import Reader
from quant_fairness_plugin.errors import ArtifactError, ConfigError, MissingExtraError, UnsupportedModelError

SECONDS = 3600
"""A server takes about a minute to start on a free machine, and many on a busy one."""
_LAST_CHARACTERS = 600


@dataclass(frozen=True, slots=True)
class Reading:
    """What a reader computed from a checkpoint."""

    reader: str
    version: str
    methods: dict[str, str]
    """Linear module, by the reader's name → class of what computes it."""
    sequences: tuple[dict[str, Any], ...]
    """`ids` of each sequence, how many of them are `new` (greedy), and the `predictions` after each token (token →
    log-probability in nats)."""


def reader_script(reader: str) -> Path:
    """Return the script that runs in the reader's Python: SCRIPT CHECKPOINT REQUEST.json RESULT.json.

    Raises:
        ConfigError: an unknown reader, or one that is not run here.
    """
    script = find_reader(reader).script_path
    if script is None:
        runnable = ", ".join(name for name, entry in READERS.items() if entry.script)
        raise ConfigError(
            f"reader {reader!r} is not run here; only its documented rules are checked, also without --reader. Run it "
            f"by hand, or use --reader with one of {runnable}."
        )
    return script


def find_python(reader: str, given: Path | None = None) -> Path:
    """Return the Python that a reader is run with.

    Args:
        reader: which one.
        given: a Python that the user named; else this one where it has the reader, else what the environment variable
            says.

    Raises:
        ConfigError: the named Python is no file that can be run, or the reader is not run here.
        MissingExtraError: there is none; says how to make one.
    """
    entry = find_reader(reader)
    reader_script(reader)
    named = given or (None if _importable(entry) else _from_environment(entry.variable))
    if named is not None:
        if not os.access(named, os.X_OK) or not named.is_file():
            raise ConfigError(f"{named} is not a Python that can be run; name the one of the environment of {reader}.")
        return named
    if _importable(entry):
        return Path(sys.executable)
    raise MissingExtraError(
        f"{reader} needs {' and '.join(entry.modules)}, not installed in this Python; it is run in an environment "
        f"of its own. Make one ({entry.install}) and name its Python with --reader-python or {entry.variable}. Or "
        "leave --reader out, to check all else."
    )


def read_with(
    reader: str, folder: Path, prompts: Sequence[Sequence[int]], python: Path, *, seconds: float = SECONDS
) -> Reading:
    """Run a reader on a checkpoint.

    Args:
        reader: which one.
        folder: the checkpoint.
        prompts: token ids of each prompt.
        python: the Python that has the reader, as `find_python` gives it.
        seconds: when to give up.

    Raises:
        UnsupportedModelError: the reader fails on this checkpoint; with its last words.
        MissingExtraError: that Python does not have the reader.
        ConfigError: the reader is not run here, or has no kernel for this checkpoint on this machine.
    """
    with temporary_folder() as place:
        request, result = place / "request.json", place / "answer.json"
        request.write_text(json.dumps({"prompts": [list(prompt) for prompt in prompts]}), encoding="utf-8")
        # Not resolved: a virtual environment's Python is a link, and knows its packages by that name.
        command = [python.absolute(), reader_script(reader), folder.resolve(), request, result]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=place, timeout=seconds)
        except subprocess.TimeoutExpired as err:
            raise UnsupportedModelError(
                f"{folder}: {reader} did not answer within {seconds} seconds; a small model needs about one minute. "
                "Try it by hand."
            ) from err
        if done.returncode != 0 or not result.is_file():
            raise _failure(reader, folder, python, done.stderr or done.stdout)
        return _reading(reader, result)


def _failure(reader: str, folder: Path, python: Path, output: str) -> UnsupportedModelError | ConfigError:
    last = " ".join(output.split())[-_LAST_CHARACTERS:]
    entry = find_reader(reader)
    for module in entry.modules:
        if f"No module named '{module}'" in last:
            return MissingExtraError(f"{python} has no {module}; {reader} needs it. {entry.install}")
    lacking = entry.missing_kernel(output)
    if lacking is not None:
        return ConfigError(
            f"{folder}: {reader} cannot run it on this machine: {lacking}. That says nothing of the checkpoint: run it "
            "on another machine, or verify with another --reader."
        )
    return UnsupportedModelError(f"{folder}: {reader} cannot read it; it said: {last}. Do not use it with {reader}.")


def _reading(reader: str, path: Path) -> Reading:
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        return Reading(reader, str(result["version"]), dict(result["methods"]), tuple(result["sequences"]))
    except (ValueError, KeyError, TypeError) as err:
        raise ArtifactError(f"the script that runs {reader} answered nonsense ({err}). Report this as a bug.") from err


def _importable(reader: Reader) -> bool:
    return all(importlib.util.find_spec(module) is not None for module in reader.modules)


def _from_environment(variable: str) -> Path | None:
    value = os.environ.get(variable)
    return Path(value) if value else None
