"""Commands on a tiny planted model: stdout is the result and nothing else, and artefacts are picked up again."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import typer

from quant_fairness_plugin.artifacts import Combinations, ProtectionPlan, SweepReport, load, save
from quant_fairness_plugin.cli.main import app, run_guarded
from tests.planted import planted_report, planted_sets
from tests.planted_model import LAYERS, PLANTED_LAYER


def sweep_of(model: Path, texts: str) -> list[str]:
    return ["sweep", "--model", str(model), "--texts", texts, "--group-size", "32"]


def test_a_sweep_is_one_document_and_recommend_reads_it_without_a_model(
    planted_model: Path, planted_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command, out = typer.main.get_command(app), tmp_path / "sweep.json"
    arguments = sweep_of(planted_model, planted_file)
    assert run_guarded(command, [*arguments, "--top", "1", "--json", "-o", str(out)], "quant-fairness") == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out) == json.loads(out.read_text(encoding="utf-8"))
    assert load(SweepReport, out).layers == LAYERS
    assert json.loads((tmp_path / "sweep.run.json").read_text(encoding="utf-8"))["argv"] == sys.argv

    assert run_guarded(command, ["recommend", str(out), "--top", "2"], "quant-fairness") == 0
    indices = capsys.readouterr().out
    assert len(indices.strip().split(",")) == 2
    assert all(0 <= int(index) < LAYERS for index in indices.split(","))

    assert run_guarded(command, ["recommend", str(out), "--max-overhead", "0.01"], "quant-fairness") == 0
    nothing = capsys.readouterr()
    assert nothing.out == ""
    assert "one layer costs more than the budget" in nothing.err


def test_pairs_of_units_are_swept_and_recommended(
    planted_model: Path, planted_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command, out, plan = typer.main.get_command(app), tmp_path / "sweep.json", tmp_path / "plan.json"
    arguments = [*sweep_of(planted_model, planted_file), "-o", str(out)]
    options = ["--granularity", "unit", "--combine", "2", "--max-plans", "6", "--top", "5"]
    assert run_guarded(command, [*arguments, *options, "--json"], "quant-fairness") == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out) == json.loads(out.read_text(encoding="utf-8"))
    assert "pairs: 6 of 120 evaluated, of the units that count most by themselves; best to protect: " in printed.err
    report = load(SweepReport, out)
    assert report.granularity == "unit"
    assert report.combinations[2] == Combinations(evaluated=6, possible=120)

    assert run_guarded(command, ["recommend", str(out), "--top", "5", "-o", str(plan)], "quant-fairness") == 0
    units = capsys.readouterr().out.strip()
    assert tuple(units.split(",")) == tuple(
        unit.removeprefix("layers.") for unit in load(ProtectionPlan, plan).overrides
    )
    assert len(units.split(",")) == 5

    folder = ["quantize", str(planted_model), "-o", str(tmp_path / "checkpoint"), "--texts", planted_file]
    options = ["--group-size", "32", "--method", "rtn", "--protect-layers", "none", "--protect-units", units]
    assert run_guarded(command, [*folder, *options], "quant-fairness") == 0
    assert "in 16 bit" in capsys.readouterr().out


def test_a_sweep_in_words_says_how_many_pairs_there_were(
    planted_model: Path, planted_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*sweep_of(planted_model, planted_file), "--combine", "2"]
    assert run_guarded(typer.main.get_command(app), arguments, "quant-fairness") == 0
    printed = capsys.readouterr().out
    assert "single: 4 of 4 evaluated\n" in printed
    assert "pairs: 6 of 6 evaluated; best to protect: " in printed
    assert "protect-one, most worth protecting first: 2," in printed
    assert "protect 0+2" in printed


def test_a_search_of_several_precisions_ends_in_a_plan_with_both(
    planted_model: Path, planted_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command, out, plan = typer.main.get_command(app), tmp_path / "sweep.json", tmp_path / "plan.json"
    arguments = [*sweep_of(planted_model, planted_file), "-o", str(out)]
    options = ["--precisions", "fp16,int8", "--search", "beam", "--size", "2", "--width", "2", "--top", "1"]
    assert run_guarded(command, [*arguments, *options], "quant-fairness") == 0
    printed = capsys.readouterr().out
    assert "int8 2" in printed
    assert "beam search by worst for 2, width 2: 5 of 6 sets evaluated; best to protect: " in printed
    assert "strongest of 5 of 6 pairs" in printed
    assert "dropping a member clearly hurts for " in printed

    report = load(SweepReport, out)
    floor = report.other_bytes + sum(report.layer_bytes["quantized"])
    budget = floor + 2 * (report.layer_bytes["int8"][0] - report.layer_bytes["quantized"][0])
    given = ["recommend", str(out), "--max-size", str(budget), "-o", str(plan)]
    assert run_guarded(command, given, "quant-fairness") == 0
    chosen = capsys.readouterr()
    assert f"{PLANTED_LAYER}:int8" in chosen.out.strip().split(",")
    assert f"note: predicted from single units: least worst damage within {budget} bytes: worst " in chosen.err
    assert "(predicted until the plan itself is evaluated on the confirm part)" in chosen.err
    assert load(ProtectionPlan, plan).units[f"layers.{PLANTED_LAYER}"] == "int8"


def test_bits_and_limits_of_languages_bound_the_plan_of_a_saved_sweep(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command, path = typer.main.get_command(app), tmp_path / "sweep.json"
    report = planted_report([0.1, 0.4, 1.5, 0.2], noise=0.001)
    save(report, path)
    sixteen, four = (sum(report.layer_bytes[row]) for row in ("fp16", "quantized"))
    one_more = four + report.layer_bytes["fp16"][2] - report.layer_bytes["quantized"][2]
    bits = str(16 * (one_more + 1) / sixteen)  # room for one layer in 16 bit, and no more
    assert run_guarded(command, ["recommend", str(path), "--target-bits", bits], "quant-fairness") == 0
    assert capsys.readouterr().out == "2\n"
    given = ["recommend", str(path), "--target-bits", bits, "--limit", "en=0.0001"]
    assert run_guarded(command, given, "quant-fairness") == 0
    assert "predicted to keep en below 0.0001" in capsys.readouterr().err


def test_a_plan_for_a_gguf_file_is_made_for_its_grid_and_bytes(
    planted_model: Path, planted_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plans = {}
    for embedding in ("q8_0", "16bit"):
        plan = tmp_path / f"{embedding}.json"
        given = ["recommend", "--model", str(planted_model), "--texts", planted_file, "--format", "gguf", "--bits", "5"]
        given += ["--embedding", embedding, "--target-bits", "6.5", "--sentences", "4", "-o", str(plan)]
        assert run_guarded(typer.main.get_command(app), given, "quant-fairness") == 0
        assert "the rest INT5 g32" in capsys.readouterr().err
        plans[embedding] = load(ProtectionPlan, plan)
    # The same bits of the layers buy the same units; of the smaller file that is a larger share.
    assert plans["q8_0"].overrides == plans["16bit"].overrides != {}
    assert plans["q8_0"].extra_bytes == plans["16bit"].extra_bytes
    assert plans["q8_0"].overhead > plans["16bit"].overhead


def test_the_frontier_is_printed_and_is_one_document(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command, path = typer.main.get_command(app), tmp_path / "sweep.json"
    save(planted_report([0.1, 0.4, 1.5, 0.2], noise=0.001), path)
    assert run_guarded(command, ["recommend", str(path), "--frontier"], "quant-fairness") == 0
    printed = capsys.readouterr().out
    assert "2 of 5 evaluated plans are worth their bytes" in printed
    assert "protect 2" in printed
    assert "protect 1" not in printed
    assert run_guarded(command, ["recommend", str(path), "--frontier", "--json"], "quant-fairness") == 0
    document = json.loads(capsys.readouterr().out)
    assert [row["plan"] for row in document["rows"] if row["on_frontier"]] == ["none", "protect 2"]


def test_a_plan_that_no_checkpoint_holds_is_said_to_be_simulated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command, path = typer.main.get_command(app), tmp_path / "sweep.json"
    gain = {f"layers.{i}": value for i, value in enumerate([0.1, 0.4, 1.5, 0.2])}
    save(planted_sets({(unit,): value for unit, value in gain.items()}, others={"int5": gain}, noise=0.001), path)
    assert run_guarded(command, ["recommend", str(path), "--max-overhead", "0.08"], "quant-fairness") == 0
    printed = capsys.readouterr()
    assert printed.out == "1:int5,2:int5\n"
    assert "int5 is simulated" in printed.err


def test_a_budget_without_a_sweep_is_planned_by_scores(
    planted_model: Path, planted_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = tmp_path / "plan.json"
    given = ["recommend", "--model", str(planted_model), "--texts", planted_file, "--max-overhead", "0.1"]
    given += ["--time", "1h", "--sentences", "10"]
    assert run_guarded(typer.main.get_command(app), [*given, "-o", str(plan)], "quant-fairness") == 0
    printed = capsys.readouterr()
    assert "2.down:int8" in printed.out.strip().split(",")
    assert "scored by one pass of gradients, 10 sentences a language" in printed.err
    assert "best plan so far: INT8 for " in printed.err
    assert "--time 1h cut nothing" in printed.err
    assert load(ProtectionPlan, plan).overrides["layers.2.down"] == "int8"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--top", "2", "--target", "0.1"], "--top and --target exclude each other"),
        (["--max-size", "9", "--max-overhead", "0.1"], "--max-overhead and --max-size exclude each other"),
        (["--weights", "en=1"], "--weights en=1 count for a budget or a target"),
        (["--top", "2", "--weights", "en=1"], "--weights en=1 count for a budget or a target"),
        (["--max-size", "9999", "--weights", "en=1"], "no weight for he, zh"),
        (["--max-size", "9999", "--time", "10min"], "--time 10min bounds the search for a plan by scores"),
        (["--max-size", "9999", "--sentences", "4"], "--sentences 4 bounds the search for a plan by scores"),
        (["--time", "soon"], "time 'soon' is no duration above 0"),
        (["--limit", "en=0.1"], "--limit en=0.1 counts beside a budget or a target"),
        (["--target-bits", "5", "--max-size", "9MB"], "max_size and target_bits exclude each other"),
        (["--max-size", "9MB", "--bits", "8"], "bits 8 has no effect beside a saved sweep"),
        (["--max-size", "9MB", "--format", "gguf"], "format 'gguf': plans for it are made from scores"),
        (["--max-size", "9MB", "--limit", "sw=0.1"], "limits of sw, which do not count"),
    ],
)
def test_limits_that_do_not_go_together_are_refused(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "sweep.json"
    save(planted_report([0.1, 0.4, 1.5, 0.2], noise=0.001), path)
    assert run_guarded(typer.main.get_command(app), ["recommend", str(path), *options], "quant-fairness") == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err


@pytest.mark.parametrize(("gate", "status"), [("worst=1e-9", 6), ("worst=1000", 0)])
def test_a_gate_decides_the_exit_status_and_the_checkpoint_stays(
    planted_model: Path, planted_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], gate: str, status: int
) -> None:
    out = tmp_path / "out"
    arguments = ["quantize", str(planted_model), "--texts", planted_file, "--method", "rtn", "--protect-layers", "none"]
    arguments += ["--prompts", "none"]  # random weights answer anything
    command = typer.main.get_command(app)
    assert run_guarded(command, [*arguments, "-o", str(out), "--gate", gate], "quant-fairness") == status
    printed = capsys.readouterr()
    assert printed.out.startswith("DO NOT SHIP: " if status else "SHIP: ")
    assert (f"gate {gate} is not passed. DO NOT SHIP" in printed.err) == bool(status)
    assert (out / "quant_fairness.json").is_file()
    again = ["measure", str(out), "--model", str(planted_model), "--texts", planted_file, "--gate", gate, "--json"]
    assert run_guarded(command, again, "quant-fairness") == status
    assert json.loads(capsys.readouterr().out)["kind"] == "measurement"
