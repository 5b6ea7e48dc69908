"""Artifacts are told apart by their kind, and what does not belong together is refused in one line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from quant_fairness_plugin.artifacts import RECORD_NAME, AnalysisAnswer, save
from quant_fairness_plugin.errors import ArtifactError, ConfigError
from quant_fairness_plugin.report.sources import Sources, read_sources
from tests.report.samples import PLAN, evidence, measured, record


def test_a_folder_and_files_of_each_kind_are_read(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    after, before = measured(en=0.1), measured("none", en=0.2)
    save(record(after), folder / RECORD_NAME)
    save(before, tmp_path / "before.json")
    save(evidence(), tmp_path / "evidence.json")
    sources = read_sources([folder, tmp_path / "before.json", tmp_path / "evidence.json"])
    assert sources.record == record(after)
    assert (sources.measurement, sources.before) == (after, before)
    assert sources.evidence == evidence()
    assert sources.plan == PLAN
    assert read_sources([folder / RECORD_NAME]).record == record(after)


def test_a_measurement_that_is_given_is_taken_before_the_records_own() -> None:
    other = measured(en=0.7)
    assert Sources.of([record(measured(en=0.1)), other]).measurement == other


def test_what_the_record_knows_of_the_model_without_protection_goes_with_its_own_measurement_alone() -> None:
    made = replace(record(measured(en=0.1)), unprotected=measured("none", en=0.3))
    assert Sources.of([made]).before == made.unprotected
    assert Sources.of([made, measured(en=0.2)]).before is None  # on other sentences, perhaps
    assert Sources.of([made, measured("none", en=0.4)]).before == measured("none", en=0.4)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"kind": "frontier"}', '{"kind": ["plan"]}', '{"kind": "plan"}'])
def test_other_files_are_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.write_text(content)
    with pytest.raises(ArtifactError, match=r"file\.json: "):
        read_sources([path])


def test_missing_files_and_folders_without_a_record_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(ArtifactError, match="cannot be read"):
            read_sources([path])


def test_what_does_not_belong_together_is_refused() -> None:
    with pytest.raises(ConfigError, match="nothing to report on"):
        Sources.of([])
    with pytest.raises(ConfigError, match="two artifacts are a measurement"):
        Sources.of([measured(en=0.1), measured(en=0.2)])
    other = replace(evidence(), provenance=replace(evidence().provenance, model="n", model_sha256="2"))
    with pytest.raises(ConfigError, match=r"2 models \(m, n\)"):
        Sources.of([measured(en=0.1), other])
    with pytest.raises(ConfigError, match="the plan is for other"):
        Sources.of([measured(en=0.1), replace(PLAN, model="other")])
    with pytest.raises(ConfigError, match="16-bit model alone"):
        Sources.of([measured("16 bit", en=0.1)])


def test_an_answer_about_several_models_goes_with_any() -> None:
    about = AnalysisAnswer(analysis="depth", provenance={"versions": {}}, result={"pairs": []})
    sources = Sources.of([measured(en=0.1), about])
    assert sources.analyses == (about,)
    assert sources.model == measured(en=0.1).provenance.model
    assert Sources.of([about]).model == "several models"
