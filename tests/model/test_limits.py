"""What limits of memory leave, read from files as the system writes them; and a model that they do not hold."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from quant_fairness_plugin.errors import ResourceError
from quant_fairness_plugin.model.limits import Room, check_room, rooms
from quant_fairness_plugin.model.resolve import resolve_model

GIB = 1 << 30


def system(root: Path, files: dict[str, str]) -> Path:
    """A root with these files; this process holds nothing there."""
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


def container(root: Path) -> list[Room]:
    return [room for room in rooms(root) if "container" in room.limit]


def test_every_group_around_the_process_limits_it(tmp_path: Path) -> None:
    root = system(tmp_path, {
        "proc/self/cgroup": "0::/job/step\n",
        "sys/fs/cgroup/memory.max": "max\n",
        "sys/fs/cgroup/job/memory.max": f"{3 * GIB}\n",
        "sys/fs/cgroup/job/memory.current": f"{2 * GIB}\n",
        "sys/fs/cgroup/job/memory.stat": f"anon 5\nfile {GIB // 2}\n",
        "sys/fs/cgroup/job/step/memory.max": f"{2 * GIB}\n",
        "sys/fs/cgroup/job/step/memory.current": "0\n",
    })  # fmt: skip
    assert [room.bytes_ for room in container(root)] == [2 * GIB, 3 * GIB - 3 * GIB // 2]
    assert "2.15 GB" in container(root)[0].limit


def test_a_container_whose_path_is_the_hosts_has_its_limit_at_the_root(tmp_path: Path) -> None:
    limit = {"sys/fs/cgroup/memory.max": "1000\n", "sys/fs/cgroup/memory.current": "400\n"}
    root = system(tmp_path, {"proc/self/cgroup": "0::/docker/abc\n"} | limit)
    assert [room.bytes_ for room in container(root)] == [600]


def test_the_first_version_of_groups_is_read_too(tmp_path: Path) -> None:
    place = "sys/fs/cgroup/memory"
    root = system(tmp_path, {
        "proc/self/cgroup": "8:pids:/a\n4:memory:/a\n0::/\n",
        f"{place}/memory.limit_in_bytes": "9223372036854771712\n",
        f"{place}/memory.usage_in_bytes": "1\n",
        f"{place}/a/memory.limit_in_bytes": "1000\n",
        f"{place}/a/memory.usage_in_bytes": "700\n",
        f"{place}/a/memory.stat": "cache 1\ntotal_cache 200\n",
    })  # fmt: skip
    assert [room.bytes_ for room in container(root)] == [500]


def test_a_system_without_groups_has_the_machines_memory(tmp_path: Path) -> None:
    found = [room for room in rooms(tmp_path) if room.counts == "memory"]
    assert [room.bytes_ for room in found] == [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]


def test_a_model_that_a_limit_does_not_hold_is_refused(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    files = resolve_model(str(tiny_model("llama", layers=3)))
    values = sum(size for size in (path.stat().st_size for path in files.weights)) // 2
    group = {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.current": "0\n"}

    def refuse(left: int, *, blocks: bool = False, budget: int | None = None) -> str:
        root = system(tmp_path, group | {"sys/fs/cgroup/memory.max": f"{left}\n"})
        with pytest.raises(ResourceError) as caught:
            check_room(files, value_bytes=4, blocks=blocks, budget=budget, root=root)
        return str(caught.value)

    assert "read it block by block with --memory-budget" in refuse(3 * values)
    assert "give a smaller --memory-budget" in refuse(3 * values, blocks=True, budget=4 * values)
    assert "use a smaller model" in refuse(values // 2, blocks=True)
    system(tmp_path, group | {"sys/fs/cgroup/memory.max": f"{4 * values}\n"})
    check_room(files, value_bytes=4, blocks=False, budget=None, root=tmp_path)
    system(tmp_path, group | {"sys/fs/cgroup/memory.max": f"{3 * values}\n"})
    check_room(files, value_bytes=4, blocks=True, budget=None, root=tmp_path)


def test_the_limit_of_addresses_counts_what_the_process_has_mapped() -> None:
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))\n"
        "from quant_fairness_plugin.model.limits import rooms\n"
        "room = next(iter(rooms())); print(room.bytes_, room.limit)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    left, name = done.stdout.split(maxsplit=1)
    assert 1 << 30 < int(left) < 3 << 30
    assert name == "the limit of addresses (ulimit -v, 3.23 GB)\n"
    assert resource.getrlimit(resource.RLIMIT_AS)[0] != 3 << 30
