"""Atomic folders: after any failure or kill there is nothing, or the old folder, or the complete new one."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from quant_fairness_plugin.errors import ConfigError, ResourceError
from quant_fairness_plugin.export.staging import MARKER, staged_folder

CALLS = ("fsync", "replace", "rename")


def write(out: Path, content: str, *, overwrite: bool = False) -> None:
    with staged_folder(out, overwrite=overwrite) as folder:
        (folder / MARKER).write_text(content)
        (folder / "sub").mkdir()
        (folder / "sub" / "weights").write_text(content)


def content_of(out: Path) -> str | None:
    """The content of a complete folder, None where there is none; a half-written folder fails."""
    if not out.exists():
        return None
    text = (out / MARKER).read_text()
    assert (out / "sub" / "weights").read_text() == text
    return text


class Fault:
    """Fails at the n-th call of any operation that reaches the disk."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, n: int, action: Callable[[], None]) -> None:
        self.seen, self.n, self.action = 0, n, action
        for name in CALLS:
            monkeypatch.setattr(os, name, self.wrap(getattr(os, name)))

    def wrap(self, real: Callable[..., None]) -> Callable[..., None]:
        def call(*args: object, **kwargs: object) -> None:
            self.seen += 1
            if self.seen == self.n:
                self.action()
            real(*args, **kwargs)

        return call


def fail(error: BaseException) -> Callable[[], None]:
    def action() -> None:
        raise error

    return action


def faults(tmp_path: Path, *, old: bool, error: Callable[[], BaseException]) -> int:
    """Fail at every step in turn until a run passes; checks what is left each time. Returns the number of steps."""
    for n in range(1, 50):
        out = tmp_path / f"out{n}"
        if old:
            write(out, "old")
        with pytest.MonkeyPatch.context() as monkeypatch:
            fault = Fault(monkeypatch, n, fail(error()))
            try:
                write(out, "new", overwrite=old)
            except (ResourceError, KeyboardInterrupt):
                passed = False
            else:
                passed = True
        assert [p.name for p in tmp_path.iterdir() if "." in p.name] == []
        if passed:
            assert fault.seen < n
            assert content_of(out) == "new"
            return n - 1
        assert content_of(out) == ("old" if old else None)
    raise AssertionError("no run passed")


def disk_error() -> OSError:
    return OSError(errno.EIO, "Input/output error")


@pytest.mark.parametrize("error", [disk_error, KeyboardInterrupt])
def test_a_failure_at_any_step_leaves_nothing(tmp_path: Path, error: Callable[[], BaseException]) -> None:
    assert faults(tmp_path, old=False, error=error) == 6  # 4 flushes of content, 1 rename, 1 flush of the parent


@pytest.mark.parametrize("error", [disk_error, KeyboardInterrupt])
def test_a_failure_at_any_step_leaves_the_old_folder(tmp_path: Path, error: Callable[[], BaseException]) -> None:
    assert faults(tmp_path, old=True, error=error) == 7


@pytest.mark.parametrize("old", [False, True])
def test_after_a_kill_at_any_step_the_next_run_puts_everything_right(tmp_path: Path, old: bool) -> None:
    for n in range(1, 50):
        out = tmp_path / str(n) / "out"
        if old:
            write(out, "old")
        child = os.fork()
        if child == 0:  # this process ends at step n as by kill -9, without any clean-up
            Fault(pytest.MonkeyPatch(), n, lambda: os._exit(9))
            write(out, "new", overwrite=old)
            os._exit(0)
        survived = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert content_of(out) in ({"new"} if survived else {"old" if old else None, "new", None})
        write(out, "next", overwrite=True)
        assert content_of(out) == "next"
        assert [p.name for p in out.parent.iterdir()] == ["out"]
        if survived:
            return
    raise AssertionError("the child never survived")


def test_a_killed_swap_gives_the_old_folder_its_name_back(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(out, "old")
    out.rename(tmp_path / "out.old-0123abcd")
    with pytest.raises(ConfigError, match="exists already"):
        write(out, "new")
    assert content_of(out) == "old"


def test_leftovers_of_other_outputs_are_not_touched(tmp_path: Path) -> None:
    others = ("out2.partial-1-0123abcd", "xout.partial-1-0123abcd", "out.partial", "out.partial-mine", "out.old-mine")
    for name in others:
        (tmp_path / name).mkdir()
    write(tmp_path / "out", "new")
    assert {path.name for path in tmp_path.iterdir()} == {"out", *others}


def test_a_name_that_looks_like_a_pattern_is_taken_literally(tmp_path: Path) -> None:
    (tmp_path / "out1.partial-1-0123abcd").mkdir()
    (tmp_path / "out[1].partial-1-0123abcd").mkdir()
    write(tmp_path / "out[1]", "new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out1.partial-1-0123abcd", "out[1]"]


def test_an_existing_output_is_refused_without_overwrite(tmp_path: Path) -> None:
    write(tmp_path / "out", "old")
    with pytest.raises(ConfigError, match=r"out exists already.*--overwrite"):
        write(tmp_path / "out", "new")
    assert content_of(tmp_path / "out") == "old"


def test_overwrite_replaces_an_export_and_nothing_of_it_remains(tmp_path: Path) -> None:
    write(tmp_path / "out", "old")
    (tmp_path / "out" / "stale-shard").write_text("old")
    write(tmp_path / "out", "new", overwrite=True)
    assert content_of(tmp_path / "out") == "new"
    assert not (tmp_path / "out" / "stale-shard").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_overwrite_never_removes_what_is_not_an_export(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("dear")
    (tmp_path / "file").write_text("x")
    for name in ("home", "file"):
        with pytest.raises(ConfigError, match="not a checkpoint that this program wrote"):
            write(tmp_path / name, "new", overwrite=True)
    assert (tmp_path / "home" / "thesis.tex").read_text() == "dear"


def test_overwrite_fills_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write(tmp_path / "out", "new", overwrite=True)
    assert content_of(tmp_path / "out") == "new"


def test_a_symbolic_link_stays_one(tmp_path: Path) -> None:
    write(tmp_path / "real", "old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write(tmp_path / "link", "new", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert content_of(tmp_path / "real") == "new"


def test_a_second_writer_of_the_same_output_is_refused(tmp_path: Path) -> None:
    with staged_folder(tmp_path / "out") as folder:
        (folder / "first").write_text("")
        with pytest.raises(ConfigError, match="being written by another process"):
            write(tmp_path / "out", "second")
        assert (folder / "first").exists()
    assert (tmp_path / "out" / "first").exists()


def test_spaces_and_right_to_left_names_and_missing_parents_work(tmp_path: Path) -> None:
    out = tmp_path / "a b" / "מודל"
    write(out, "new")
    assert content_of(out) == "new"


def test_a_name_that_is_too_long_is_a_resource_error(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match=r"the name has 250 bytes, and up to \d+ can be"):
        write(tmp_path / ("x" * 250), "new")


def test_a_full_disk_is_a_resource_error_and_other_errors_keep_their_kind(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="No space left"), staged_folder(tmp_path / "out"):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(FileNotFoundError, match="gone"), staged_folder(tmp_path / "out"):
        raise FileNotFoundError(errno.ENOENT, "gone")
    assert list(tmp_path.iterdir()) == []


def test_the_folder_follows_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write(tmp_path / "out", "new")
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750
