"""Real limits take processes of their own, seconds each: `make test-limits` runs them."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "limits" in config.option.markexpr:
        return
    skip = pytest.mark.skip(reason="processes of their own under real limits; `make test-limits` runs them")
    for item in items:
        if "limits" in item.keywords:
            item.add_marker(skip)
