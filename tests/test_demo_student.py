"""The student begins as every second layer of its teacher, and a step brings it closer; two steps write a folder."""

from __future__ import annotations

import json
import lzma
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from tests.test_pages import ROOT
from tests.tiny import write_tiny_model

VERSES, CHAPTERS = 4, 20
"""Of each split and language: as many chapters as leave a language with the smallest share one."""


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import train_demo_student

    return train_demo_student


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tiny_model(tmp_path / "teacher", "llama", layers=4)
    return tmp_path / "teacher"


@pytest.fixture
def teacher(folder: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def write_corpus(data: Path, codes: list[str]) -> None:
    """A corpus of every language that the mixture asks for, as the script reads it."""
    ids = [
        f"{split}.{chapter}.{verse}"
        for split in ("train", "dev", "test")
        for chapter in range(CHAPTERS)
        for verse in range(VERSES)
    ]
    lines = ["verse_id\tsplit", *(f"{name}\t{name.split('.')[0]}" for name in ids)]
    (data / "bible").mkdir(parents=True)
    (data / "splits.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for code in codes:
        with lzma.open(data / "bible" / f"{code}.tsv.xz", "wt", encoding="utf-8") as file:
            file.writelines(f"{name}\t{code} says {name} again\n" for name in ids)


def test_a_student_begins_as_every_second_layer(script: ModuleType, teacher: LlamaForCausalLM) -> None:
    student = script.half_of(teacher)
    assert (student.config.num_hidden_layers, teacher.config.num_hidden_layers) == (2, 4)
    theirs = teacher.state_dict()
    for name, value in student.state_dict().items():
        source = name.replace("layers.1.", "layers.2.")
        assert torch.equal(value, theirs[source]), name
        assert value.data_ptr() != theirs[source].data_ptr(), name


def test_the_loss_is_the_divergence_and_a_step_lowers_it(script: ModuleType, teacher: LlamaForCausalLM) -> None:
    loss_of, ids = script.divergence_from(teacher), torch.arange(1, 33).reshape(2, 16)
    assert float(loss_of(teacher, ids).detach()) == pytest.approx(0, abs=1e-6)
    student = script.half_of(teacher)
    before = loss_of(student, ids)
    with torch.no_grad():
        wanted, found = (model(input_ids=ids).logits.softmax(-1) for model in (teacher, student))
    assert float(before.detach()) == pytest.approx(float((wanted * (wanted / found).log()).sum(-1).mean()), rel=1e-4)
    before.backward()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter -= 1e-3 * parameter.grad / parameter.grad.norm()
    assert float(loss_of(student, ids).detach()) < float(before.detach())


def test_two_steps_write_a_folder_that_says_how_it_was_made(script: ModuleType, folder: Path, tmp_path: Path) -> None:
    from demo_corpus import MIXTURE

    write_corpus(tmp_path / "data", list(MIXTURE))
    out = tmp_path / "student"
    places = ["--teacher", str(folder), "--data", str(tmp_path / "data"), "--out", str(out)]
    script.main([*places, "--epochs", "0.04", "--batch", "4", "--window", "32"])
    record = json.loads((out / "training.json").read_text(encoding="utf-8"))
    assert (record["steps"], record["tokens"], record["layers"]) == (2, 256, 2)
    assert record["teacher"] == {"name": "teacher", "layers": 4}
    assert record["command"].startswith("python examples/train_demo_student.py --data CORPUS --out student")
    assert str(tmp_path) not in json.dumps(record)
    assert record["held_out"].keys() == {tag for tag, _ in MIXTURE.values()}
    written = AutoModelForCausalLM.from_pretrained(out)
    assert (written.config.num_hidden_layers, written.dtype) == (2, torch.float16)
    assert not list(tmp_path.glob("*.state.pt"))
