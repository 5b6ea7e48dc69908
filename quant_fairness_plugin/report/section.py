"""One part of the page: a question, its answer, a chart, and the same figures as a table."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from markupsafe import Markup

from quant_fairness_plugin.report.drawing import draw
from quant_fairness_plugin.report.words import Cell

Level = Literal["tldr", "practitioner", "researcher"]
"""The shortest reading mode that shows a part; the longer ones show it, too."""
WIDE, NARROW = 1000, 340
"""Pixels of a chart on a screen, and on a telephone."""
_TELEPHONE = 360
_WIDTH = re.compile(r' width="([\d.]+)"')


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """A line of a chart's legend."""

    symbol: str
    """Class of its symbol in the page's style."""
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """The figures of a chart; the first column names the rows."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """A chart in two widths, of which the page shows the one that fits."""

    wide: Markup
    narrow: Markup

    @classmethod
    def of(cls, chart: Callable[[int], Any], text: str) -> Picture:
        """Draw a chart.

        Args:
            chart: width in pixels → the Altair chart.
            text: what it shows, for those who cannot see it.
        """
        return cls(wide=draw(chart(WIDE), text), narrow=draw(chart(NARROW), text))

    @property
    def scrolls(self) -> bool:
        """Whether the narrow one is wider than a telephone, so that the keyboard must reach it to move it."""
        width = _WIDTH.search(self.narrow)
        assert width is not None  # every SVG that is drawn has one
        return float(width[1]) > _TELEPHONE


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A part of the page."""

    name: str
    """Its anchor."""
    title: str
    level: Level
    lead: str
    """What it says, in one or two sentences."""
    table: Table
    picture: Picture | None = None
    keys: tuple[Key, ...] = ()
    notes: tuple[tuple[str, str], ...] = ()
    """Annotations that open on demand: (summary, text)."""
    table_open: bool = False


def shade(value: float, most: float, classes: int) -> int:
    """Return the class of a value between 0 and `most`, 0 for everything at or below 0."""
    return 0 if value <= 0 or most <= 0 else min(classes - 1, 1 + int((classes - 1) * value / most))


def joined(names: Sequence[str]) -> str:
    """Return `a, b and c`.

    >>> joined(["a", "b", "c"])
    'a, b and c'
    """
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))
