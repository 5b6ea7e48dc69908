from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError

from quant_fairness_plugin.errors import (
    ConfigError,
    ExternalServiceError,
    QuantFairnessError,
)
from quant_fairness_plugin.model.resolve import resolve_model
from tests.hub_http import HTTP
from tests.model.checkpoints import refused

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cached(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`org/tiny` as the Hub's client caches it: blobs, and a snapshot of links to them."""
    repository = tmp_path / "hub" / "models--org--tiny"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    for file in folder.iterdir():
        file.rename(repository / "blobs" / file.name)
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return snapshot


def test_a_cached_hub_model_resolves_without_a_network(cached: Path) -> None:
    files = resolve_model("org/tiny")
    assert (files.name, files.folder, files.revision) == ("org/tiny", cached, COMMIT)
    assert resolve_model(str(cached)).weights == files.weights


def test_a_cached_snapshot_may_not_link_out_of_its_repository(cached: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    (cached / "model.safetensors").resolve().rename(outside)
    (cached / "model.safetensors").unlink()
    (cached / "model.safetensors").symlink_to(outside)
    assert "a link that leaves the model's folder" in refused("org/tiny")


@pytest.mark.usefixtures("cached")
def test_an_unreachable_hub_is_an_external_error_that_names_the_alternatives() -> None:
    text = refused("org/absent")
    assert text.startswith("ExternalServiceError: org/absent: not in the local Hub cache")
    assert "a bundled model (demo, demo-gpt2)" in text
    assert "not in the local Hub cache" in refused("gpt3")


def test_code_from_the_hub_needs_a_commit(cached: Path) -> None:
    for revision in (None, "main", COMMIT[:12]):
        text = refused("org/tiny", trust_remote_code=True, revision=revision)
        assert text.startswith(f"ConfigError: revision {revision!r} does not pin the code")
    assert resolve_model("org/tiny", trust_remote_code=True, revision=COMMIT).folder == cached


def _http_error(kind: str) -> Exception:
    from huggingface_hub import errors

    response = HTTP.Response(500, request=HTTP.Request("GET", "https://huggingface.co"))
    if kind == "ConnectError":
        return HTTP.ConnectError("refused")  # type: ignore[no-any-return]
    if kind == "OSError":
        return OSError(28, "No space left on device")
    return getattr(errors, kind)("server\nsaid no", response=response)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("kind", "expected", "text"),
    [
        ("RepositoryNotFoundError", ConfigError, r"no such repository.*or it is private.*a bundled model \(demo"),
        ("RevisionNotFoundError", ConfigError, "no such revision 'v9' of the repository"),
        ("GatedRepoError", ExternalServiceError, r"accepted its terms\..*hf auth login"),
        ("HfHubHTTPError", ExternalServiceError, r"did not answer \(server said no\)\. Accepted are"),
        ("ConnectError", ExternalServiceError, r"did not answer \(refused\)"),
        ("OSError", ExternalServiceError, "No space left on device"),
    ],
)
def test_each_failure_of_the_hub_is_told_apart(
    kind: str, expected: type[QuantFairnessError], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, local_files_only: bool = False, **__: object) -> str:
        raise LocalEntryNotFoundError("not cached") if local_files_only else _http_error(kind)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(expected, match=text) as caught:
        resolve_model("org/tiny", revision="v9")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["HfHubHTTPError", "ConnectError"])
def test_a_hub_that_fails_is_replaced_by_its_cache_and_that_is_said(
    kind: str, cached: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail_online(*args: Any, local_files_only: bool = False, **options: Any) -> str:
        if not local_files_only:
            raise _http_error(kind)
        return str(snapshot_download(*args, local_files_only=True, **options))

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail_online)
    assert resolve_model("org/tiny").folder == cached
    assert f"using the cached revision {COMMIT}" in caplog.text


def test_pickles_and_code_are_downloaded_only_where_allowed(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    asked: list[set[str]] = []

    def record(_: str, *, allow_patterns: list[str], **__: object) -> str:
        asked.append(set(allow_patterns))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", record)
    resolve_model("org/tiny")
    resolve_model("org/tiny", allow_pickle=True)
    resolve_model("org/tiny", trust_remote_code=True, revision=COMMIT)
    assert asked[1] - asked[0] == {"pytorch_model*.bin"}
    assert asked[2] - asked[0] == {"*.py"}
