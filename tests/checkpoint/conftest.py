"""The exported tiny models of the export tests."""

from __future__ import annotations

from tests.export.conftest import damaged, exported

__all__ = ["damaged", "exported"]
