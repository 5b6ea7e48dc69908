"""A whole run on a hostile model folder, offline: no code of it runs, no socket is opened, no secret is written."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import pytest

from quant_fairness_plugin.model.resolve import resolve_model
from tests.security.hostile import make_hostile

ROOT = Path(__file__).parents[2]
TOKEN = "hf_DoNotWriteThisAnywhere"
SECRET = "xylophone-quagmire-7431"


@dataclass(frozen=True)
class Ran:
    """What a run on the hostile folder left behind."""

    model: Path
    mark: Path
    out: Path
    said: str
    seen: dict[str, Any]


def run(folder: Path, *commands: list[str | Path]) -> tuple[str, dict[str, Any]]:
    """Run commands where every socket is denied; return what they said and what was seen."""
    lines = [list(map(str, command)) for command in commands]
    offline = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
    settings = {name: value for name, value in os.environ.items() if name not in offline}
    settings |= {"HF_TOKEN": TOKEN, "HF_HOME": str(folder / "hub"), "PYTHONPATH": str(ROOT)}
    seen = folder / "seen.json"
    done = subprocess.run(
        [sys.executable, "-m", "tests.security.watched", str(seen), json.dumps(lines)],
        capture_output=True, text=True, env=settings, cwd=folder, check=True,
    )  # fmt: skip
    return done.stdout + done.stderr, json.loads(seen.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def ran(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Ran:
    folder = tmp_path_factory.mktemp("hostile")
    model, mark, out = folder / "model", folder / "mark", folder / "out"
    make_hostile(tiny_model("llama", width=64), model, mark)
    rows = [{"en": f"The {SECRET} of day {i}.", "he": f"{SECRET}: היום {i}."} for i in range(24)]
    texts = folder / "texts.jsonl"
    texts.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    said, seen = run(
        folder,
        ["plan", "--model", model, "--texts", texts, "--offline"],
        ["quantize", model, "--protect-layers", "0", "--texts", texts, "--draws", "100", "--offline", "-o", out],
        ["verify", out, "--reader", "transformers"],
        ["report", out, "-o", folder / "page.html"],
        ["generate", out, "--prompt", "a", "--max-new-tokens", "2", "--kernel", "reference"],
    )
    return Ran(model, mark, out, said, seen)


def test_the_commands_did_their_work(ran: Ran) -> None:
    assert ran.seen["statuses"] == [0] * 5, ran.said
    assert "names code (auto_map), which is not run" in ran.said


def test_no_code_of_the_folder_was_run(ran: Ran) -> None:
    assert not ran.mark.exists()
    assert [path.name for path in ran.out.rglob("*") if path.suffix in (".py", ".bin", ".pt")] == []
    exported = json.loads((ran.out / "config.json").read_text(encoding="utf-8"))
    assert not {"auto_map", "model_file"} & exported.keys()


def test_the_traps_are_live(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    model = make_hostile(tiny_model("llama", width=64), tmp_path / "model", mark)

    def sprung() -> bool:
        found = mark.exists()
        mark.unlink(missing_ok=True)
        return found

    subprocess.run([sys.executable, str(model / "modeling_trap.py")], check=True)
    assert sprung()
    pickle.loads((model / "pytorch_model.bin").read_bytes())
    assert sprung()
    jinja2.Template((model / "chat_template.jinja").read_text(encoding="utf-8")).render()
    assert sprung()
    assert resolve_model(str(model), trust_remote_code=True).runs_code
    assert not sprung()


def test_no_socket_was_asked_for(ran: Ran) -> None:
    assert ran.seen["events"] == []


def test_without_offline_a_socket_would_have_been_seen(tmp_path: Path) -> None:
    said, seen = run(tmp_path, ["plan", "--model", "org/model"], ["plan", "--model", "org/model", "--offline"])
    assert seen["statuses"] == [7, 7], said
    assert seen["events"] != []
    assert said.count("not in the local Hub cache") == 2
    _, alone = run(tmp_path, ["plan", "--model", "org/model", "--offline"])
    assert alone["events"] == []


def test_neither_the_token_nor_the_texts_are_written_or_said(ran: Ran) -> None:
    written = [path for path in ran.out.parent.rglob("*") if path.is_file() and ran.model not in path.parents]
    assert len(written) > 8
    texts = ran.out.parent / "texts.jsonl"
    for path in written:
        content = path.read_bytes()
        assert TOKEN.encode() not in content, path
        assert (SECRET.encode() in content) == (path == texts), path
    assert TOKEN not in ran.said
    assert SECRET not in ran.said
