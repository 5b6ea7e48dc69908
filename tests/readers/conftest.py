"""Reader tests run only when they are asked for: each loads a whole server, and needs an environment of its own."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "readers" in config.option.markexpr:
        return
    skip = pytest.mark.skip(reason="loads a real server in its own environment; `make test-readers` runs it")
    for item in items:
        if item.get_closest_marker("readers"):
            item.add_marker(skip)
