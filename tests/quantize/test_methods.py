"""The facts of the methods, and what a new one costs: one class and one line."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from quant_fairness_plugin.artifacts import Grid
from quant_fairness_plugin.config import make_config
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.export.verify import verify
from quant_fairness_plugin.export.writer import export
from quant_fairness_plugin.model.linear import linear_weight
from quant_fairness_plugin.model.load import LoadedModel, load_model
from quant_fairness_plugin.quantize.calibration import CalibrationSet
from quant_fairness_plugin.quantize.grid import quantize_rtn
from quant_fairness_plugin.quantize.methods import METHODS, check_method, find_method, method_names
from quant_fairness_plugin.quantize.methods.gptq import Gptq
from quant_fairness_plugin.quantize.methods.method import Method
from quant_fairness_plugin.quantize.solving import Problem, Solved, shrink
from quant_fairness_plugin.quantize.stream import quantize_model
from tests.export.build import ASYMMETRIC_READER, TEXTS
from tests.planning import plan_of_layers, quantize_layers

GRID = Grid(group_size=32)
PACKAGE = Path(__file__).parents[2] / "quant_fairness_plugin"
FORMATS = {"checkpoint", "serve", "sweep", "export/repair.py"}
"""Where `gptq` and `awq` are formats or `quant_method`s of a checkpoint."""


class Halving(Method):
    """Rounds half of each weight and doubles the scales; no one needs it."""

    name: ClassVar[str] = "halving"
    needs_calibration: ClassVar[bool] = False
    symmetric: ClassVar[bool] = False
    bits: ClassVar[tuple[int, ...]] = (4,)

    def solve(self, problem: Problem, solved: Solved) -> None:
        for name, weight in problem.weights.items():
            half = quantize_rtn(weight.float() / 2, problem.grids[name], scale_dtype=problem.scale_dtype)
            tensor = type(half)(integers=half.integers, scales=half.scales * 2, zeros=half.zeros, grid=half.grid)
            solved.tensors[name] = tensor


@pytest.fixture
def halving(monkeypatch: pytest.MonkeyPatch) -> str:
    """The one line."""
    monkeypatch.setitem(METHODS, "halving", Halving())
    return "halving"


def test_a_new_method_quantizes_exports_and_verifies(
    tiny_model: Callable[..., Path], tmp_path: Path, halving: str
) -> None:
    loaded = load_model(str(tiny_model("llama")))
    config = make_config(method=halving, group_size=32)
    assert not config.grid.symmetric
    plan = plan_of_layers(loaded, (1,), grid=config.grid)
    quantized = quantize_model(loaded, plan, method=config.method)
    record = export(quantized, tmp_path / "out", texts=TEXTS, reader=ASYMMETRIC_READER)
    assert (record.method, record.plan, record.calibration) == (halving, plan, {})
    assert verify(tmp_path / "out").complete == (ASYMMETRIC_READER == "transformers")
    names = loaded.family.full_names(0)
    assert tuple(quantized.tensors) == names
    for name in names:
        weight = linear_weight(loaded.model.get_submodule(name)).float()
        assert (quantized.dense_weight(name) - weight).abs().max() < weight.abs().max() / 4


def test_what_a_new_method_says_of_itself_is_asked(
    load: Callable[..., LoadedModel], rows: CalibrationSet, halving: str
) -> None:
    loaded = load()
    with pytest.raises(ConfigError, match="'halving' uses no calibration text .* use 'gptq' or 'awq'"):
        quantize_layers(loaded, (), method=halving, grid=GRID, calibration=rows)
    with pytest.raises(ConfigError, match="columns 0.1 cannot be used with method 'halving'.* use 'gptq' or 'awq'"):
        quantize_layers(loaded, (), method=halving, grid=GRID, columns=0.1)
    with pytest.raises(ConfigError, match="bits 8 cannot be used with method 'halving', which takes 4; .*'awq'$"):
        quantize_layers(loaded, (), method=halving, grid=GRID, overrides={"layers.0": "int8"})
    with pytest.raises(ConfigError, match="calibration 'minimax' has no effect on method 'halving'"):
        make_config(method=halving, calibration="minimax")
    with pytest.raises(ConfigError, match="method 'magic' is unknown; use 'rtn', 'gptq', 'awq' or 'halving'"):
        find_method("magic")


def test_without_its_line_the_method_is_unknown() -> None:
    with pytest.raises(ConfigError, match="method 'halving' is unknown; use 'rtn', 'gptq' or 'awq'"):
        make_config(method="halving")
    assert method_names(lambda method: method.moves_scales) == "'awq'"


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_registered_by_its_name(name: str) -> None:
    assert find_method(name).name == name


def test_options_of_a_method_are_given_with_it(load: Callable[..., LoadedModel], rows: CalibrationSet) -> None:
    loaded = load()
    one, other = (
        quantize_layers(loaded, (), method=Gptq(damp=damp), grid=GRID, calibration=rows) for damp in (0.05, 0.5)
    )
    assert one.method == other.method == "gptq"
    assert set(other.damping.values()) == {0.5}
    assert any(not torch.equal(one.tensors[name].integers, other.tensors[name].integers) for name in one.tensors)


def test_efforts_are_options_of_a_method() -> None:
    usual = Gptq()
    assert usual.at("normal") == usual
    assert usual.at("fast") == Gptq(compensates=False, refinements=0, damp=0.05)
    assert Gptq(damp=0.2).at("fast").damp == 0.2
    assert not usual.at("fast").compares_inputs
    assert usual.at("best").refinements > usual.refinements
    assert find_method("awq").at("normal").settings == {}
    assert usual.settings["damp"] is None


def test_damping_grows_with_the_channels_and_falls_with_the_tokens() -> None:
    usual = Gptq()
    assert usual.damping(576, 3584) == pytest.approx(576 / 3584)
    assert usual.damping(4096, 10_000_000) == 0.01
    assert usual.damping(4096, 64) == 10.0
    assert usual.damping(4096, None) == 0.05
    assert Gptq(damp=0.2).damping(4096, 64) == Gptq(damp=0.2).damping(4096, None) == 0.2


def test_what_channels_have_in_common_is_trusted_as_far_as_there_are_tokens() -> None:
    usual = Gptq()
    assert usual.shrinking(576, 3584) == pytest.approx(576 / 3584)
    assert usual.shrinking(4096, 64) == 0.5
    assert usual.shrinking(4096, 10_000_000) < 0.001
    assert usual.shrinking(4096, None) == Gptq(damp=0.2).shrinking(4096, 64) == usual.at("fast").shrinking(64, 64) == 0


def test_a_quantized_model_says_by_which_options_it_was_made(
    load: Callable[..., LoadedModel], rows: CalibrationSet
) -> None:
    quantized = quantize_layers(load(), (), method=Gptq(refinements=1), grid=GRID, calibration=rows)
    assert quantized.settings == Gptq(refinements=1).settings


def test_a_plan_of_another_model_is_refused(load: Callable[..., LoadedModel]) -> None:
    plan = plan_of_layers(load(layers=3), (), grid=GRID)
    with pytest.raises(ConfigError, match="the plan is for 3 layers, and the model has 2"):
        quantize_model(load(layers=2), plan, method="rtn")


def test_a_sweep_takes_what_rounding_takes() -> None:
    check_method("gptq", Grid(clip="minimax"), sweeps=False)
    with pytest.raises(ConfigError, match="clip 'minimax' cannot be swept"):
        check_method("gptq", Grid(clip="minimax"), sweeps=True)


def test_the_facts_do_without_torch() -> None:
    code = "import sys, quant_fairness_plugin.quantize.methods as m; print(len(m.METHODS), 'torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == ["3", "False"]


def compared_methods(source: str) -> list[str]:
    """Comparisons of something called `method` with a name of `METHODS`."""
    comparisons = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Compare)]
    return [
        ast.unparse(node)
        for node in comparisons
        if ast.unparse(node.left).split(".")[-1] == "method"
        and any(
            isinstance(part, ast.Constant) and part.value in METHODS
            for side in node.comparators
            for part in ast.walk(side)
        )
    ]


def test_no_one_compares_a_method_with_a_name() -> None:
    assert compared_methods('if job.method != "awq" or method in ("rtn", "x"): pass') != []
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        if not any(name.startswith(place) for place in FORMATS):
            assert compared_methods(path.read_text(encoding="utf-8")) == [], name


def test_a_hessian_that_modules_share_is_shrunk_once() -> None:
    shared, alone = torch.full((3, 3), 8.0), torch.full((3, 3), 4.0)
    shrink({"a": shared, "b": shared, "c": alone}, 0.25)
    assert torch.equal(shared, torch.tensor([[8.0, 6, 6], [6, 8, 6], [6, 6, 8]]))
    assert torch.equal(alone, torch.tensor([[4.0, 3, 3], [3, 4, 3], [3, 3, 4]]))
