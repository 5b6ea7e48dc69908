"""Reader tests run only when they are asked for: each loads a whole server, and needs an environment of its own."""

from __future__ import annotations

import pytest

from tests.readers.matrix import Cell


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--families", default="", help="only these models of the reader matrix, as llama,opt,demo")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "readers" in config.option.markexpr:
        _choose_families(config, items)
        return
    skip = pytest.mark.skip(reason="loads a real server in its own environment; `make test-readers` runs it")
    for item in items:
        if item.get_closest_marker("readers"):
            item.add_marker(skip)


def cell_of(item: pytest.Item) -> Cell | None:
    """The cell of the matrix that a test looks at."""
    call = getattr(item, "callspec", None)
    return call.params.get("cell") if call is not None else None


def _choose_families(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted = {name for name in config.getoption("families", "").split(",") if name}
    cells = {item: cell_of(item) for item in items}
    known = {cell.checkpoint.model for cell in cells.values() if cell is not None}
    if not wanted <= known:
        raise pytest.UsageError(f"--families: {', '.join(sorted(wanted - known))} unknown; allowed: {', '.join(known)}")
    left_out = [
        item for item, cell in cells.items() if wanted and cell is not None and cell.checkpoint.model not in wanted
    ]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in set(left_out)]
