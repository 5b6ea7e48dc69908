"""Charts as static SVG that follows the page: its colours are the page's CSS variables, so dark and light both work."""

from __future__ import annotations

import importlib.util
from typing import Any

from markupsafe import Markup, escape

from quant_fairness_plugin.errors import MissingExtraError
from quant_fairness_plugin.model.limits import check_limit

INSTALL = 'pip install "quant-fairness[report]"'
_PACKAGES = {"altair": "altair", "vl_convert": "vl-convert-python"}
"""Module → package of the extra `report`."""
_ENGINE_ADDRESSES = 70_000_000_000
"""What vl-convert's JavaScript engine maps while it starts, hardly any of it memory. Refused, it ends the process."""
_ENGINE_DATA = 700_000_000
"""What of it may be written to, most of it never; refused, it ends the process as well."""
_FONT = "Helvetica, Arial, sans-serif"  # vl-convert has metrics of these
_TITLE = {"titleColor": "var(--muted)", "titleFontWeight": "normal", "titleFontSize": 12}
_CONFIG: dict[str, Any] = {
    "aria": False,  # the whole picture has one text, and every figure is in the table below it
    "background": "transparent",
    "font": _FONT,
    "padding": 10,
    "view": {"stroke": None},
    "axis": {
        "labelColor": "var(--ink)",
        "labelFontSize": 12,
        "labelFlush": False,
        "labelPadding": 7,  # where the reader's font is wider than the measured one
        "gridColor": "var(--line)",
        "domainColor": "var(--line)",
        "tickColor": "var(--line)",
        **_TITLE,
    },
    "header": {"labelColor": "var(--ink)", "labelFontSize": 12, **_TITLE},
    "title": {"color": "var(--ink)", "fontSize": 13, "fontWeight": "normal"},
    "text": {"color": "var(--ink)", "fontSize": 11},
}


def check_drawing() -> None:
    """Check that charts can be drawn.

    Raises:
        MissingExtraError: a package of the extra `report` is not installed.
        ResourceError: a limit of addresses or of data is below what the drawings' JavaScript engine takes.
    """
    missing = [package for module, package in _PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise MissingExtraError(f"a report needs {' and '.join(missing)}; install: {INSTALL}")
    check_limit("addresses", _ENGINE_ADDRESSES, "the drawings of a page")
    check_limit("data", _ENGINE_DATA, "the drawings of a page")


def draw(chart: Any, text: str) -> Markup:
    """Return an Altair chart as an SVG with a text in its place for those who cannot see it.

    Vega escapes what it writes, in text and in attributes.
    """
    import vl_convert  # starts a JavaScript engine

    specification = chart.to_dict() | {"config": _CONFIG}
    svg = vl_convert.vegalite_to_svg(specification)
    named = svg.replace("<svg ", f'<svg role="img" aria-label="{escape(text)}" ', 1)
    # Vega gives marks a role and no name; the picture's own text stands for all of them.
    return Markup(named.replace("<g ", '<g aria-hidden="true" ', 1))
