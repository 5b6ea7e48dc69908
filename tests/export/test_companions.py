"""Which files of a source go along is decided before anything is quantized, by a list of kinds."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from quant_fairness_plugin.config import FairConfig
from quant_fairness_plugin.errors import ArtifactError
from quant_fairness_plugin.export import companions
from quant_fairness_plugin.export.companions import find_companions
from quant_fairness_plugin.preflight import ModelSource, preflight


@pytest.fixture
def source(tiny_model: Callable[..., Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model("llama"), tmp_path / "source"))


def left_out(source: Path) -> dict[str, str]:
    found = find_companions(source, (source / "model.safetensors",))
    assert found.files.keys() == {"generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    return found.left_out


def test_a_licence_that_is_a_link_out_of_the_folder_is_left_out(source: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("not to be copied")
    (source / "LICENSE").symlink_to(tmp_path / "secret")
    (source / "README.md").symlink_to(tmp_path / "secret")
    assert left_out(source) == {"LICENSE, README.md": "a link that leaves the model's folder"}


def test_what_is_no_readable_file_is_left_out(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (source / "LICENSE").mkdir()
    (source / "NOTICE").symlink_to("nothing")
    os.mkfifo(source / "README.md")
    (source / "COPYING").write_bytes(b"x" * 11)
    monkeypatch.setattr(companions, "MAX_TEXT_BYTES", 10)
    expected = {"COPYING": "larger than 10 bytes", "LICENSE": "a folder", "NOTICE": "a link to nothing"}
    assert left_out(source) == expected | {"README.md": "not a regular file"}


def test_a_link_inside_the_folder_is_followed(source: Path) -> None:
    (source / "text").write_text("MIT")
    (source / "LICENSE").symlink_to("text")
    assert find_companions(source, (source / "model.safetensors",)).files["LICENSE"].read_text() == "MIT"


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja", "generation_config.json", "spiece.model"])
@pytest.mark.parametrize("what", ["link", "folder", "fifo"])
def test_a_file_that_loaders_need_is_refused_before_the_work(
    source: Path, tmp_path: Path, name: str, what: str
) -> None:
    (source / name).unlink(missing_ok=True)
    (tmp_path / "outside").write_text("{}")
    if what == "link":
        (source / name).symlink_to(tmp_path / "outside")
    elif what == "folder":
        (source / name).mkdir()
    else:
        os.mkfifo(source / name)
    with pytest.raises(ArtifactError, match=rf"{name}: (a link that leaves|a folder|not a regular file)"):
        preflight(ModelSource(str(source)), FairConfig(), out=tmp_path / "out")


def test_settings_that_are_no_json_are_refused_before_the_work(source: Path, tmp_path: Path) -> None:
    (source / "generation_config.json").write_text("{")
    with pytest.raises(ArtifactError, match=r"generation_config\.json: cannot be read as a JSON object"):
        preflight(ModelSource(str(source)), FairConfig(), out=tmp_path / "out")


def test_code_that_nobody_runs_is_neither_copied_nor_named(source: Path, tmp_path: Path) -> None:
    settings = source / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"auto_map": {"AutoTokenizer": ["a.B", None]}}))
    (source / "a.py").write_text("raise SystemExit")
    found = find_companions(source, (source / "model.safetensors",))
    assert found.left_out == {"a.py": "not a file that loaders or people need"}
    (tmp_path / "out").mkdir()
    found.copy(tmp_path / "out")
    written = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert "auto_map" not in written
    assert written["eos_token"] == "<|endoftext|>"
    running = find_companions(source, (source / "model.safetensors",), runs_code=True)
    assert "a.py" in running.files


def test_everything_left_out_is_said_in_one_line(source: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("hf_quant_config.json", "model.safetensors.orig", "optimizer.pt"):
        (source / name).write_text("{}")
    find_companions(source, (source / "model.safetensors",)).say_what_is_left_out(source)
    [line] = caplog.messages
    assert "not copied into the export: hf_quant_config.json, optimizer.pt (" in line
