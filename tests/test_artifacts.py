from __future__ import annotations

import json
import os
import stat
from dataclasses import replace
from pathlib import Path

import pytest

from quant_fairness_plugin.artifacts import (
    Grid,
    Interval,
    Measurement,
    Precision,
    ProtectionPlan,
    SweepReport,
    Undefined,
    bits_of_precision,
    check_file_place,
    check_place,
    files,
    from_json,
    load,
    precision_of_bits,
    save,
    save_run_record,
    to_json,
)
from quant_fairness_plugin.artifacts.pairs import CheckpointPair
from quant_fairness_plugin.errors import ArtifactError, ConfigError, ResourceError
from tests.planted import planted_report, planted_texts


def plan() -> ProtectionPlan:
    return ProtectionPlan(
        model="m",
        units={"layers.0": "fp16", "layers.1": "int4"},
        grid=Grid(),
        source="explicit",
        reasons=(),
        stable=True,
        predicted=True,
        extra_bytes=10,
        overhead=0.5,
    )


def test_the_schema_version_comes_first() -> None:
    assert next(iter(json.loads(to_json(plan())))) == "schema_version"


def test_a_sweep_report_survives_the_round_trip() -> None:
    report = planted_report([0.5, 1.0])
    assert from_json(SweepReport, to_json(report), "here") == report


def planted_measurement() -> Measurement:
    report = planted_report([0.5, 1.0])
    damage = report.rows[0].damage[0]
    return Measurement(
        provenance=report.provenance,
        state="s",
        part="confirm",
        reference=None,
        languages=(damage,),
        worst_kl=Interval(1.0, 0.5, 1.5),
        mean_kl=Undefined("because"),
        mean_delta_bpb=Undefined("because"),
    )


def test_undefined_and_interval_stay_what_they_are() -> None:
    measurement = planted_measurement()
    assert from_json(Measurement, to_json(measurement), "here") == measurement


def test_a_pair_is_about_the_same_languages() -> None:
    one = planted_measurement()
    pair = CheckpointPair(first=one, second=one, differences={}, worst=Undefined("because"), mean=Undefined("because"))
    assert from_json(CheckpointPair, to_json(pair), "here") == pair
    unlike = replace(pair, second=replace(one, languages=()))
    with pytest.raises(ArtifactError, match="not about the same languages"):
        from_json(CheckpointPair, to_json(unlike), "here")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_json_cannot_hold_is_refused(value: float) -> None:
    bad = ProtectionPlan(
        model="m",
        units={},
        grid=Grid(),
        source="explicit",
        reasons=(),
        stable=True,
        predicted=True,
        extra_bytes=0,
        overhead=value,
    )
    with pytest.raises(ValueError, match="not JSON compliant"):
        to_json(bad)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "expected a ProtectionPlan"),
        ("{}", "model: Field required"),
        (to_json(plan()).replace('"plan"', '"sweep"'), "kind: Input should be 'plan'"),
        (to_json(plan()).replace('"schema_version": 1', '"schema_version": 2'), "schema_version: Input should be 1"),
        (to_json(plan()).replace('"model"', '"colour": 1, "model"'), "colour: "),
    ],
)
def test_a_document_that_does_not_fit_names_the_field(text: str, message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        from_json(ProtectionPlan, text, "here")


def test_a_missing_file_is_an_artifact_error(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"none\.json: cannot be read"):
        load(ProtectionPlan, tmp_path / "none.json")


def test_saving_honours_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        save(plan(), tmp_path / "plan.json")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "plan.json").stat().st_mode) == 0o640


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plan.json"
    save(plan(), path)
    before = path.read_bytes()

    def fail(handle: int) -> None:
        raise OSError(28, "disk full")

    monkeypatch.setattr(files.os, "fsync", fail)
    with pytest.raises(OSError, match=r"disk full.*plan\.json"):
        save(plan(), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_what_differs_between_runs_goes_beside(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    save_run_record(path, seconds=1.25, device="cpu", argv=["quant-fairness", "sweep"])
    record = json.loads((tmp_path / "plan.run.json").read_text(encoding="utf-8"))
    assert record["seconds"] == 1.25
    assert record["argv"] == ["quant-fairness", "sweep"]


def test_parts_are_disjoint_and_small_sets_serve_as_each() -> None:
    texts = planted_texts()
    assert len(texts.part("search")) == len(texts)
    assert len(texts.part("confirm")) == 0
    assert len(texts.part("all")) == len(texts)
    chosen = texts.choose(["he"])
    assert chosen.languages == ("he",)
    assert chosen.sentences["he"] == texts.sentences["he"]


def test_a_plan_tells_whole_layers_from_units_and_other_widths() -> None:
    units: dict[str, Precision] = {
        "layers.0": "fp16", "layers.1": "int4", "layers.2": "int8", "layers.1.down": "fp16", "layers.2.qkv": "int4",
    }  # fmt: skip
    mixed = replace(plan(), units=units)
    assert mixed.layers == 3
    assert mixed.protected_layers == (0,)
    assert mixed.overrides == {"layers.2": "int8", "layers.1.down": "fp16", "layers.2.qkv": "int4"}
    assert mixed.overrides_in(2) == {"qkv": "int4"}
    assert mixed.quantized_precision == "int4"
    assert from_json(ProtectionPlan, to_json(mixed), "here") == mixed
    assert plan().overrides == {}


def test_bit_widths_and_precisions_are_names_of_each_other() -> None:
    assert [bits_of_precision(precision_of_bits(bits)) for bits in (2, 3, 4, 5, 6, 8, 16)] == [2, 3, 4, 5, 6, 8, 16]
    with pytest.raises(ConfigError, match="7 bits have no name in a plan"):
        precision_of_bits(7)


def test_a_sweep_of_an_older_version_must_be_made_again(tmp_path: Path) -> None:
    document = json.loads(to_json(planted_report([0.1, 0.2, 0.3])))
    old = {name: value for name, value in document.items() if name not in ("precisions", "interactions", "necessity")}
    (tmp_path / "old.json").write_text(json.dumps(old | {"schema_version": 2}), encoding="utf-8")
    with pytest.raises(ArtifactError, match="schema_version: Input should be 3; expected a SweepReport.*Make it again"):
        load(SweepReport, tmp_path / "old.json")


@pytest.mark.parametrize(
    ("name", "kind", "said"),
    [
        ("file/out", ConfigError, "file is no folder"),
        ("file/more/out", ConfigError, "file is no folder"),
        ("x" * 250, ResourceError, "the name has 250 bytes"),
        ("new/" + "x" * 300 + "/out", ResourceError, r"cannot be written"),
        ("/proc/new/out", ResourceError, "/proc takes no new files"),
        ("/", ConfigError, "names no file or folder"),
    ],
)
def test_a_place_that_cannot_be_written_is_refused_and_nothing_is_made(
    name: str, kind: type[Exception], said: str, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("x")
    for check in (check_place, check_file_place):
        with pytest.raises(kind, match=said):
            check(tmp_path / name)
    check_file_place(tmp_path / "new" / "deeper" / "out.json")
    check_place(tmp_path / "new" / "out")
    with pytest.raises(ConfigError, match="is a folder, and a file is to be written"):
        check_file_place(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
