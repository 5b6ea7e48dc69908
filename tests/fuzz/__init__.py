"""Fuzzing of every parser of files; see `targets`. Nothing heavy is imported here."""

from pathlib import Path

CORPUS = Path(__file__).parent / "corpus"
"""A folder for each target: well-formed files, and what once went wrong."""
MOST_SECONDS = 1.0
"""Of the processor, for one file."""
MOST_BYTES = 256 << 20
"""By which the memory of a process may grow."""
