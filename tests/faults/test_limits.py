"""Commands in processes of their own under real limits: disk, memory, permissions, signals at any time, each other."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from quant_fairness_plugin.export.staging import staged_folder
from quant_fairness_plugin.model.sizes import shown
from tests.planted_model import planted_texts, write_planted_model

pytestmark = pytest.mark.limits
ROOT = Path(__file__).parents[2]
ENTRY = "from quant_fairness_plugin.cli.main import main; main()"
TEXTS = ("--texts", "t.json", "--group-size", "32")
QUANTIZE = ("quantize", "model", *TEXTS, "--protect-layers", "2")
SWEEP = ("sweep", "--model", "model", *TEXTS)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("start")
    write_planted_model(folder / "model")
    few = {language: list(rows[:12]) for language, rows in planted_texts().sentences.items()}
    (folder / "t.json").write_text(json.dumps(few, ensure_ascii=False), encoding="utf-8")
    return folder


@pytest.fixture
def place(start: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(start, tmp_path / "place"))


def begin(place: Path, *command: str, before: Callable[[], None] | None = None) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TMPDIR": str(place)}
    return subprocess.Popen(
        [sys.executable, "-c", ENTRY, *command], cwd=place, env=environment, text=True, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, preexec_fn=before,
    )  # fmt: skip


def run(place: Path, *command: str, before: Callable[[], None] | None = None) -> tuple[int, str]:
    """Return the exit status, and the one line of the error."""
    process = begin(place, *command, before=before)
    _, said = process.communicate()
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in said, said
    assert len(errors) == (process.returncode != 0), said
    return process.returncode, errors[0] if errors else ""


def names(place: Path) -> set[str]:
    return {path.name for path in place.iterdir()}


def limit(kind: int, size: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(kind, (size, size))


def test_files_that_may_not_grow(place: Path) -> None:
    status, line = run(place, *QUANTIZE, "-o", "out", before=limit(resource.RLIMIT_FSIZE, 20_000))
    assert (status, "File too large" in line) == (4, True)
    assert names(place) == {"model", "t.json"}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "none", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("only root may mount a small disk")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.parametrize("command", [QUANTIZE, SWEEP])
def test_a_full_disk(place: Path, small_disk: Path, command: tuple[str, ...]) -> None:
    (small_disk / "rest").write_bytes(bytes(50_000))
    status, line = run(place, *command, "-o", str(small_disk / "out"))
    assert status == 4, line
    assert names(small_disk) == {"rest"}


def test_a_folder_that_may_not_be_written(place: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere; `test_points.py` becomes another user for one call")
    (place / "closed").mkdir(mode=0o555)
    status, line = run(place, *QUANTIZE, "-o", "closed/out")
    assert (status, "Permission denied" in line) == (4, True)


def test_two_processes_on_one_output(place: Path) -> None:
    with staged_folder(place / "out") as folder:
        status, line = run(place, *QUANTIZE, "-o", "out")
        assert (status, f"is being written by another process ({os.getpid()})" in line) == (2, True)
        (folder / "ours").touch()
    assert names(place / "out") == {"ours"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize(
    ("command", "step", "kept"),
    [((*QUANTIZE, "-o", "out"), "quantize", "layers"), ((*SWEEP, "-o", "s.json"), "sweep", "trials")],
)
def test_a_signal_in_the_middle(
    place: Path, command: tuple[str, ...], step: str, kept: str, number: signal.Signals
) -> None:
    with begin(place, *command, "--work", "work") as process:
        assert process.stderr is not None
        said = next(line for line in process.stderr if line.startswith(step))
        process.send_signal(number)
        said += process.stderr.read()
    assert process.returncode == 128 + number, said
    last = said.splitlines()[-1]
    assert last.startswith("error: interrupted" if number == signal.SIGINT else f"error: stopped by {number.name}")
    assert last.endswith(f"finished {kept} are in work: give the same command again to go on")
    assert names(place) == {"model", "t.json", "work"}
    assert run(place, *command, "--work", "work")[0] == 0


@pytest.mark.parametrize("seconds", [0.5, 1.5, 3.0, 5.0])
def test_a_signal_at_any_time(place: Path, seconds: float) -> None:
    with begin(place, "run", "--model", "model", *TEXTS, "-o", "out") as process:
        time.sleep(seconds)  # while libraries are loaded, mostly, which some of them do not like
        process.terminate()
        assert process.stderr is not None
        said = process.stderr.read()
    # Before Python has read our first file, the end is the system's.
    assert process.returncode in (143, -signal.SIGTERM), said
    assert "Traceback" not in said
    assert names(place) - {"model", "t.json"} == set()


RUN, MEASURE = ("run", "--model", "model", *TEXTS, "-o", "out"), ("measure", "--model", "model", *TEXTS[:2])


@pytest.mark.parametrize("command", [RUN, (*QUANTIZE, "-o", "out"), MEASURE])
@pytest.mark.parametrize("mebibytes", [700, 850])
def test_fewer_addresses_than_torch_maps(place: Path, command: tuple[str, ...], mebibytes: int) -> None:
    """Libraries that were begun to be loaded would end the process: at 850 MiB, torch's do."""
    status, line = run(place, *command, before=limit(resource.RLIMIT_AS, mebibytes << 20))
    assert (status, "of addresses before any work" in line, "ulimit -v" in line) == (4, True, True), line
    assert names(place) == {"model", "t.json"}


@pytest.mark.parametrize("kind", ["AS", "DATA"])
@pytest.mark.parametrize("mebibytes", [300, 1150])
def test_whatever_is_not_held_is_one_line(place: Path, kind: str, mebibytes: int) -> None:
    """Below what libraries take, while they are loaded, and where it depends on the system how far the work comes."""
    before = limit(getattr(resource, f"RLIMIT_{kind}"), mebibytes << 20)
    status, line = run(place, *QUANTIZE, "-o", "out", before=before)
    assert status in (0, 4), line
    assert names(place) - {"out"} == {"model", "t.json"}
    assert (place / "out").is_dir() == (status == 0)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory, start: Path) -> Path:
    """A model of two blocks of 1.2 GB in float32; a file of holes, which takes no room on a disk."""
    folder, width, inner = Path(shutil.copytree(start, tmp_path_factory.mktemp("large") / "start")), 1024, 100_000
    config = json.loads((folder / "model" / "config.json").read_text(encoding="utf-8"))
    config |= {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": 2, "head_dim": width // 4}
    (folder / "model" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with torch.device("meta"):
        parameters = LlamaForCausalLM(LlamaConfig(**config)).state_dict()
    header, end = {}, 0
    for name, value in parameters.items():
        begin, end = end, end + 2 * value.numel()
        header[name] = {"dtype": "F16", "shape": list(value.shape), "data_offsets": [begin, end]}
    raw = json.dumps(header).encode()
    with (folder / "model" / "model.safetensors").open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + end)
    return folder


@pytest.mark.parametrize(
    ("command", "advice"),
    [
        (RUN, "use a smaller model"),
        ((*QUANTIZE[:-1], "0", "-o", "out"), "use a smaller model"),
        (MEASURE, "use a smaller model"),
        ((*SWEEP, "--top", "1", "-o", "s.json"), "read it block by block with --memory-budget"),
    ],
)
@pytest.mark.parametrize("kind", ["AS", "DATA"])
def test_a_model_that_the_limit_does_not_hold_is_refused_before_it_is_read(
    large: Path, command: tuple[str, ...], advice: str, kind: str
) -> None:
    before = limit(getattr(resource, f"RLIMIT_{kind}"), {"AS": 2200, "DATA": 1000}[kind] << 20)
    status, line = run(large, *command, before=before)
    assert (status, "model needs at least" in line, advice in line) == (4, True, True), line
    assert names(large) == {"model", "t.json"}


def test_a_page_that_cannot_be_drawn_does_not_end_the_work(place: Path) -> None:
    """The drawings' engine maps 67 GB, and ends the process where that is refused."""
    process = begin(place, *QUANTIZE, "-o", "out", before=limit(resource.RLIMIT_AS, 8 << 30))
    _, said = process.communicate()
    assert process.returncode == 0, said
    assert "no report.html was written: the drawings of a page take 70.00 GB of addresses" in said
    assert (place / "out" / "model.safetensors").is_file()
    assert not (place / "out" / "report.html").exists()
    status, line = run(place, "report", "out", "-o", "page.html", before=limit(resource.RLIMIT_AS, 8 << 30))
    assert (status, "raise that limit" in line) == (4, True)


@dataclass(frozen=True, slots=True)
class Group:
    """A control group of this test's own, below the mount or below the group of this process."""

    folder: Path

    def hold(self, bytes_: int) -> Callable[[], None]:
        """Set the limit, swap included, and return what makes the process that calls it a member."""
        for name in ("memory.swap.max", "memory.swappiness"):
            if (self.folder / name).exists():
                (self.folder / name).write_text("0", encoding="ascii")
        name = "memory.max" if (self.folder / "memory.max").exists() else "memory.limit_in_bytes"
        (self.folder / name).write_text(str(bytes_), encoding="ascii")

        def join() -> None:
            (self.folder / "cgroup.procs").write_text("0", encoding="ascii")

        return join


@pytest.fixture
def group() -> Iterator[Group]:
    for place in group_places():
        folder = place / f"quant-fairness-{os.getpid()}"
        try:
            folder.mkdir()
        except OSError:
            continue
        try:
            if any((folder / name).exists() for name in ("memory.max", "memory.limit_in_bytes")):
                yield Group(folder)
                return
        finally:
            folder.rmdir()
    pytest.skip("no group of memory can be made here; run as root where the controller of memory is on for children")


def group_places() -> Iterator[Path]:
    """Yield the folders in which a group of memory could be made, of version 2 and of version 1."""
    for line in Path("/proc/self/cgroup").read_text(encoding="ascii").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):
            base = Path("/sys/fs/cgroup", controllers)
            yield from (base, base / path.lstrip("/"))


def test_a_real_group_that_does_not_hold_a_model_refuses_it_before_it_is_read(large: Path, group: Group) -> None:
    status, line = run(large, *QUANTIZE[:-1], "0", "-o", "out", before=group.hold(1 << 30))
    assert (status, f"the container's memory limit ({shown(1 << 30)}) leaves" in line) == (4, True), line
    assert names(large) == {"model", "t.json"}


def test_a_real_group_that_holds_the_work_lets_it_end(place: Path, group: Group) -> None:
    status, line = run(place, *QUANTIZE, "-o", "out", before=group.hold(2 << 30))
    assert status == 0, line
    assert names(place) == {"model", "t.json", "out"}


@pytest.mark.parametrize("mebibytes", [150, 350])
def test_a_run_that_a_real_group_killed_leaves_nothing_to_the_next(place: Path, group: Group, mebibytes: int) -> None:
    """The kernel ends a process of a group that has no memory left; no program can say a line then."""
    process = begin(place, *QUANTIZE, "-o", "out", before=group.hold(mebibytes << 20))
    _, said = process.communicate()
    assert process.returncode == -signal.SIGKILL, said
    assert not (place / "out").exists()
    assert run(place, *QUANTIZE, "-o", "out", before=group.hold(2 << 30))[0] == 0
    assert names(place) == {"model", "t.json", "out"}
