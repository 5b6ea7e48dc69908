"""How figures, languages and plans are written in a report."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import langcodes

from quant_fairness_plugin.artifacts import Interval, Number, ProtectionPlan, precision_words
from quant_fairness_plugin.recommend import describe_overrides
from quant_fairness_plugin.texts.languages import language_name

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_LISTED = 4
"""Parts of a plan that a sentence can name."""
_UNITS = ("bytes", "kB", "MB", "GB", "TB")


@dataclass(frozen=True, slots=True)
class Language:
    """A language as a cell shows it."""

    tag: str
    name: str
    """In English; the tag itself where it has none."""
    own: str
    """In the language itself, to be set in its own direction; empty where it is unknown or the same."""

    @classmethod
    def of(cls, tag: str) -> Language:
        """Name a language. A tag from outside that is no tag is its own name."""
        try:
            name, own = language_name(tag), langcodes.Language.get(tag).autonym()
        except ValueError:  # langcodes raises a kind of it
            return cls(tag, tag, "")
        return cls(tag, name, "" if own in (name, tag) or own.startswith("Unknown") else own)

    @property
    def label(self) -> str:
        """Name and tag, as a chart's axis shows them."""
        return self.name if self.name == self.tag else f"{self.name} {self.tag}"


@dataclass(frozen=True, slots=True)
class Figure:
    """A cell that is aligned as a number."""

    text: str


@dataclass(frozen=True, slots=True)
class Written:
    """A cell that a model or a person wrote, in a language and in its direction."""

    text: str
    tag: str


Cell = str | Figure | Language | Written


def decimals(value: float) -> str:
    """Return bits per byte with three decimals, and more below 0.01, so that two figures stay apart.

    >>> decimals(0.1234), decimals(0.0042), decimals(0.00042), decimals(0)
    ('0.123', '0.0042', '0.00042', '0')
    """
    if value == 0:
        return "0"
    return f"{value:.3f}" if abs(value) >= 0.01 else f"{value:.4f}" if abs(value) >= 0.001 else f"{value:.5f}"


def number(value: Number) -> Figure:
    """Return `0.123 [0.100, 0.150]`, or why there is none."""
    if not isinstance(value, Interval):
        return Figure(f"undefined: {value.undefined}")
    return Figure(f"{decimals(value.estimate)} [{decimals(value.low)}, {decimals(value.high)}]")


def size(count: float) -> str:
    """Return bytes as people read them, in powers of 1000.

    >>> size(113175416), size(999)
    ('113 MB', '999 bytes')
    """
    for unit in _UNITS:
        if abs(count) < 999.5 or unit == _UNITS[-1]:
            return f"{count:.0f} {unit}" if count >= 99.5 or unit == "bytes" else f"{count:.3g} {unit}"
        count /= 1000
    raise AssertionError  # the last unit takes everything


def is_hub_id(model: str) -> bool:
    """Return whether a model's name in an artifact is one of the Hub, rather than a folder of somebody's machine."""
    return _HUB_ID.fullmatch(model) is not None


def model_words(model: str) -> str:
    """Return the name of a model without the folders that it lay in."""
    return model if is_hub_id(model) else model.rstrip("/").rsplit("/", 1)[-1]


def layer_words(layers: Sequence[int]) -> str:
    """Return `layer 3` or `layers 3, 5`."""
    return f"layer{'s' * (len(layers) != 1)} {', '.join(map(str, layers))}"


def plan_words(plan: ProtectionPlan) -> str:
    """Say what a plan keeps wider than its grid, as a clause; more than a few parts are counted, not listed."""
    layers, others = plan.protected_layers, describe_overrides(plan)
    parts = [f"{layer_words(layers)} in 16 bit"] if layers else []
    if len(plan.overrides) > _LISTED:
        kinds = Counter(plan.overrides.values())
        parts += [f"{count} parts of layers in {precision_words(kind)}" for kind, count in kinds.items()]
    else:
        parts += [others] if others else []
    parts += [f"{100 * plan.protect_columns:.3g} % of all input channels in 16 bit"] if plan.protect_columns else []
    rest = plan.grid.numbers
    return f"{'; '.join(parts)}; all else in {rest}" if parts else f"all layers in {rest}, nothing protected"
