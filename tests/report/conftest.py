"""Browser tests run only when they are asked for: they need playwright, axe-core and a Chromium."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "browser" in config.option.markexpr:
        return
    skip = pytest.mark.skip(reason="needs a Chromium, playwright and axe-core; `make test-browser` runs it")
    for item in items:
        if item.get_closest_marker("browser"):
            item.add_marker(skip)
