"""The whole kernel grids run only when asked for: they take minutes, and a small part of each always runs."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "kernels" in config.option.markexpr:
        return
    skip = pytest.mark.skip(reason="a whole grid of kernel cases, minutes; `make test-kernels` runs it")
    for item in items:
        if item.get_closest_marker("kernels"):
            item.add_marker(skip)
