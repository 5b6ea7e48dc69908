"""What cannot be solved on a calibration text keeps 16 bit, is reported, and stops nothing unless that is asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from quant_fairness_plugin.artifacts import Grid
from quant_fairness_plugin.errors import UnsolvableError, UnsupportedModelError
from quant_fairness_plugin.export.verify import verify
from quant_fairness_plugin.export.writer import export
from quant_fairness_plugin.model.load import LoadedModel
from quant_fairness_plugin.quantize import solve_blocks
from quant_fairness_plugin.quantize.calibration import CalibrationSet
from quant_fairness_plugin.quantize.moments import LanguageMoment
from quant_fairness_plugin.quantize.workplace import Workplace
from tests.export.build import TEXTS
from tests.planning import quantize_layers

Load = Callable[..., LoadedModel]
GRID = Grid(group_size=32)


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Put a value that is not finite into the second moment of what one module is given, in one language."""

    def plant(name: str, value: float = math.nan) -> None:
        measured = solve_blocks.language_moments

        def poisoned(block: torch.nn.Module, module: torch.nn.Module, *rest: object) -> Iterator[LanguageMoment]:
            found = measured(block, module, *rest)  # type: ignore[arg-type] # handed on
            last = name.rpartition(".")[2]
            hit = any(module is other and path.endswith(last) for path, other in block.named_modules())
            for statistics in found:
                moment = statistics.moment.clone()
                if hit and statistics.language == "he":
                    moment[1, 2] = value
                yield replace(statistics, moment=moment)

        monkeypatch.setattr(solve_blocks, "language_moments", poisoned)

    return plant


@pytest.mark.parametrize("method", ["gptq", "awq"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_hessian_that_is_not_finite_costs_its_fusion_group_alone(
    method: str, value: float, load: Load, rows: CalibrationSet, poison: Callable[..., None],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    loaded = load("llama")
    whole = quantize_layers(loaded, (), method=method, grid=GRID, calibration=rows)
    poison("gate_proj", value)
    found = quantize_layers(loaded, (), method=method, grid=GRID, calibration=rows)
    lost = {f"model.layers.{layer}.mlp.{name}" for layer in range(2) for name in ("gate_proj", "up_proj")}
    assert set(whole.tensors) - set(found.tensors) == lost == set(found.kept)
    assert set(found.kept.values()) == {
        f"model.layers.{layer}.mlp.gate_proj: the inputs of the module held NaN or infinity on the calibration text"
        for layer in range(2)
    }
    assert [line for line in caplog.messages if "It keeps 16 bit" in line] != []
    first = "model.layers.0.self_attn.q_proj"  # solved before anything was amiss
    assert torch.equal(found.tensors[first].integers, whole.tensors[first].integers)


def test_strict_stops_there_and_leaves_the_model_as_it_was(
    load: Load, rows: CalibrationSet, poison: Callable[..., None]
) -> None:
    loaded = load("llama")
    before = {name: value.clone() for name, value in loaded.model.state_dict().items()}
    poison("down_proj")
    with pytest.raises(UnsolvableError, match=r"^model\.layers\.0\.mlp\.down_proj: the inputs .* NaN") as caught:
        quantize_layers(loaded, (), method="gptq", grid=GRID, calibration=rows, strict=True)
    assert caught.value.exit_code == 3
    assert all(torch.equal(value, before[name]) for name, value in loaded.model.state_dict().items())


def test_what_was_kept_is_known_again_after_an_interruption(
    load: Load, rows: CalibrationSet, poison: Callable[..., None], tmp_path: Path
) -> None:
    loaded, place = load("llama"), Workplace(tmp_path)
    poison("down_proj")
    once = quantize_layers(loaded, (), method="gptq", grid=GRID, calibration=rows, workplace=place)
    again = quantize_layers(loaded, (), method="gptq", grid=GRID, calibration=rows, workplace=place)
    assert again.kept == once.kept
    assert set(again.kept) == {f"model.layers.{layer}.mlp.down_proj" for layer in range(2)}


def test_a_checkpoint_of_the_rest_is_written_and_verified(
    load: Load, rows: CalibrationSet, poison: Callable[..., None], tmp_path: Path
) -> None:
    poison("down_proj")
    found = quantize_layers(load("llama"), (), method="gptq", grid=GRID, calibration=rows)
    record = export(found, tmp_path / "out", texts=TEXTS)
    assert set(record.kept_modules) == set(found.kept)
    assert not set(record.quantized_modules) & set(found.kept)
    verify(tmp_path / "out")
    assert "held NaN or infinity" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


def test_nothing_that_can_be_solved_is_an_error(load: Load, rows: CalibrationSet) -> None:
    loaded = load("llama")
    with torch.no_grad():
        loaded.model.get_parameter("model.embed_tokens.weight").fill_(math.nan)
    with pytest.raises(UnsupportedModelError, match=r"^nothing could be quantized: model\.layers\.0\.self_"):
        quantize_layers(loaded, (), method="gptq", grid=GRID, calibration=rows)


def test_experts_whose_inputs_are_not_finite_keep_16_bit_together(load: Load, rows: CalibrationSet) -> None:
    loaded = load("qwen3_moe")
    with torch.no_grad():
        loaded.model.get_parameter("model.layers.1.post_attention_layernorm.weight")[0] = math.nan
    found = quantize_layers(loaded, (), method="gptq", grid=GRID, calibration=rows)
    assert {name.split(".")[2] for name in found.kept} == {"1"}
    assert all(".mlp.experts." in name for name in found.kept)
    assert len(found.kept) == 3 * 4


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_zero_rows_and_constant_columns_have_finite_scales(
    method: str, symmetric: bool, load: Load, rows: CalibrationSet
) -> None:
    loaded, name = load("llama"), "model.layers.0.mlp.down_proj"
    with torch.no_grad():
        weight = loaded.model.get_parameter(f"{name}.weight")
        weight[3], weight[:, 5] = 0.0, 0.25
    calibration = None if method == "rtn" else rows
    grid = replace(GRID, symmetric=symmetric)
    found = quantize_layers(loaded, (), method=method, grid=grid, calibration=calibration)
    dense = found.dense_weight(name)
    assert torch.isfinite(found.tensors[name].scales).all()
    assert (found.tensors[name].scales > 0).all()
    assert torch.isfinite(dense).all()
    others = [column for column in range(dense.shape[1]) if column != 5]
    if method == "rtn":
        assert dense[3, 32:].abs().max() == 0
        assert (dense[:, 5] - 0.25).abs().max() < 0.05
    assert dense[3, others].abs().max() < 0.05


def test_an_expert_of_zeros_comes_out_as_zeros(load: Load, rows: CalibrationSet) -> None:
    loaded = load("qwen3_moe")
    names = [f"model.layers.0.mlp.experts.2.{part}_proj" for part in ("gate", "up", "down")]
    with torch.no_grad():
        for name in names:
            solve_blocks.linear_weight(loaded.linears(0)[name]).zero_()
    found = quantize_layers(loaded, (), method="gptq", grid=GRID, calibration=rows)
    assert all(found.dense_weight(name).abs().max() == 0 for name in names)
    assert all(found.losses[name] == 0 for name in names)
