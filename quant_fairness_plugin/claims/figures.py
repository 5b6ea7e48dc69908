"""An answer's place in a JSON document, and the answer in a cell. Imports no torch.

A path goes from key to key: `result.configurations[kept=first, last].worst_kl`. In brackets stands a row of a list, by
its number or by the value of one of its fields; `#` at the end counts. Several paths have `;` between.
"""

from __future__ import annotations

import re
from typing import Any

from quant_fairness_plugin.errors import ConfigError

_STEP = re.compile(r"\.?([^.\[\]]+)|\[([^\]]*)\]")


def find(document: Any, path: str) -> list[Any]:
    """Return the values at the paths, in their order.

    Raises:
        ConfigError: nothing is there.
    """
    return [_follow(document, one.strip()) for one in path.split(";") if one.strip()]


def _follow(document: Any, path: str) -> Any:
    value, counted = document, path.endswith("#")
    for step in _STEP.finditer(path.removesuffix("#")):
        key, row = step.groups()
        try:
            value = _row(value, row) if key is None else value[key]
        except (KeyError, IndexError, TypeError) as err:
            raise ConfigError(f"the answer has nothing at {path!r} (stopped at {step[0]!r})") from err
    return len(value) if counted else value


def _row(rows: Any, wanted: str) -> Any:
    field, equals, text = wanted.partition("=")
    if not equals:
        return rows[int(wanted)]
    matching = [row for row in rows if str(row[field]) == text]
    return matching[0]


def labelled(path: str, values: list[Any], between: str = "; ") -> str:
    """Return the values in one cell, each with the row and the key that it was found at; a common key stands first.

    >>> labelled("rows[kept=first].kl; rows[kept=last].kl", [0.1, 0.2]), labelled("plan.units#", [3])
    ('kl: first 0.1; last 0.2', 'units: 3')
    """
    paths = [one.strip() for one in path.split(";")]
    if path == "text":
        return written(values[0])
    rows = [" ".join(re.findall(r"\[[^\]=]*=([^\]]*)\]", one)) for one in paths]
    keys = [
        re.sub(r"\[.*?\]", "", one).rpartition(".")[2].removesuffix("#").strip("_").replace("_", " ") for one in paths
    ]
    common = f"{keys[0]}:{between[-1] if len(keys) > 1 else ' '}" if len(set(keys)) == 1 else ""
    cells = zip(rows, keys, map(written, values), strict=True)
    return common + between.join(" ".join(filter(None, (row, "" if common else key, cell))) for row, key, cell in cells)


def written(value: Any) -> str:
    """Return a value as it stands in a cell: three digits, and an interval's ends in brackets.

    >>> written({"estimate": 0.0123, "low": 0.01, "high": 0.02}), written({"undefined": "no text"}), written([0, 9])
    ('0.0123 [0.01, 0.02]', 'undefined', '0, 9')
    """
    match value:
        case None:
            return ""
        case {"undefined": _}:
            return "undefined"
        case {"estimate": estimate, "low": low, "high": high}:
            return f"{written(estimate)} [{written(low)}, {written(high)}]"
        case bool() | str():
            return str(value)
        case float():
            return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
        case list() | tuple():
            return ", ".join(map(written, value))
        case dict():
            return ", ".join(f"{key} {written(part)}" for key, part in value.items())
    return str(value)
