"""Every cell of the reader matrix: read right by the real reader, or refused at plan time for a reason that is true."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from quant_fairness_plugin.checkpoint.readers import find_reader
from quant_fairness_plugin.checkpoint.readers.compare import MOST_BEHIND, TOLERANCE
from tests.readers.conftest import cell_of
from tests.readers.matrix import Cell, all_cells
from tests.readers.reading import Judged
from tests.readers.session import MatrixSession, python_of
from tests.readers.table import update_table

pytestmark = pytest.mark.readers

CELLS = all_cells()
READ = [cell for cell in CELLS if cell.refusal is None and cell.missing_kernel is None]
NOT_HERE = [cell for cell in CELLS if cell.missing_kernel is not None]
REFUSED = [cell for cell in CELLS if cell.refusal is not None]
DENSE_AFTER_LOADING = {("compressed-tensors", "gptqmodel")}
"""gptqmodel hands these to Transformers and keeps the dequantized weights, so it cannot say what was quantized."""


@pytest.fixture(scope="session")
def matrix(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MatrixSession]:
    chosen = {cell for cell in map(cell_of, request.session.items) if cell is not None}
    session = MatrixSession.run([cell for cell in CELLS if cell in chosen], tmp_path_factory.mktemp("readers"))
    yield session
    update_table(session.rows())


def run_here(matrix: MatrixSession, cell: Cell) -> Judged | str:
    python_of(cell.environment)
    found = matrix.judged(cell)
    if (lacking := matrix.missing_here(cell)) is not None:
        pytest.skip(f"{cell.reader}: {lacking}")
    return found


def judged(matrix: MatrixSession, cell: Cell) -> Judged:
    found = run_here(matrix, cell)
    assert isinstance(found, Judged), f"{cell.reader} cannot read it:\n{found}"
    return found


@pytest.mark.parametrize("cell", READ, ids=lambda cell: cell.name)
class TestReadable:
    def test_is_accepted_at_plan_time(self, cell: Cell, matrix: MatrixSession) -> None:
        python_of(cell.environment)
        assert matrix.refusal(cell) is None

    def test_exactly_the_planned_modules_are_quantized(self, cell: Cell, matrix: MatrixSession) -> None:
        found = judged(matrix, cell)
        if (cell.checkpoint.format, cell.reader) in DENSE_AFTER_LOADING:
            assert found.quantized == frozenset()
            return
        assert found.quantized == found.planned
        if cell.reader == "vllm":
            assert found.all_modules == found.all_planned

    def test_log_probabilities_are_those_of_our_dequantizer(self, cell: Cell, matrix: MatrixSession) -> None:
        assert judged(matrix, cell).distance < TOLERANCE

    def test_a_reader_that_mixed_up_layers_would_be_noticed(self, cell: Cell, matrix: MatrixSession) -> None:
        assert judged(matrix, cell).mistaken_distance > TOLERANCE

    def test_greedy_tokens_are_ours_unless_two_are_equally_likely(self, cell: Cell, matrix: MatrixSession) -> None:
        found = judged(matrix, cell)
        assert found.behind < MOST_BEHIND
        if cell.reader == "vllm":
            assert found.equal is not None
            assert found.equal >= 0.75


@pytest.mark.parametrize("cell", REFUSED, ids=lambda cell: cell.name)
class TestRefused:
    def test_is_refused_at_plan_time_with_the_reason(self, cell: Cell, matrix: MatrixSession) -> None:
        python_of(cell.environment)
        said = matrix.refusal(cell)
        assert said is not None
        assert str(cell.refusal) in said

    def test_the_reader_would_indeed_not_read_it_right(self, cell: Cell, matrix: MatrixSession) -> None:
        found = run_here(matrix, cell)
        assert isinstance(found, str) or not found.distance < TOLERANCE


@pytest.mark.parametrize("cell", NOT_HERE, ids=lambda cell: cell.name)
def test_is_accepted_and_fails_only_for_want_of_a_kernel(cell: Cell, matrix: MatrixSession) -> None:
    found = run_here(matrix, cell)
    assert matrix.refusal(cell) is None
    assert isinstance(found, str)
    assert find_reader(cell.reader).missing_kernel(found) == cell.missing_kernel
