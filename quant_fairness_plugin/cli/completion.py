"""What the shell offers for an option's value."""

from __future__ import annotations

from collections.abc import Callable, Collection

import typer

from quant_fairness_plugin.errors import QuantFairnessError
from quant_fairness_plugin.texts.hub import PREFIX
from quant_fairness_plugin.texts.load import load_texts

LANGUAGES = ("languages", "reference")
LISTS = ("languages", "calibrations")
"""Values with commas between names: what is before the last comma stays."""
Offer = Callable[[typer.Context, str], list[str]]


def complete(field: str, names: Collection[str]) -> Offer | None:
    """Return what offers a field's values for the start of one; None where the values are no names."""
    if not names and field not in LANGUAGES:
        return None

    def offer(ctx: typer.Context, incomplete: str) -> list[str]:
        known = _languages(str(ctx.params.get("texts") or "bundled")) if field in LANGUAGES else names
        before, comma, last = incomplete.rpartition(",") if field in LISTS else ("", "", incomplete)
        return [f"{before}{comma}{name}" for name in known if name.startswith(last)]

    return offer


def _languages(texts: str) -> tuple[str, ...]:
    """Return the languages of the texts that the line names; none where they are not at hand."""
    if texts.startswith(PREFIX):
        return ()
    try:
        return load_texts(texts, reference=None).languages
    except QuantFairnessError:
        return ()  # a shell's completion has no place for an error
