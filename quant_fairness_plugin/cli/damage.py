"""What quantization did to each language, as a table of 80 columns: one line a language, the worst one bold.

Rendered from artefacts alone. Figures are thousandths of a bit per byte; `--details` has intervals and all columns.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from quant_fairness_plugin.artifacts import Interval, LanguageDamage, Measurement, Number
from quant_fairness_plugin.cli.say import say
from quant_fairness_plugin.cli.tables import number
from quant_fairness_plugin.texts.languages import language_name

BAR = 16
"""Characters of the longest bar."""
_NAME = 14
"""Characters of a language's name; a longer one is cut."""
_FIGURE = re.compile(r"\d[\d.]*")
_EIGHTHS = " ▏▎▍▌▋▊▉█"
_STARTS = {
    "encoded": "as the tokenizer encodes them",
    "bos": "behind BOS",
    "eos": "behind EOS",
    "chat": "as the chat template begins a user's message",
    "plain": "with nothing in front",
}
_UNIT = "In thousandths of a bit per byte; * = the 95 % interval excludes 0"


def damage_table(measurement: Measurement, *, title: str) -> Table:
    """Return the damage of one state: loss (ΔBPB), KL with a bar, changed top-1 tokens."""
    table = _table(_labelled(title, measurement), "16 bit", "loss", "KL", "", "changed")
    rows = _in_order(measurement.languages)
    longest = max((_kl(row) for row in rows if row.status == "supported"), default=0.0)
    for row in rows:
        cells = [f"{row.baseline_bpb:.3f}", _loss(row.delta_bpb), f"{1000 * _kl(row):.0f}"]
        filled = bar(_kl(row), longest) if row.status == "supported" else row.status
        _add(table, row, [*cells, filled, f"{row.flip_rate.estimate:.0%}"], worst=_kl(row) == longest)
    return table


def baseline_table(measurement: Measurement, *, title: str) -> Table:
    """Return what the 16-bit model itself needs in each language, and how long its tokens are."""
    table = _table(_labelled(title, measurement), "bits per byte", "bytes per token", "sentences", "")
    for row in _in_order(measurement.languages):
        cells = [f"{row.baseline_bpb:.3f}", f"{row.bytes_ / row.tokens:.1f}", str(row.sentences)]
        _add(table, row, [*cells, "" if row.status == "supported" else row.status], worst=False)
    return table


def comparison_table(unprotected: Measurement, protected: Measurement, *, title: str) -> Table:
    """Return the damage without and with the plan: loss and KL, with a bar of what is left and what went."""
    table = _table(_labelled(title, protected), "16 bit", "loss", "→ plan", "KL", "→ plan", "")
    before, after = (_in_order(measurement.languages) for measurement in (unprotected, protected))
    both = list(zip(before, after, strict=True))
    longest = max((max(_kl(a), _kl(b)) for a, b in both if b.status == "supported"), default=0.0)
    most = max((_kl(b) for _, b in both if b.status == "supported"), default=0.0)
    for old, new in both:
        cells = [f"{old.baseline_bpb:.3f}", _loss(old.delta_bpb), _loss(new.delta_bpb)]
        cells += [f"{1000 * _kl(old):.0f}", f"{1000 * _kl(new):.0f}"]
        bars = _two_bars(_kl(new), _kl(old), longest) if new.status == "supported" else new.status
        _add(table, new, [*cells, bars], worst=_kl(new) == most)
    table.add_section()
    for name, left, right in (
        ("worst", unprotected.worst_kl, protected.worst_kl),
        ("mean", unprotected.mean_kl, protected.mean_kl),
    ):
        table.add_row(name, "", "", "", _thousandths(left), _thousandths(right), "")
    return table


def damage_notes(measurement: Measurement, *, changed: bool = True) -> list[str]:
    """Return what stands under a table of damage: its unit, and the notes on its languages and sentences.

    Args:
        measurement: what the table shows.
        changed: whether it has the column of changed tokens.
    """
    return [f"{_UNIT}; changed = other top-1 token" if changed else _UNIT, *language_notes(measurement)]


def language_notes(measurement: Measurement) -> list[str]:
    """Return why languages do not count, each reason once, how texts begin, and whether the sentences were new."""
    alike: dict[str, list[LanguageDamage]] = {}
    for row in _in_order(measurement.languages):
        if row.reason:
            alike.setdefault(_FIGURE.sub("", row.reason), []).append(row)
    reasons = []
    for rows in alike.values():
        first, *others = rows
        more = f" (figures of {first.language}; the others' are in --details)" if others else ""
        reasons.append(f"{', '.join(row.language for row in rows)}: {first.reason}{more}")
    start = measurement.provenance.start
    begun = [f"Texts begin {_STARTS[start]}; --start chooses"] if start in _STARTS else []
    return [*reasons, *begun, *filter(None, [measurement.condition])]


def show_notes(notes: Sequence[str]) -> None:
    """Print what stands under a table, in grey on a terminal."""
    say("\n".join(notes), dim=True)


def detailed_damage_table(measurement: Measurement, *, title: str) -> Table:
    """Return a table with one row a language and every interval: baseline BPB, ΔBPB, KL, excess, flips."""
    table = Table(
        "language",
        "16-bit BPB",
        "ΔBPB",
        "KL bits/byte",
        "excess ΔBPB",
        "flips",
        "status",
        title=_labelled(title, measurement),
    )
    for row in measurement.languages:
        table.add_row(
            row.language,
            f"{row.baseline_bpb:.3f}",
            number(row.delta_bpb),
            number(row.kl_bits_per_byte),
            number(row.excess_bpb),
            f"{row.flip_rate.estimate:.1%}",
            row.status if not row.reason else f"{row.status}: {row.reason}",
        )
    return table


def detailed_comparison_table(unprotected: Measurement, protected: Measurement, *, title: str) -> Table:
    """Return a table by language with every interval: the 16-bit model, then quantized without and with the plan."""
    table = Table(
        "language",
        "16-bit BPB",
        "ΔBPB, none",
        "ΔBPB, plan",
        "KL, none",
        "KL, plan",
        "status",
        title=_labelled(title, protected),
    )
    for before, after in zip(unprotected.languages, protected.languages, strict=True):
        table.add_row(
            before.language,
            f"{before.baseline_bpb:.3f}",
            number(before.delta_bpb),
            number(after.delta_bpb),
            number(before.kl_bits_per_byte),
            number(after.kl_bits_per_byte),
            before.status,
        )
    table.add_section()
    for name, left, right in (
        ("worst KL", unprotected.worst_kl, protected.worst_kl),
        ("mean KL", unprotected.mean_kl, protected.mean_kl),
    ):
        table.add_row(name, "", "", "", number(left), number(right), "supported only")
    return table


def _labelled(title: str, measurement: Measurement) -> str:
    """Return the title, with a loud word where the sentences were used to make what is measured."""
    return f"{title}: NOT HELD OUT" if measurement.held_out is False else title


def bar(value: float, longest: float) -> str:
    """Return a bar of up to `BAR` characters, in eighths of one; a value above 0 has at least one eighth.

    >>> bar(1.0, 2.0)
    '████████'
    """
    if longest <= 0 or value <= 0:
        return ""
    eighths = max(1, round(8 * BAR * value / longest))
    return (_EIGHTHS[8] * (eighths // 8) + _EIGHTHS[eighths % 8]).strip()


def _two_bars(after: float, before: float, longest: float) -> Text:
    """Return a bar of what is left, and in a lighter shade what went."""
    left = bar(after, longest)
    gone = round(BAR * before / longest) - len(left) if longest > 0 else 0
    return Text(left) + Text("░" * max(0, gone), style="dim")


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, box=None, pad_edge=False, title_justify="left")
    table.add_column("language")
    for name in columns:
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    return table


def _add(table: Table, row: LanguageDamage, cells: Sequence[str | Text], *, worst: bool) -> None:
    supported = row.status == "supported"
    style = "bold" if supported and worst else "" if supported else "dim"
    table.add_row(language_label(row.language), *cells, style=style)


def language_label(tag: str) -> str:
    """Return the name of a language, cut where it is long, and its tag."""
    name = language_name(tag)
    short = name if len(name) <= _NAME else f"{name[: _NAME - 1]}…"
    return f"{short} {tag}"


def _in_order(rows: Sequence[LanguageDamage]) -> list[LanguageDamage]:
    """Return the languages as the text set has them, those that do not count last."""
    return sorted(rows, key=lambda row: row.status != "supported")


def _kl(row: LanguageDamage) -> float:
    return row.kl_bits_per_byte.estimate


def _loss(loss: Interval) -> str:
    return f"{1000 * loss.estimate:.0f}{'*' if loss.low > 0 or loss.high < 0 else ' '}"


def _thousandths(value: Number) -> str:
    return f"{1000 * value.estimate:.0f}" if isinstance(value, Interval) else "undefined"
