"""Other files from a well-formed one: values of a JSON document exchanged, and bytes changed where there is no JSON."""

from __future__ import annotations

import json
from copy import deepcopy
from random import Random
from typing import Any

from tests.fuzz import LONGEST

_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 7, 2**31, 2**63, 10**400, 0.5, -0.5, 1e308, 5e-324, float("nan"), float("inf"),
    "", "0", "layers.0", "layers.99.down", "fp16", "int4", "..", "../x", "/etc/passwd", "a" * 999, "\ud800",
    "\x00\x1b[2J", "http://x/y", "\u202e", [], {}, [[]], [None], {"": None}, [0] * 50,
)  # fmt: skip
_FRAGMENTS = (
    b"NaN", b"1e999", b"-", b"{", b"}", b"[", b"]", b"\"", b",", b":", b"\\ud800", b"\x00", b"\xff", b"\xef\xbb\xbf",
    b"&a ", b"*a", b"<<: ", b"!!int ", b"!!python/object:os.system ", b"---\n", b"\n", b"\t", b"\r", b"? ",
    b"- ", b"1:1:1", b"[" * 200, b"{\"a\":" * 100, b"9" * 5000, b"0x" + b"f" * 500, b"\xcc\x81" * 99, b"2020-99-99",
)  # fmt: skip


def mutated(content: bytes, random: Random) -> bytes:
    """Return a changed copy: mostly of a value of the document, sometimes of its bytes."""
    prefix, text = _framed(content)
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        document = None
    if isinstance(document, dict | list) and document and random.random() < 0.8:
        for _ in range(random.choice((1, 1, 1, 2, 3, 8))):
            document = _with_change(document, random)
        body = json.dumps(document).encode()
        return (len(body).to_bytes(8, "little") + body + prefix if prefix is not None else body)[:LONGEST]
    changed = bytearray(content)
    for _ in range(random.choice((1, 1, 2, 4))):
        _change_bytes(changed, random)
    return bytes(changed[:LONGEST])


def _framed(content: bytes) -> tuple[bytes | None, bytes]:
    """Return the data behind a safetensors header and the header; None and all of it, where there is no such header."""
    length = int.from_bytes(content[:8], "little")
    if content[8:9] == b"{" and 8 + length <= len(content):
        return content[8 + length :], content[8 : 8 + length]
    return None, content


def _with_change(document: Any, random: Random) -> Any:
    """Return the document with one place of it changed."""
    holder, key = _place(document, random)
    if holder is None:
        return deepcopy(random.choice(_VALUES))
    match random.randrange(6):
        case 0:
            del holder[key]
        case 1:
            other, place = _place(document, random)
            holder[key] = deepcopy(document if other is None else other[place])
        case 2 if isinstance(holder, dict):
            name = random.choice([value for value in _VALUES if isinstance(value, str)])
            holder[name] = holder.pop(key)
        case 3 if isinstance(holder, list):
            holder += deepcopy(holder) * random.choice((1, 2))
        case 4 if isinstance(holder[key], int | float) and not isinstance(holder[key], bool):
            holder[key] = random.choice((-holder[key], holder[key] + 1, holder[key] * 2, holder[key] - 1))
        case _:
            holder[key] = deepcopy(random.choice(_VALUES))
    return document


def _place(document: Any, random: Random) -> tuple[Any, Any]:
    """Return a container somewhere in the document and a key of it; (None, None) where there is none."""
    found: tuple[Any, Any] = (None, None)
    value = document
    while isinstance(value, dict | list) and value:
        key = random.choice(list(value)) if isinstance(value, dict) else random.randrange(len(value))
        found, value = (value, key), value[key]
        if random.random() < 0.2:
            break
    return found


def _change_bytes(content: bytearray, random: Random) -> None:
    place = random.randrange(len(content) + 1)
    end = min(len(content), place + random.choice((1, 2, 4, 16, 64)))
    match random.randrange(5):
        case 0:
            content[place:end] = b""
        case 1:
            content[place:place] = random.choice(_FRAGMENTS)
        case 2:
            content[place:end] = random.randbytes(end - place)
        case 3:
            content[place:place] = content[place:end] * random.choice((1, 2, 50))
        case _:
            content[place:end] = random.choice(_FRAGMENTS)
