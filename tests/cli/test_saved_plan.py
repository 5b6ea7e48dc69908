"""`quantize --plan`: a recommended plan is what comes out, and options that say something else are refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import typer

from quant_fairness_plugin.artifacts import ExportRecord, ProtectionPlan, load, save
from quant_fairness_plugin.cli.main import app, run_guarded
from quant_fairness_plugin.cli.saved_plan import planned
from quant_fairness_plugin.config import make_config
from quant_fairness_plugin.model.load import load_model
from quant_fairness_plugin.plans.costs import count_bytes
from quant_fairness_plugin.recommend import explicit_plan


def run(*arguments: str | Path) -> int:
    return run_guarded(typer.main.get_command(app), list(map(str, arguments)), "quant-fairness")


@pytest.fixture(scope="module")
def plan(planted_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A unit in 8 bit, which no other option can ask for, and a layer in 16."""
    from quant_fairness_plugin.artifacts import Grid

    grid = Grid(group_size=32)
    sizes, other = count_bytes(load_model(str(planted_model)), grid)
    made = explicit_plan(
        (2,), model="planted", grid=grid, layer_bytes=sizes, other_bytes=other, overrides={"layers.1.down": "int8"}
    )
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    save(replace(made, source="auto by worst", reasons=("measured",)), path)
    return path


def test_the_checkpoint_follows_the_plan_and_keeps_its_reasons(
    planted_model: Path, planted_file: str, plan: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    given = ["--plan", plan, "--texts", planted_file, "--method", "rtn", "--format", "compressed-tensors"]
    assert run("quantize", planted_model, "-o", out, *given) == 0
    record, wanted = load(ExportRecord, out / "quant_fairness.json"), load(ProtectionPlan, plan)
    # What was predicted was measured on the checkpoint.
    assert record.plan == replace(wanted, predicted=False)
    bits = record.quantized_modules
    assert not any(name.startswith("model.layers.2.") for name in bits)
    assert bits["model.layers.1.mlp.down_proj"] == 8
    assert bits["model.layers.0.mlp.down_proj"] == 4


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--bits", "3"], "--bits 3"),
        (["--group-size", "64"], "--group-size 64"),
        (["--protect-layers", "0"], "--protect-layers"),
        (["--int8-layers", "1"], "--int8-layers"),
        (["--time", "10min"], "--time 10min"),
        (["--protect-units", "1.down"], "--protect-units"),
    ],
)
def test_options_that_choose_too_are_refused(
    planted_model: Path, plan: Path, options: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("quantize", planted_model, "--plan", plan, *options) == 2
    assert named in capsys.readouterr().err


def test_a_plan_of_another_model_is_refused(
    plan: Path, planted_file: str, tmp_path: Path, planted_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = load(ProtectionPlan, plan)
    short = tmp_path / "short.json"
    save(replace(made, units={"layers.0": "fp16", "layers.1": "int4"}), short)
    assert run("quantize", planted_model, "--plan", short, "--texts", planted_file, "-o", tmp_path / "out") == 2
    assert "the plan is for 2 layers of planted" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "clip"),
    [({}, "mse"), ({"method": "awq"}, "absmax"), ({"backend": "gptqmodel"}, "absmax"), ({"clip": "mse"}, "mse")],
)
def test_what_sets_ranges_itself_keeps_its_rule(plan: Path, tmp_path: Path, options: dict[str, str], clip: str) -> None:
    made = load(ProtectionPlan, plan)
    path = tmp_path / "plan.json"
    save(replace(made, grid=replace(made.grid, clip="mse")), path)
    found, config = planned(path, make_config(**options))
    assert found is not None
    assert found.grid.clip == config.grid.clip == clip
