"""Documents that somebody else wrote, as plain data: JSON and YAML, bounded in size and depth, each key once.

Every function raises `ValueError` with the reason; who calls it names the file and what to do. No torch.
"""

from __future__ import annotations

import json
import math
import reprlib
from collections import Counter
from collections.abc import Hashable, Iterable
from pathlib import Path
from typing import Any

import yaml

MOST_BYTES = 64_000_000
"""Of a document that a person or another program wrote."""
MOST_DEPTH = 64
"""Lists and tables inside each other. Ten are many, and what walks a document may call itself for each."""
MOST_BITS = 1000
"""Of a whole number: what a float can hold. Python refuses to print one of five thousand digits."""
_TOO_DEEP = f"nested deeper than {MOST_DEPTH} levels"


def read_text(path: Path, *, most: int = MOST_BYTES) -> str:
    """Return the text of a file, with or without a byte order mark.

    Raises:
        OSError: it cannot be read.
        ValueError: it is larger than `most` bytes, or not UTF-8.
    """
    with path.open("rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"larger than {most} bytes")
    return content.decode("utf-8-sig")


def parse_json(text: str, *, finite: bool = True) -> Any:
    """Return what a JSON document holds.

    Args:
        text: the document.
        finite: refuse NaN, Infinity and numbers that are too large for a float. JSON has none of them; the configs of
            published models (Mamba 2) do.

    Raises:
        ValueError: not JSON, a key twice in one object (parsers differ in which of the two they take), nested deeper
            than `MOST_DEPTH`, a whole number of more than `MOST_BITS`, or half a surrogate pair.
    """
    try:
        value = json.loads(text, object_pairs_hook=unique_keys)
    except RecursionError as err:
        raise ValueError(_TOO_DEEP) from err
    _check(value, finite=finite)
    return value


def parse_yaml(text: str) -> Any:
    """Return what a YAML document holds: text, numbers, `true` and `false`, lists and tables.

    Everything else is text, as in YAML 1.2: `no` is Norwegian, and not false. Anchors are refused: ten lines of them
    stand for a billion values.

    Raises:
        ValueError: not YAML, an anchor or another tag; otherwise as `parse_json`.
    """
    try:
        value = yaml.load(text, Loader=_Plain)  # PyYAML's way to safe_load with other rules
    except RecursionError as err:
        raise ValueError(_TOO_DEEP) from err
    # PyYAML trusts what a tag says of a value: `!!int ""` is an IndexError, `!!bool x` a KeyError.
    except (yaml.YAMLError, ArithmeticError, LookupError, TypeError, AttributeError) as err:
        raise ValueError(" ".join(str(err).split())) from err
    _check(value, finite=True)
    return value


def unique_keys(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    """Return the pairs as a table.

    Raises:
        ValueError: a key is there twice.
    """
    table = dict(pairs)
    if len(table) < len(pairs):
        raise ValueError(f"{reprlib.repr(first_repeated(key for key, _ in pairs))} is there twice")
    return table


def first_repeated(values: Iterable[Any]) -> Any:
    """Return the first of the values that occur more than once; None where none does."""
    return next((value for value, count in Counter(values).items() if count > 1), None)


def _check(document: Any, *, finite: bool) -> None:
    """Refuse what cannot be worked with or written again; level by level, so that nothing calls itself."""
    level, depth = [document], 0
    while level:
        if depth > MOST_DEPTH:
            raise ValueError(_TOO_DEEP)
        below: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                below += value.keys()
                below += value.values()
            elif isinstance(value, list):
                below += value
            else:
                _check_scalar(value, finite=finite)
        level, depth = below, depth + 1


def _check_scalar(value: Any, *, finite: bool) -> None:
    if isinstance(value, str):
        try:
            value.isascii() or value.encode()
        except UnicodeEncodeError as err:
            raise ValueError(f"lone surrogate U+{ord(value[err.start]):04X} in a text") from err
    elif isinstance(value, float):
        if finite and not math.isfinite(value):
            raise ValueError(f"{value} is no number that can be computed with")
    elif isinstance(value, int) and value.bit_length() > MOST_BITS:
        raise ValueError(f"a whole number of {value.bit_length()} bits; expected {MOST_BITS} at most")


class _Plain(yaml.SafeLoader):  # type: ignore[misc] # PyYAML has no types
    """The plain data of `parse_yaml`."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Refuse an alias before it stands for something, and an anchor before anything can name it."""
        anchor = getattr(self.peek_event(), "anchor", None)
        if anchor is not None:
            raise ValueError(f"anchors and aliases ({anchor[:50]}) are not read; write the value out")
        return super().compose_node(parent, index)

    def fetch_flow_collection_start(self, token: Any) -> None:
        """Refuse a bracket too many at once: PyYAML looks at all that are open again for every token behind them."""
        if self.flow_level > MOST_DEPTH:
            raise ValueError(_TOO_DEEP)
        super().fetch_flow_collection_start(token)

    def add_indent(self, column: int) -> bool:
        """Refuse an indentation too many as soon as it is there."""
        if len(self.indents) > MOST_DEPTH:
            raise ValueError(_TOO_DEEP)
        return bool(super().add_indent(column))


def _table(loader: _Plain, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key, deep=True) for key, _ in node.value]
    for key in keys:
        if not isinstance(key, Hashable):
            raise ValueError(f"a {type(key).__name__} names a value; write `name: value`")
    values = [loader.construct_object(value, deep=True) for _, value in node.value]
    return unique_keys(list(zip(keys, values, strict=True)))


_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map")}
_Plain.yaml_constructors = {
    tag: constructor for tag, constructor in yaml.SafeLoader.yaml_constructors.items() if tag is None or tag in _TAGS
}
_Plain.add_constructor("tag:yaml.org,2002:map", _table)
_Plain.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in rules if tag in _TAGS and (not tag.endswith(":bool") or first in "tTfF")]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
