"""The errors a caller can tell apart. Each kind carries the exit status of the command line (see README, "Exit codes").

A message has three parts: what was wrong (with the value), what is allowed, and what to do next.
"""

from __future__ import annotations

import errno


class QuantFairnessError(Exception):
    """Base of every error that this package raises on purpose."""

    exit_code = 1


class ConfigError(QuantFairnessError, ValueError):
    """An argument or configuration value that cannot be used."""

    exit_code = 2


class UnknownLanguageError(ConfigError):
    """A language that the text set does not hold, or that is no language at all."""


class InvalidLayerError(ConfigError):
    """A layer list that does not fit the model."""


class MissingExtraError(ConfigError):
    """A feature whose optional dependency is not installed."""


class UnsupportedModelError(QuantFairnessError):
    """A model, format or reader combination that would give wrong results."""

    exit_code = 3


class UnsolvableError(UnsupportedModelError):
    """A module that a method cannot quantize on this calibration text: it can keep 16 bit, and the others go on."""


class ResourceError(QuantFairnessError):
    """Not enough memory or disk."""

    exit_code = 4


class ArtifactError(QuantFairnessError):
    """A file that is missing, malformed, altered or unsafe to read."""

    exit_code = 5


class QualityGateError(QuantFairnessError):
    """The output was written, and marked, but did not pass its quality gate."""

    exit_code = 6


class ExternalServiceError(QuantFairnessError):
    """A service outside this machine (the Hub) failed."""

    exit_code = 7


_NOT_WRITABLE = frozenset(
    {
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EFBIG,
        errno.EROFS,
        errno.EACCES,
        errno.EPERM,
        errno.EIO,
        errno.ENAMETOOLONG,
        errno.ENOTDIR,
    }
)


def is_disk_error(err: OSError) -> bool:
    """Return whether a system call failed for what a user has to put right on the disk: room, permission, hardware."""
    return err.errno in _NOT_WRITABLE
