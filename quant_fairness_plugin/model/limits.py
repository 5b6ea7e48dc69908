"""How much memory this process may still take: the machine's, a container's, or what `ulimit -v` leaves. No torch."""

from __future__ import annotations

import os
import re
import resource
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Literal

from quant_fairness_plugin.errors import ResourceError
from quant_fairness_plugin.model.resolve import ModelFiles, tensor_shapes
from quant_fairness_plugin.model.sizes import shown

_NUMBERED = re.compile(r"(.*?\.[0-9]+)\.")
"""The beginning of a parameter's name that says which block it is of."""
_UNLIMITED = 1 << 60
"""Version 1 of control groups writes no limit as a number of this size."""
_LIBRARY_ADDRESSES, _LIBRARY_DATA = 800_000_000, 300_000_000
"""What torch 2.13 for a CPU and Transformers take when they are loaded, beside what a command has loaded before that;
builds for CUDA take more."""
_LIMITS: tuple[tuple[int, str, str, Literal["addresses", "data"]], ...] = (
    (resource.RLIMIT_AS, "v", "VmSize", "addresses"),
    (resource.RLIMIT_DATA, "d", "VmData", "data"),
)
"""Limits of a process: number, letter of `ulimit`, what is held of it, what it counts."""


@dataclass(frozen=True, slots=True)
class Room:
    """What a limit leaves."""

    bytes_: int
    limit: str
    """What it is called, with its size."""
    counts: Literal["memory", "addresses", "data"] = "memory"
    """What is limited; of addresses, files that are mapped count as well."""


def rooms(root: Path = Path("/")) -> Iterator[Room]:
    """Yield what every limit of this process leaves, beside what it holds now.

    Args:
        root: where `proc` and `sys` are.
    """
    status = _numbers(root / "proc/self/status")
    for kind, letter, held, name in _LIMITS:
        most, _ = resource.getrlimit(kind)
        if most != resource.RLIM_INFINITY:
            room = most - 1024 * status.get(held, 0)
            yield Room(room, f"the limit of {name} (ulimit -{letter}, {shown(most)})", name)
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    yield Room(machine - 1024 * status.get("VmRSS", 0), f"this machine's memory ({shown(machine)})")
    yield from _control_groups(root)


def resident(root: Path = Path("/")) -> int:
    """Return the bytes that this process has in memory now; 0 where the system does not say."""
    return 1024 * _numbers(root / "proc/self/status").get("VmRSS", 0)


def check_libraries() -> None:
    """Refuse to load torch and Transformers where a limit is certainly below what they take.

    Raises:
        ResourceError: the limit of addresses or of data.
    """
    check_limit("addresses", _LIBRARY_ADDRESSES, "torch and Transformers")
    check_limit("data", _LIBRARY_DATA, "torch and Transformers")


def check_limit(counts: Literal["addresses", "data"], needed: int, who: str) -> None:
    """Refuse to begin what takes more addresses or data than a limit leaves, and would then end the process.

    Libraries in C++ abort where they are refused addresses while they are loaded, and nobody can catch that.

    Args:
        counts: which limit.
        needed: bytes.
        who: takes them.

    Raises:
        ResourceError: the limit leaves less.
    """
    for room in rooms():
        if room.counts == counts and room.bytes_ < needed:
            raise ResourceError(
                f"{who} take {shown(needed)} of {counts} before any work, and {room.limit} leaves "
                f"{shown(max(0, room.bytes_))}; raise that limit, or limit the container's memory instead"
            )


def check_room(
    files: ModelFiles, *, value_bytes: int, blocks: bool, budget: int | None, root: Path = Path("/")
) -> None:
    """Refuse a model before its weights are read where a limit does not hold what certainly is needed.

    Counted are the weights as they are computed with, of one block where blocks stay in their files, or the memory
    budget; what is computed with them comes on top, so that less room than this is certainly too little.

    Args:
        files: the model.
        value_bytes: of a value as it is computed with.
        blocks: whether its blocks stay in their files.
        budget: the memory budget in bytes.
        root: where `proc` and `sys` are.

    Raises:
        ResourceError: names the limit, what is left of it, what is needed, and the options that need less.
    """
    if not files.weights or files.weights[0].suffix != ".safetensors":
        return
    shapes = {name: shape for name, (_, shape) in tensor_shapes(files).items()}
    values = _largest_block(shapes) if blocks else sum(map(prod, shapes.values()))
    needed = max(values * value_bytes, budget or 0)
    for room in rooms(root):
        required = needed + (max(path.stat().st_size for path in files.weights) if room.counts == "addresses" else 0)
        if required > room.bytes_:
            raise ResourceError(
                f"{files.name} needs at least {shown(required)} beside what this process holds, and {room.limit} "
                f"leaves {shown(max(0, room.bytes_))}; {_advice(blocks=blocks, budget=budget)}, or raise the limit"
            )


def _largest_block(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Return the values of the largest block, and 0 where none is numbered."""
    sizes: Counter[str] = Counter()
    for name, shape in shapes.items():
        match = _NUMBERED.match(name)
        if match is not None:
            sizes[match[1]] += prod(shape)
    return max(sizes.values(), default=0)


def _advice(*, blocks: bool, budget: int | None) -> str:
    if budget is not None:
        return "give a smaller --memory-budget"
    return "use a smaller model" if blocks else "read it block by block with --memory-budget"


def _control_groups(root: Path) -> Iterator[Room]:
    """Yield what the memory limits of the control group and of those around it leave, in version 2 and in version 1."""
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        base = root / "sys/fs/cgroup" / controllers
        names = ("memory.max", "memory.current", "file") if not controllers else (
            "memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache",
        )  # fmt: skip
        inner = base / path.lstrip("/")
        # In a container the path is often that of the host, and the group is mounted as the root.
        for folder in (inner, *inner.parents) if inner.is_dir() else (base,):
            room = _room_of_group(folder, *names)
            if room is not None:
                yield room
            if folder == base:
                break


def _room_of_group(folder: Path, limit: str, current: str, cache: str) -> Room | None:
    most, used = (next(_lines(folder / name), "") for name in (limit, current))
    if not (most.isdecimal() and used.isdecimal()) or int(most) > _UNLIMITED:
        return None
    # Cached files are counted as used, and given back when memory is needed.
    held = int(used) - _numbers(folder / "memory.stat").get(cache, 0)
    return Room(int(most) - held, f"the container's memory limit ({shown(int(most))})")


def _lines(path: Path) -> Iterator[str]:
    try:
        yield from path.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return


def _numbers(path: Path) -> Mapping[str, int]:
    matches = (re.match(r"(\w+):?\s+([0-9]+)", line) for line in _lines(path))
    return {match[1]: int(match[2]) for match in matches if match}
