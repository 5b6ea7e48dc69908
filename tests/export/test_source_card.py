"""What is taken over from a source's card: only what still holds, whatever the card looks like."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from quant_fairness_plugin.export.companions import find_companions
from quant_fairness_plugin.export.source_card import SourceCard, read_source_card
from quant_fairness_plugin.model.resolve import ModelFiles, resolve_model

Read = Callable[..., SourceCard]


@pytest.fixture
def read(tiny_model: Callable[..., Path], tmp_path: Path) -> Read:
    folder = Path(shutil.copytree(tiny_model("llama"), tmp_path / "source"))

    def build(card: bytes, change: Callable[[ModelFiles], ModelFiles] = lambda files: files) -> SourceCard:
        (folder / "README.md").write_bytes(card)
        files = change(resolve_model(str(folder)))
        return read_source_card(files, find_companions(files.folder, files.weights))

    return build


def test_licence_languages_and_base_are_read(read: Read) -> None:
    card = read(
        b"\xef\xbb\xbf---\r\nlicense: gemma\r\nlanguage: [en, no]\r\nbase_model: google/gemma-2b\r\n"
        b"model-index: [{name: x}]\r\ninference: false\r\ntags: poetry\r\n---\r\n# Mine\r\n"
    )
    assert card == SourceCard(
        base_model="google/gemma-2b",
        languages=["en", "no"],  # Norwegian, not false
        tags=["poetry"],
        kept={"license": "gemma"},
        file="README.source.md",
    )


def test_a_model_of_the_hub_is_its_own_base(read: Read) -> None:
    hub = lambda files: replace(files, name="org/model", revision="0" * 40)  # noqa: E731
    card = read(b"---\nbase_model: google/gemma-2b\nbase_model_relation: finetune\n---\n", hub)
    assert (card.base_model, card.relation) == ("org/model", "quantized")


@pytest.mark.parametrize("base", [b"/home/me/model", b"[]", b"{a: 1}", b"../up/x y"])
def test_a_base_that_is_no_hub_id_is_left_out(read: Read, base: bytes) -> None:
    assert read(b"---\nbase_model: " + base + b"\n---\n").base_model is None


@pytest.mark.parametrize("matter", [b"a: [", b"- a\n- b", b"a: !!python/object:os.system {}", b"\xff\xfe: 1"])
def test_malformed_front_matter_is_said_once_and_stops_nothing(
    read: Read, matter: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    card = read(b"---\n" + matter + b"\n---\n# Mine\n")
    assert (card.kept, card.file) == ({}, "README.source.md")
    [line] = caplog.messages
    assert "README.md: its front matter cannot be read" in line


def test_a_card_without_front_matter_and_no_card_at_all(read: Read, tmp_path: Path) -> None:
    assert read(b"# Mine\n") == SourceCard(file="README.source.md")
    (tmp_path / "source" / "README.md").unlink()
    files = resolve_model(str(tmp_path / "source"))
    assert read_source_card(files, find_companions(files.folder, files.weights)) == SourceCard()
