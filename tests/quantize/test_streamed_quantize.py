"""Blocks read from their files, and runs that are interrupted: the same bits as in memory, at once."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from quant_fairness_plugin.artifacts import Grid
from quant_fairness_plugin.errors import ResourceError
from quant_fairness_plugin.model.load import load_model
from quant_fairness_plugin.model.streamed import open_streamed
from quant_fairness_plugin.quantize.calibration import CalibrationSet, build_calibration
from quant_fairness_plugin.quantize.memory import count_quantize_needs
from quant_fairness_plugin.quantize.quantized import QuantizedModel
from quant_fairness_plugin.quantize.results import StoredResults
from quant_fairness_plugin.quantize.workplace import Workplace, fusion_groups
from tests.planning import quantize_layers
from tests.tiny import write_tiny_model

GRID = Grid(bits=4, group_size=32)
ASYMMETRIC = Grid(bits=4, group_size=32, symmetric=False)
KILLED = 33
"""Exit status of a process that ends in the middle."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama of three layers."""
    path = tmp_path_factory.mktemp("streamed") / "llama"
    write_tiny_model(path, "llama", layers=3, width=32)
    return path


def assert_same(ours: QuantizedModel, theirs: QuantizedModel) -> None:
    assert tuple(ours.tensors) == tuple(theirs.tensors)
    for name, tensor in theirs.tensors.items():
        found = ours.tensors[name]
        assert found.grid == tensor.grid
        assert torch.equal(found.integers, tensor.integers), name
        assert torch.equal(found.scales, tensor.scales), name
        assert torch.equal(found.zeros, tensor.zeros), name
    assert ours.folded.keys() == theirs.folded.keys()
    assert all(torch.equal(ours.folded[name], value) for name, value in theirs.folded.items())
    assert ours.columns.keys() == theirs.columns.keys()
    for name, kept in theirs.columns.items():
        assert torch.equal(ours.columns[name].index, kept.index)
        assert torch.equal(ours.columns[name].delta, kept.delta)
    assert (ours.losses, ours.damping, ours.kept) == (theirs.losses, theirs.damping, theirs.kept)
    assert ours.bits == {name: tensor.grid.bits for name, tensor in theirs.tensors.items()}


@pytest.mark.parametrize("columns", [0.0, 0.1])
@pytest.mark.parametrize(("method", "grid"), [("gptq", GRID), ("awq", ASYMMETRIC)])
def test_a_streamed_model_is_quantized_to_the_same_bits(
    folder: Path, rows: CalibrationSet, method: str, grid: Grid, columns: float
) -> None:
    given = {"grid": grid, "method": method, "calibration": rows, "columns": columns}
    streamed = open_streamed(str(folder))
    found = quantize_layers(streamed, [1], **given)
    assert_same(found, quantize_layers(load_model(str(folder)), [1], **given))
    assert all(parameter.is_meta for parameter in streamed.block(2).parameters())


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])  # the first block of DeepSeek has no experts
def test_a_streamed_mixture_is_quantized_to_the_same_bits(
    family: str, tiny_model: Callable[..., Path], rows: CalibrationSet
) -> None:
    folder = tiny_model(family, layers=3)
    given = {"grid": GRID, "method": "gptq", "calibration": rows}
    streamed = open_streamed(str(folder))
    found = quantize_layers(streamed, [1], **given)
    assert any(".experts." in name for name in found.tensors)
    assert_same(found, quantize_layers(load_model(str(folder)), [1], **given))
    assert all(parameter.is_meta for parameter in streamed.block(2).parameters())


def test_rounding_needs_one_block_at_a_time(folder: Path) -> None:
    streamed = open_streamed(str(folder))
    found = quantize_layers(streamed, [], grid=GRID, method="rtn")
    assert_same(found, quantize_layers(load_model(str(folder)), [], grid=GRID, method="rtn"))


def test_hidden_states_beyond_the_budget_go_to_files(folder: Path, rows: CalibrationSet) -> None:
    streamed = open_streamed(str(folder))
    given = {"grid": GRID, "method": "gptq", "calibration": rows, "batch_tokens": 48}
    with pytest.raises(ResourceError, match="raise the budget"):
        quantize_layers(streamed, [], workplace=Workplace(memory_budget=1000), **given)
    least = count_quantize_needs(
        {name: tuple(value.shape) for name, value in streamed.model.named_parameters()},
        fusion_groups(streamed),
        blocks=streamed.family.blocks,
        tokens=48,
        compares=True,
    ).least
    found = quantize_layers(streamed, [], workplace=Workplace(memory_budget=least), **given)
    assert_same(found, quantize_layers(load_model(str(folder)), [], **given))


CHILD = """
import os, sys
from pathlib import Path
from quant_fairness_plugin.quantize import results
from tests.quantize.test_streamed_quantize import quantize_in
layer, plain = int(sys.argv[3]), results.StoredResults.add

def add(self, number, solved):
    plain(self, number, solved)
    if number == layer:
        os._exit({killed})

results.StoredResults.add = add
for method in sys.argv[4:]:  # each in a process that is forked before torch has threads, and spares the import of torch
    child = os.fork()
    if not child:
        quantize_in(Path(sys.argv[1]), Path(sys.argv[2]) / method, method)
        os._exit(0)
    print(method, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def quantize_in(folder: Path, work: Path, method: str) -> QuantizedModel:
    """Quantize a folder's model in a folder to go on from."""
    from tests.quantize.conftest import small_texts

    streamed = open_streamed(str(folder))
    rows = build_calibration(streamed.tokenizer, small_texts(), row_tokens=24)
    grid = ASYMMETRIC if method == "awq" else GRID
    place = Workplace(folder=work)
    return quantize_layers(streamed, [], grid=grid, method=method, calibration=rows, workplace=place, batch_tokens=48)


METHODS = ("gptq", "awq")


@pytest.fixture(scope="module")
def killed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, int], Path]:
    """Exit statuses of the methods' runs, which each ended behind layer 1, and where they kept their work."""
    place = tmp_path_factory.mktemp("killed")
    command = [sys.executable, "-c", CHILD.format(killed=KILLED), str(folder), str(place), "1", *METHODS]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return {method: int(status) for method, status in map(str.split, done.stdout.splitlines())}, place


@pytest.mark.parametrize("method", METHODS)
def test_a_killed_run_goes_on_from_its_last_whole_layer(
    folder: Path,
    rows: CalibrationSet,
    killed: tuple[dict[str, int], Path],
    monkeypatch: pytest.MonkeyPatch,
    method: str,
) -> None:
    statuses, work = killed[0], killed[1] / method
    assert statuses[method] == KILLED
    solved: list[int] = []
    plain = StoredResults.add
    monkeypatch.setattr(
        StoredResults, "add", lambda self, layer, given: (solved.append(layer), plain(self, layer, given))[1]
    )
    found = quantize_in(folder, work, method)
    assert solved == [2]
    grid = ASYMMETRIC if method == "awq" else GRID
    whole = quantize_layers(load_model(str(folder)), [], grid=grid, method=method, calibration=rows, batch_tokens=48)
    assert_same(found, whole)
    assert_same(quantize_in(folder, work, method), whole)
    assert solved == [2]
    assert not list(work.rglob("*.stack"))


def test_a_torn_layer_is_solved_again(folder: Path, tmp_path: Path) -> None:
    whole = quantize_in(folder, tmp_path, "gptq")
    expected = {name: tensor.integers for name, tensor in whole.tensors.items()}
    torn = next(tmp_path.rglob("layer-00001.safetensors"))
    torn.write_bytes(torn.read_bytes()[:100])
    again = quantize_in(folder, tmp_path, "gptq")
    assert all(torch.equal(tensor.integers, expected[name]) for name, tensor in again.tensors.items())
