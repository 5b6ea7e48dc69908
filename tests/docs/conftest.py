"""Notebooks and pages are run only when they are asked for: together they take minutes."""

from __future__ import annotations

import pytest

TARGETS = {"notebooks": "make test-notebooks", "pages": "make test-docs"}
"""Marker → what runs it."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        for marker, target in TARGETS.items():
            if item.get_closest_marker(marker) and marker not in config.option.markexpr:
                item.add_marker(pytest.mark.skip(reason=f"takes minutes; `{target}` runs it"))
