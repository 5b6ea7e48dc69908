"""A backend's folder becomes ours: same integers, whatever format is written, and nothing that was not asked for."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from quant_fairness_plugin.artifacts import Grid, ProtectionPlan
from quant_fairness_plugin.checkpoint.dequantize import read_dense_state
from quant_fairness_plugin.errors import ArtifactError, UnsupportedModelError
from quant_fairness_plugin.export.foreign import quantize_with
from quant_fairness_plugin.fair_quantizer import FairQuantizer
from quant_fairness_plugin.model.load import LoadedModel, from_loaded, load_model
from quant_fairness_plugin.quantize.calibration import CalibrationSet, build_calibration
from quant_fairness_plugin.quantize.quantized import QuantizedModel
from quant_fairness_plugin.texts.load import load_texts
from tests.export.fake_tool import FakeTool, Tensors, register
from tests.planning import quantize_layers

SYMMETRIC, ASYMMETRIC = Grid(group_size=32), Grid(group_size=32, symmetric=False)
NORM = "model.layers.0.input_layernorm.weight"


@pytest.fixture
def loaded(tiny_model: Callable[..., Path]) -> LoadedModel:
    return load_model(str(tiny_model("llama", layers=3)))


@pytest.fixture
def calibration(loaded: LoadedModel) -> CalibrationSet:
    return build_calibration(loaded.tokenizer, load_texts("bundled", languages=("en", "he")), tokens_per_language=64)


def plan_of(grid: Grid = SYMMETRIC, **units: str) -> ProtectionPlan:
    given = {name.replace("_", "."): kind for name, kind in units.items()}
    return ProtectionPlan(
        model="tiny",
        units={f"layers.{i}": "int4" for i in range(3)} | given,  # type: ignore[arg-type]
        grid=grid,
        source="explicit",
        reasons=(),
        stable=True,
        predicted=False,
        extra_bytes=0,
        overhead=0.0,
    )


def quantized_by(
    tool: FakeTool,
    loaded: LoadedModel,
    calibration: CalibrationSet,
    monkeypatch: pytest.MonkeyPatch,
    *,
    plan: ProtectionPlan | None = None,
    method: str = "gptq",
) -> QuantizedModel:
    register(monkeypatch, fake=tool)
    return quantize_with("fake", loaded, plan or plan_of(layers_1="fp16"), method=method, calibration=calibration)


def assert_same(found: QuantizedModel, expected: QuantizedModel) -> None:
    assert list(found.tensors) == list(expected.tensors)
    for name, tensor in expected.tensors.items():
        assert torch.equal(found.tensors[name].integers, tensor.integers), name
        assert torch.equal(found.tensors[name].scales, tensor.scales), name
        assert torch.equal(found.tensors[name].zeros, tensor.zeros), name


@pytest.mark.parametrize(
    ("layout", "grid"),
    [("gptq", SYMMETRIC), ("gptq", ASYMMETRIC), ("awq", ASYMMETRIC), ("compressed-tensors", ASYMMETRIC)],
)
def test_integers_scales_and_zeros_are_those_that_the_tool_chose(
    layout: str, grid: Grid, loaded: LoadedModel, calibration: CalibrationSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(grid, layers_1="fp16", layers_2_down="fp16")
    found = quantized_by(FakeTool(layout), loaded, calibration, monkeypatch, plan=plan)
    assert_same(found, quantize_layers(loaded, (1,), method="rtn", grid=grid, overrides=plan.overrides))
    assert (found.folded, found.plan, found.backend) == ({}, plan, "fake")
    assert found.versions == {"torch": torch.__version__}


def test_a_tool_gets_the_plan_module_by_module_and_exactly_our_rows(
    loaded: LoadedModel, calibration: CalibrationSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = FakeTool()
    quantized_by(tool, loaded, calibration, monkeypatch, plan=plan_of(layers_1="fp16", layers_2_down="fp16"))
    [job] = tool.jobs
    assert job.rows == (*calibration.rows["en"], *calibration.rows["he"])
    assert job.dtype == "float16"
    assert job.source == loaded.files.folder
    linears = [n for i in range(3) for n in loaded.linears(i)]
    assert set(job.grids) == {n for n in linears if ".1." not in n and n != "model.layers.2.mlp.down_proj"}
    assert set(job.kept) == {*linears, "lm_head"} - set(job.grids)
    assert job.shapes["model.layers.0.self_attn.k_proj"] == (16, 32)


def test_a_model_in_memory_is_written_for_the_tool_and_removed_again(
    loaded: LoadedModel, calibration: CalibrationSet, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    memory = from_loaded(loaded.model.half(), loaded.tokenizer)  # type: ignore[arg-type] # as in model/load.py
    tool = FakeTool()
    found = quantized_by(tool, memory, calibration, monkeypatch)
    assert_same(found, quantize_layers(memory, (1,), method="rtn", grid=SYMMETRIC))
    assert tool.jobs[0].source.is_relative_to(tmp_path)
    assert list(tmp_path.iterdir()) == []


def _set(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], None]:
    def mistake(tensors: Tensors) -> None:
        tensors[name] = change(tensors[name])

    return mistake


def _drop(name: str) -> Callable[[Tensors], None]:
    def mistake(tensors: Tensors) -> None:
        del tensors[name]

    return mistake


def _add(name: str) -> Callable[[Tensors], None]:
    def mistake(tensors: Tensors) -> None:
        tensors[name] = torch.full((4,), 3.0)

    return mistake


def _double(tensor: torch.Tensor) -> torch.Tensor:
    return tensor * 2


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (_drop("model.layers.0.mlp.up_proj.qweight"), r"up_proj is in 16 bit; asked was: the plan"),
        (_add("model.layers.1.mlp.up_proj.qweight"), r"layers\.1\.mlp\.up_proj is quantized; asked was: the plan"),
        (_drop("model.layers.0.mlp.up_proj.scales"), r"up_proj: its tensors cannot be read"),
        (
            _set("model.layers.0.mlp.up_proj.qzeros", lambda t: t + 1),
            r"up_proj has zero points; asked was: a symmetric",
        ),
        (_set("model.layers.0.mlp.up_proj.scales", lambda t: t.float() * 1.0001), r"scales that torch\.float16 can"),
        (_set("model.embed_tokens.weight", _double), r"model\.embed_tokens\.weight was changed"),
        (_set("model.layers.1.mlp.up_proj.weight", _double), r"layers\.1\.mlp\.up_proj\.weight was changed"),
        (_set(NORM, lambda t: t[:3]), r"input_layernorm\.weight is \[3\]; asked was: \[32\]"),
        (_drop(NORM), r"input_layernorm\.weight is missing"),
        (_add("model.layers.0.mlp.rotation"), r"rotation is an unexpected tensor"),
        (_add("model.layers.0.mlp.act.scales"), r"act\.scales is an unexpected tensor"),
    ],
)
def test_what_was_not_asked_for_is_an_error_that_names_it(
    mistake: Callable[[Tensors], None],
    message: str,
    loaded: LoadedModel,
    calibration: CalibrationSet,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(ArtifactError, match=message):
        quantized_by(FakeTool(mistake=mistake), loaded, calibration, monkeypatch)


def test_awq_may_fold_scales_into_the_blocks_and_nowhere_else(
    loaded: LoadedModel, calibration: CalibrationSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(ASYMMETRIC)
    folding = FakeTool("awq", _set(NORM, _double))
    found = quantized_by(folding, loaded, calibration, monkeypatch, plan=plan, method="awq")
    assert list(found.folded) == [NORM]
    assert torch.equal(found.folded[NORM], loaded.model.get_parameter(NORM) * 2)
    outside = FakeTool("awq", _set("model.norm.weight", _double))
    with pytest.raises(ArtifactError, match=r"model\.norm\.weight was changed"):
        quantized_by(outside, loaded, calibration, monkeypatch, plan=plan, method="awq")


def test_a_tied_head_may_be_stored_once_or_twice_but_not_changed(
    tiny_model: Callable[..., Path], calibration: CalibrationSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    tied = load_model(str(tiny_model("gpt2", layers=3)))
    assert tied.family.tied_head
    for mistake in (lambda tensors: None, _drop("lm_head.weight")):
        found = quantized_by(FakeTool(mistake=mistake), tied, calibration, monkeypatch)
        assert_same(found, quantize_layers(tied, (1,), method="rtn", grid=SYMMETRIC))
    with pytest.raises(ArtifactError, match=r"lm_head\.weight was changed"):
        quantized_by(FakeTool(mistake=_set("lm_head.weight", _double)), tied, calibration, monkeypatch)


def test_a_family_that_the_tool_refuses_never_reaches_it(
    tiny_model: Callable[..., Path], calibration: CalibrationSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = FakeTool()
    with pytest.raises(UnsupportedModelError, match="cannot do opt"):
        quantized_by(tool, load_model(str(tiny_model("opt", layers=3))), calibration, monkeypatch)
    assert tool.jobs == []


def test_an_export_names_the_backend_and_holds_its_values(
    tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    register(monkeypatch, fake=FakeTool("compressed-tensors"))
    quantizer = FairQuantizer.from_pretrained(
        str(tiny_model("llama", layers=3)),
        backend="fake",
        group_size=32,
        protect_layers=(1,),
        languages=("en", "he"),
        tokens_per_language=64,
    )
    record = quantizer.save_pretrained(tmp_path / "out", measure=None)
    assert record.provenance.arguments["backend"] == "fake"
    assert record.provenance.versions["torch"] == torch.__version__
    dense = read_dense_state(tmp_path / "out")
    expected = quantize_layers(quantizer.loaded, (1,), method="rtn", grid=SYMMETRIC)
    for name, tensor in expected.tensors.items():
        assert torch.equal(dense[f"{name}.weight"], tensor.dequantize())
