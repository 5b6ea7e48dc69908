"""A model folder of its own for each test."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def folder(tiny_model: Callable[..., Path], tmp_path: Path) -> Path:
    """A folder of its own that a test may damage."""
    return Path(shutil.copytree(tiny_model(), tmp_path / "tiny llama"))
