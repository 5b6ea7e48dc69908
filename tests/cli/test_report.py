"""`report` reads what other commands saved; `run` and `quantize` put the page into the record of what they write."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import typer

from quant_fairness_plugin.artifacts import RECORD_NAME, ExportRecord, load, save
from quant_fairness_plugin.checkpoint.folder import check_recorded_files
from quant_fairness_plugin.cli.main import app, run_guarded
from quant_fairness_plugin.report import drawing
from tests.planted import planted_report
from tests.report.samples import measured, record


def run(*arguments: str | Path) -> int:
    return run_guarded(typer.main.get_command(app), [*map(str, arguments)], "quant-fairness")


def test_run_writes_a_page_with_before_and_after_that_its_record_lists(
    planted_model: Path, planted_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    options = ["--texts", planted_file, "--group-size", "32", "--protect-layers", "1", "--method", "rtn"]
    assert run("run", "--model", planted_model, *options, "-o", out) == 0
    assert "report.html" not in capsys.readouterr().err
    written = load(ExportRecord, out / RECORD_NAME)
    assert "report.html" in written.files
    check_recorded_files(out, written)
    html = (out / "report.html").read_text(encoding="utf-8")
    assert "without protection" in html
    assert " before, " in html

    elsewhere = tmp_path / "again.html"
    assert run("report", out, "-o", elsewhere) == 0
    assert elsewhere.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert run("report", out, "-o", out / "again.html") == 2
    assert "lies in a checkpoint folder" in capsys.readouterr().err
    check_recorded_files(out, written)


def test_a_gate_is_that_of_the_option(tmp_path: Path) -> None:
    save(record(measured(en=0.1)), tmp_path / "record.json")
    page = tmp_path / "page.html"
    assert run("report", tmp_path / "record.json", "-o", page, "--gate", "worst=0.01") == 0
    assert "<title>m: DO NOT SHIP</title>" in page.read_text(encoding="utf-8")


def test_a_missing_package_is_said_in_one_line_and_costs_no_result(
    planted_model: Path,
    planted_file: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(drawing._PACKAGES, "no_such_module", "no-such-package")
    options = ["--texts", planted_file, "--group-size", "32", "--protect-layers", "none", "--method", "rtn"]
    assert run("quantize", planted_model, *options, "-o", tmp_path / "out") == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "report.html" in line]
    assert said == [
        'no report.html was written: a report needs no-such-package; install: pip install "quant-fairness[report]"'
    ]
    check_recorded_files(tmp_path / "out", load(ExportRecord, tmp_path / "out" / RECORD_NAME))
    assert run("report", tmp_path / "out", "-o", tmp_path / "page.html") == 2
    assert not (tmp_path / "page.html").exists()


def test_a_drawing_that_fails_costs_no_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from quant_fairness_plugin.cli.report import write_report
    from quant_fairness_plugin.config import FairConfig
    from quant_fairness_plugin.report import page

    def fail(*_: object, **__: object) -> str:
        raise RuntimeError("no\nengine")

    monkeypatch.setattr(page, "render_report", fail)
    write_report(tmp_path / "sweep.html", [planted_report([1.0, 0.5])], FairConfig())
    assert capsys.readouterr().err == (
        "no sweep.html was written (RuntimeError: no engine); try quant-fairness report\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_artifact_and_no_place_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("report", tmp_path / "missing.json") == 5
    save(measured(en=0.1), tmp_path / "m.json")
    assert run("report", tmp_path / "m.json", "-o", tmp_path) == 2
    assert "is a folder; name the file to write" in capsys.readouterr().err


def test_without_the_extra_a_result_is_kept_and_a_line_says_what_is_missing(tmp_path: Path) -> None:
    """In a process of its own, in which nothing has imported Altair before."""
    code = (
        "import sys\nsys.modules['altair'] = None\nfrom pathlib import Path\n"
        "from quant_fairness_plugin.cli.report import write_report\n"
        "from quant_fairness_plugin.config import FairConfig\n"
        "write_report(Path('page.html'), [], FairConfig())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == (
        'no page.html was written: a report needs altair; install: pip install "quant-fairness[report]"\n'
    )
    assert list(tmp_path.iterdir()) == []
