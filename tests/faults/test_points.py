"""The quick part of the loop: what writes one file or one folder, at every point; and that the loop finds what it must.

`make test-faults` runs it over whole commands.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from quant_fairness_plugin.artifacts import temporary_folder, write_atomically
from quant_fairness_plugin.errors import ResourceError
from quant_fairness_plugin.export.staging import MARKER, scratch_folder, staged_folder
from tests.faults.points import Points, full_disk, io_error, watched

NOBODY = 65534
OLD, NEW = b"old " * 5000, b"new " * 5000
Write = Callable[[Path], None]


def write_file(root: Path) -> None:
    write_atomically(root / "result", NEW)


def write_in_place(root: Path) -> None:
    (root / "result").write_bytes(NEW)


def write_folder(root: Path) -> None:
    with staged_folder(root / "out", overwrite=True) as folder:
        (folder / MARKER).write_bytes(NEW)
        save_file({"weight": torch.ones(100)}, folder / "model.safetensors")


def write_folder_in_place(root: Path) -> None:
    shutil.rmtree(root / "out", ignore_errors=True)
    (root / "out").mkdir(exist_ok=True)
    (root / "out" / MARKER).write_bytes(NEW)


def use_scratch(root: Path) -> None:
    with scratch_folder(root / "out") as folder, temporary_folder(root, "tmp-") as temporary:
        (folder / "copy").write_bytes(NEW)
        (temporary / "states").write_bytes(NEW)


def start(root: Path) -> None:
    (root / "out").mkdir(parents=True)
    (root / "out" / MARKER).write_bytes(OLD)
    (root / "result").write_bytes(OLD)


def tree(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def wrong(write: Write, place: Path) -> list[str]:
    """Find points after which something is wrong: at once, or after the next run."""
    start(place / "whole")
    points = Points(place / "whole", copies=place / "copies")
    with watched(points):
        write(place / "whole")
    before, after = {"result": OLD, f"out/{MARKER}": OLD}, tree(place / "whole")
    found = []
    for number, name in enumerate(points.seen, start=1):
        for action in (io_error, full_disk):
            root = place / f"{action.__name__}-{number}"
            start(root)
            with watched(Points(root, number, action)):
                try:
                    write(root)
                except Exception:  # noqa: BLE001 - of which kind it is, other tests say
                    found += [f"{action.__name__} at {name}"] if tree(root) not in (before, after) else []
            if not name.startswith(("unlink", "rmdir")):  # which leave what cannot be removed, for the next run
                found += (
                    [f"{action.__name__} at {name} leaves things"] if set(os.listdir(root)) - {"out", "result"} else []
                )
            _again(write, root, after, found, f"{action.__name__} at {name}")
        killed = place / "copies" / str(number)
        names = {path: content for path, content in tree(killed).items() if path in before | after}
        if names not in (before, after) and not any("old-" in path for path in tree(killed)):
            found.append(f"kill at {name}")
        _again(write, killed, after, found, f"kill at {name}")
    return found


def _again(write: Write, root: Path, after: dict[str, bytes], found: list[str], what: str) -> None:
    write(root)
    if tree(root) != after or set(os.listdir(root)) != {"out", "result"}:
        found.append(f"the next run after {what}")


@pytest.mark.parametrize("write", [write_file, write_folder, use_scratch])
def test_whatever_happens_the_old_or_the_new_is_there_and_the_next_run_puts_all_right(
    write: Write, tmp_path: Path
) -> None:
    assert wrong(write, tmp_path.resolve()) == []


@pytest.mark.parametrize("write", [write_in_place, write_folder_in_place])
def test_writing_over_the_old_one_is_found(write: Write, tmp_path: Path) -> None:
    found = wrong(write, tmp_path.resolve())
    assert any(line.startswith("kill at write") for line in found)
    assert any(line.startswith("io_error at write") for line in found)


def test_a_writer_that_leaves_what_killed_ones_left_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quant_fairness_plugin.artifacts.files.remove_leftovers", lambda folder, prefix: None)
    assert any(line.startswith("the next run after kill at write") for line in wrong(write_file, tmp_path.resolve()))


@pytest.mark.parametrize("write", [write_file, write_folder, use_scratch])
def test_a_folder_that_may_not_be_written_is_left_alone(write: Write, tmp_path: Path) -> None:
    root = tmp_path / "root"
    start(root)
    for folder in (root, *root.parents):
        if folder.owner() == Path.home().owner() and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o055)
    root.chmod(0o555)
    child = os.fork()
    if child == 0:
        if os.geteuid() == 0:  # who may write everywhere
            os.setuid(NOBODY)
        try:
            write(root)
        except (PermissionError, ResourceError):
            os._exit(4)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 4
    root.chmod(0o755)
    assert tree(root) == {"result": OLD, f"out/{MARKER}": OLD}


def test_every_way_to_write_is_counted_and_torn(tmp_path: Path) -> None:
    root = tmp_path.resolve() / "root"
    root.mkdir()
    (tmp_path / "source").write_bytes(NEW)
    points = Points(root, copies=tmp_path.resolve() / "copies")
    with watched(points):
        (root / "text").write_text("12345678")
        shutil.copyfile(tmp_path / "source", root / "copied")
        save_file({"weight": torch.ones(100)}, root / "model")
        os.rename(root / "text", root / "renamed")
        (tmp_path / "outside").write_text("not counted")
    assert points.seen[:3] == ["create text", "write text", "create copied"]
    assert points.seen[-2:] == ["write model", "rename text"]
    torn = {name: number for number, name in enumerate(points.seen, start=1)}
    copies = tmp_path / "copies"
    assert (copies / str(torn["write text"]) / "text").read_text() == "1234"
    assert 0 < (copies / str(torn["write model"]) / "model").stat().st_size < (root / "model").stat().st_size
    assert tree(root)["copied"] == NEW
