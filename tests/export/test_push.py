"""An export is uploaded whole, verified and alone, to a fake Hub on this machine; failures are one line."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from quant_fairness_plugin.errors import ArtifactError, ConfigError, ExternalServiceError
from quant_fairness_plugin.export.push import push_folder
from tests.export.conftest import Exported
from tests.export.fake_hub import COMMIT, FakeHub, fake_hub

# huggingface_hub 1.x hands a file to httpx in a way that httpx deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")
TOKEN = "hf_secretSECRETsecret"
REPOSITORY = "tester/tiny-int4-fair"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with fake_hub() as server:
        _use(monkeypatch, server.url)
        yield server


def _use(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """As HF_ENDPOINT, HF_HUB_OFFLINE=0 and HF_HUB_DISABLE_XET=1 in a new process; Xet has no plain HTTP server."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "hf_ofThisMachine")


def test_all_files_of_the_record_come_in_one_commit_and_nothing_else(
    damaged: Exported, hub: FakeHub, caplog: pytest.LogCaptureFixture
) -> None:
    folder = damaged()
    (folder / ".cache").mkdir()
    (folder / ".cache" / "secret").write_text("not to be uploaded")
    with caplog.at_level(logging.DEBUG):
        url = push_folder(folder, REPOSITORY, token=TOKEN)
    assert url == f"{hub.url}/{REPOSITORY}/commit/{COMMIT}"
    [commit] = hub.commits
    visible = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert commit["files"] == visible
    assert commit["branch"] == "main"
    assert commit["message"].startswith("rtn int4 g32")
    assert hub.repositories == {REPOSITORY: "private"}
    assert hub.tokens == {TOKEN, None}  # None: the URL of a large file is signed, and needs no token
    assert TOKEN not in caplog.text
    assert all(TOKEN.encode() not in content for content in visible.values())


def test_branch_visibility_and_message_are_as_given(exported: Exported, hub: FakeHub) -> None:
    push_folder(exported(), REPOSITORY, private=False, revision="int4", commit_message="Second try")
    push_folder(exported(), REPOSITORY, private=True, revision="int4")
    assert hub.repositories == {REPOSITORY: "public"}  # one that exists stays as it is
    assert hub.branches == {(REPOSITORY, "int4")}
    assert [commit["branch"] for commit in hub.commits] == ["int4", "int4"]
    assert hub.commits[0]["message"] == "Second try"
    assert hub.tokens == {"hf_ofThisMachine", None}


def add_file(folder: Path) -> None:
    (folder / "notes.txt").write_text("more")


def alter_config(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rope_theta": 1.0}))


def drop_record(folder: Path) -> None:
    (folder / "quant_fairness.json").unlink()


def break_rules_and_record_it(folder: Path) -> None:
    """Change what loaders read, and make the checksums fit: only verification itself can see it."""
    from dataclasses import replace

    from quant_fairness_plugin.artifacts import save
    from quant_fairness_plugin.checkpoint.folder import file_record, load_record

    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["ignore"] = []
    (folder / "config.json").write_text(json.dumps(config))
    record = load_record(folder)
    files = record.files | {"config.json": file_record(folder / "config.json")}
    save(replace(record, files=files), folder / "quant_fairness.json")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (add_file, "not in the record: notes.txt"),
        (alter_config, r"config\.json has \d+ bytes, recorded are"),
        (drop_record, "has no quant_fairness.json"),
        (break_rules_and_record_it, "ignore"),
    ],
)
def test_a_folder_that_changed_or_does_not_verify_is_not_uploaded(
    damaged: Exported, hub: FakeHub, damage: object, message: str
) -> None:
    folder = damaged()
    assert callable(damage)
    damage(folder)
    with pytest.raises(ArtifactError, match=message):
        push_folder(folder, REPOSITORY, token=TOKEN)
    assert (hub.repositories, hub.commits) == ({}, [])


@pytest.mark.parametrize(
    ("path", "status", "message"),
    [
        ("/api/repos/create", 403, "403 Forbidden.*hf auth login"),
        ("/commit/", 403, "403 Forbidden.*hf auth login"),
        ("/preupload/", 401, "401"),
        ("/commit/", 500, "500"),
        ("/stored/", 403, "model.safetensors.*403"),
    ],
)
def test_a_refusal_of_the_hub_is_one_line_without_the_token(
    exported: Exported, hub: FakeHub, path: str, status: int, message: str
) -> None:
    hub.refused[path] = status
    with pytest.raises(ExternalServiceError, match=message) as caught:
        push_folder(exported(), REPOSITORY, token=TOKEN)
    assert "\n" not in str(caught.value)
    assert TOKEN not in str(caught.value)
    assert hub.commits == []


def test_a_hub_that_is_not_there_is_one_line(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_hub() as server:
        url = server.url
    _use(monkeypatch, url)  # its port is closed now
    with pytest.raises(ExternalServiceError, match=f"not uploaded to {REPOSITORY}: .*refused") as caught:
        push_folder(exported(), REPOSITORY, token=TOKEN)
    assert "\n" not in str(caught.value)


def test_offline_mode_says_so(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ExternalServiceError, match="HF_HUB_OFFLINE"):
        push_folder(exported(), REPOSITORY, token=TOKEN)


@pytest.mark.parametrize("name", ["", "a/b/c", "white space", "../up"])
def test_a_name_that_no_repository_has_is_a_usage_error(exported: Exported, hub: FakeHub, name: str) -> None:
    with pytest.raises(ConfigError, match="cannot be the name of a repository"):
        push_folder(exported(), name, token=TOKEN)
    assert hub.repositories == {}
