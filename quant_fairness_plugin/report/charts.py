"""The charts as Altair builds them. Each takes plain rows and a width in pixels; colour never says anything alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt

LABELS = 150
"""The most pixels of a name on the vertical axis."""
_COLUMN = 32
"""Pixels of the narrowest column of a map, in which a figure can still be read; a wider map scrolls."""
_NARROW = 500
"""Pixels of the widest picture that is laid out for a telephone."""
CLASSES = 7
"""Shades of a map; the page has a fill and an ink for each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dot:
    """An estimate with its interval."""

    label: str
    state: str
    estimate: float
    low: float
    high: float
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """One cell of a map."""

    row: str
    column: str
    shade: int
    """0 to `CLASSES - 1`."""
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A plan by what it takes and what it harms."""

    label: str
    role: str
    megabytes: float
    harm: float


def _inline(values: Sequence[dict[str, Any]]) -> Any:
    data: Any = alt.Data  # its constructor has no types
    return data(values=list(values))


def _data(rows: Sequence[Any]) -> Any:
    values = [{name: getattr(row, name) for name in type(row).__slots__} for row in rows]
    return _inline(values)


def _fitted(width: int) -> dict[str, Any]:
    """Return a width that holds the axis and its names, too."""
    return {"width": width, "autosize": alt.AutoSizeParams(type="fit-x", contains="padding")}


def _names(field: str, order: Sequence[str], **axis: Any) -> Any:
    return alt.Y(field, type="nominal", sort=list(order), title=None, axis=alt.Axis(ticks=False, **axis))


def _ticks(width: int) -> int:
    return 8 if width > _NARROW else 4


def _by_state(states: Sequence[str], values: Sequence[str] | Sequence[int]) -> dict[str, Any]:
    return {"type": "nominal", "legend": None, "scale": alt.Scale(domain=list(states), range=list(values))}


def intervals(
    dots: Sequence[Dot],
    *,
    states: Sequence[str],
    bound: float | None,
    width: int,
    title: str = "loss, bits per byte (0 = no change)",
) -> Any:
    """Return estimates with intervals, a row per label in the order given; the bound as a dashed line.

    Args:
        dots: one or two to a label.
        states: the values of `state`: the last one is drawn full, one before it hollow.
        bound: what is still accepted; None draws no line.
        width: of the whole picture.
        title: of the axis.
    """
    colours, shapes = ["var(--before)", "var(--after)"][-len(states) :], ["diamond", "circle"][-len(states) :]
    order = list(dict.fromkeys(dot.label for dot in dots))
    offset = alt.YOffset("state", type="nominal", sort=list(states), scale=alt.Scale(paddingOuter=0.35))
    base = alt.Chart(_data(dots)).encode(y=_names("label", order, labelLimit=LABELS), yOffset=offset)
    colour = alt.Color("state", **_by_state(states, colours))
    most = max([dot.high for dot in dots] + [bound or 0.0])
    reach = alt.Scale(
        domain=[min(0.0, *(dot.low for dot in dots)), most * (1.12 if width > _NARROW else 1.3)], nice=False
    )
    axis = alt.Axis(tickCount=_ticks(width))
    value = alt.X("estimate", type="quantitative", title=title, scale=reach, axis=axis)
    rule = base.mark_rule(strokeWidth=2).encode(x=alt.X("low", type="quantitative"), x2="high", color=colour)
    point = base.mark_point(size=80, strokeWidth=2, opacity=1).encode(
        x=value,
        color=colour,
        shape=alt.Shape("state", **_by_state(states, shapes)),
        fill=alt.Fill("state", **_by_state(states, ["var(--page)", "var(--after)"][-len(states) :])),
    )
    text = base.mark_text(align="left", dx=8).encode(x=alt.X("high", type="quantitative"), text=alt.Text("text:N"))
    layers = [rule, point, text]
    if bound is not None:
        line = alt.Chart(_inline([{"bound": bound, "text": f"bound {bound:g}"}]))
        at = alt.X("bound", type="quantitative")
        layers += [
            line.mark_rule(strokeDash=[5, 4], color="var(--ink)").encode(x=at),
            line.mark_text(align="left", baseline="bottom", dx=4, color="var(--ink)").encode(
                x=at, y=alt.value(-3), text=alt.Text("text:N")
            ),
        ]
    return alt.layer(*layers).properties(height=alt.Step(13), **_fitted(width))


def bars(labels: Sequence[str], values: Sequence[float], *, title: str, width: int, digits: int = 0) -> Any:
    """Return a bar for each label, with its value beside it."""
    rows = [{"label": a, "value": b, "text": f"{b:,.{digits}f}"} for a, b in zip(labels, values, strict=True)]
    reach = alt.Scale(domain=[min(0, *values), max(0, *values) * 1.15 or 1], nice=False)
    base = alt.Chart(_inline(rows)).encode(
        y=_names("label", labels, labelLimit=LABELS),
        x=alt.X("value", type="quantitative", title=title, axis=alt.Axis(tickCount=_ticks(width)), scale=reach),
    )
    text = base.mark_text(align="left", dx=5).encode(text=alt.Text("text:N"))
    bar = base.mark_bar(color="var(--after)", height=14)
    return alt.layer(bar, text).properties(height=alt.Step(24), **_fitted(width))


def tiles(cells: Sequence[Tile], *, columns: Sequence[str], width: int) -> Any:
    """Return a map of rows and columns, every cell with its text."""
    rows = list(dict.fromkeys(cell.row for cell in cells))
    shades = [str(shade) for shade in range(CLASSES)]
    values = [{"row": cell.row, "column": cell.column, "shade": str(cell.shade), "text": cell.text} for cell in cells]
    width = max(width, 70 + _COLUMN * len(columns))
    step = (width - 70) / max(1, len(columns))
    axis = alt.Axis(orient="top", ticks=False, labelAngle=0 if step > 60 else -45, labelLimit=110)
    base = alt.Chart(_inline(values)).encode(
        y=_names("row", rows, labelLimit=90),
        x=alt.X("column", type="nominal", sort=list(columns), title=None, axis=axis),
    )
    fill = alt.Color("shade", **_by_state(shades, [f"var(--fill-{shade})" for shade in shades]))
    ink = alt.Color("shade", **_by_state(shades, [f"var(--ink-{shade})" for shade in shades]))
    square = base.mark_rect(stroke="var(--page)", strokeWidth=1).encode(color=fill)
    text = base.mark_text(fontSize=10).encode(text=alt.Text("text:N"), color=ink)
    layers = alt.layer(square, text).resolve_scale(color="independent")
    return layers.properties(width=min(width - 70, 90 * len(columns)), height=alt.Step(18))


def points(
    panels: Sequence[tuple[str, Sequence[Point]]], *, roles: Sequence[str], rule: float | None, width: int
) -> Any:
    """Return harm against bytes, a panel for each harm.

    Args:
        panels: title of the harm → the plans.
        roles: the values of `role`: an ordinary plan, one on the frontier, the recommended one.
        rule: megabytes of a recommended plan that was not itself evaluated; None draws no line.
        width: of the whole picture; narrow ones have the panels below each other.
    """
    narrow = width <= _NARROW
    each = width - 70 if narrow else (width - 150) // 2
    made = [
        _panel(rows, roles, rule).properties(width=each, height=230, title=alt.Title(title, anchor="start"))
        for title, rows in panels
    ]
    return alt.vconcat(*made) if narrow else alt.hconcat(*made, bounds="flush", spacing=80)


def _panel(rows: Sequence[Point], roles: Sequence[str], rule: float | None) -> Any:
    zero = alt.Scale(zero=False, padding=12)
    base = alt.Chart(_data(rows)).encode(
        x=alt.X("megabytes", type="quantitative", title="size, MB", scale=zero, axis=alt.Axis(tickCount=5)),
        y=alt.Y("harm", type="quantitative", title=None, scale=zero, axis=alt.Axis(tickCount=6)),
    )
    colours = ["var(--muted)", "var(--after)", "var(--before)"]
    point = base.mark_point(strokeWidth=2, opacity=1).encode(
        shape=alt.Shape("role", **_by_state(roles, ["circle", "square", "diamond"])),
        color=alt.Color("role", **_by_state(roles, colours)),
        fill=alt.Fill("role", **_by_state(roles, ["transparent", "var(--after)", "var(--before)"])),
        size=alt.Size("role", **_by_state(roles, [25, 45, 220])),
        order=alt.Order("role", type="nominal", sort="ascending"),
    )
    layers = [point]
    if rule is not None:
        line = alt.Chart(_inline([{"megabytes": rule}]))
        at = alt.X("megabytes", type="quantitative")
        layers.append(line.mark_rule(strokeDash=[5, 4], color="var(--before)", strokeWidth=2).encode(x=at))
    return alt.layer(*layers)


def strip(rows: Sequence[tuple[str, str, float]], *, title: str, width: int) -> Any:
    """Return values on lines: (line, role, value), where role is `ours`, `random` or `other`."""
    roles = ("ours", "random", "other")
    values = [{"line": line, "role": role, "value": value} for line, role, value in rows]
    order = list(dict.fromkeys(line for line, _, _ in rows))
    drawn = [value for _, _, value in rows]
    spread = alt.Scale(domain=[min(0.0, *drawn), max(drawn) * 1.05], nice=False)
    base = alt.Chart(_inline(values)).encode(
        y=_names("line", order, labelLimit=LABELS),
        x=alt.X("value", type="quantitative", title=title, scale=spread, axis=alt.Axis(tickCount=_ticks(width))),
        shape=alt.Shape("role", **_by_state(roles, ["diamond", "M0,-1L0,1", "circle"])),
        color=alt.Color("role", **_by_state(roles, ["var(--before)", "var(--ink)", "var(--muted)"])),
        fill=alt.Fill("role", **_by_state(roles, ["var(--before)", "transparent", "transparent"])),
        size=alt.Size("role", **_by_state(roles, [200, 120, 50])),
    )
    ours = [{"value": value} for _, role, value in rows if role == "ours"]
    line = alt.Chart(_inline(ours)).mark_rule(strokeDash=[4, 4], color="var(--before)")
    at = alt.X("value", type="quantitative")
    marks = base.mark_point(strokeWidth=1.5, opacity=1)
    return alt.layer(line.encode(x=at), marks).properties(height=alt.Step(26), **_fitted(width))
