"""What every tool needs around it: silence on our output streams, its failures as our errors, its traces removed."""

from __future__ import annotations

import errno
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import IO

from quant_fairness_plugin.errors import QuantFairnessError, ResourceError, UnsupportedModelError

_logger = logging.getLogger(__name__)


@contextmanager
def running(tool: str) -> Iterator[None]:
    """Run a tool with its output apart from ours, and put back what it changes in the process.

    The tools print thousands of lines, from threads of their own and through handlers that they bind while they are
    imported, so file descriptors 1 and 2 are turned aside. What was printed is logged (DEBUG).

    Args:
        tool: its name, for messages.

    Raises:
        UnsupportedModelError: the tool failed; says how.
        ResourceError: the disk is full or there is too little memory.
    """
    with _aside(tool), _as_it_was(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except (QuantFairnessError, KeyboardInterrupt):
            raise
        except (MemoryError, OSError) as err:
            if isinstance(err, MemoryError) or err.errno in (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM):
                raise ResourceError(
                    f"{tool}: {str(err) or 'out of memory'}. Free memory or disk, or set TMPDIR."
                ) from err
            raise _failure(tool, err) from err
        except Exception as err:  # the tools have no base class of their own
            raise _failure(tool, err) from err


def _failure(tool: str, err: Exception) -> UnsupportedModelError:
    text = " ".join(str(err).split())[:300]
    return UnsupportedModelError(
        f"{tool} failed on this model ({type(err).__name__}: {text or 'no message'}); accepted are models that it can "
        "quantize. Use --backend native; QUANT_FAIRNESS_VERBOSE=1 shows where it failed."
    )


@contextmanager
def _aside(tool: str) -> Iterator[None]:
    # Streams on the descriptors: where `sys.stdout` is another object (a notebook's, a test's), and for handlers that
    # are bound to it while the tool is imported and live longer than this block.
    out, err = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    with tempfile.TemporaryFile() as aside:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        copies = [os.dup(number) for number in (1, 2)]
        try:
            for number in (1, 2):
                os.dup2(aside.fileno(), number)
            with redirect_stdout(out), redirect_stderr(err):
                yield
        finally:
            out.flush()
            err.flush()
            for number, copy in zip((1, 2), copies, strict=True):
                os.dup2(copy, number)
                os.close(copy)
            _log_lines(tool, aside)


def _log_lines(tool: str, aside: IO[bytes]) -> None:
    if _logger.isEnabledFor(logging.DEBUG):
        aside.seek(0)
        for line in aside.read().decode("utf-8", "replace").splitlines():
            _logger.debug("%s: %s", tool, line)


@contextmanager
def _as_it_was() -> Iterator[None]:
    """Put back what the tools set for the whole process: torch's defaults and random state, the root logger."""
    import torch

    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    threads, dtype, grad = torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(grad)
