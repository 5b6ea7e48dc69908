"""Which language loses how much, before and after protection."""

from __future__ import annotations

from collections.abc import Sequence

from quant_fairness_plugin.artifacts import LanguageDamage
from quant_fairness_plugin.artifacts.gates import Gate
from quant_fairness_plugin.report import charts
from quant_fairness_plugin.report.compared import Compared
from quant_fairness_plugin.report.section import Key, Picture, Section, Table
from quant_fairness_plugin.report.words import Cell, Figure, Language, decimals, number

_FAR = 2.0
"""A bound beyond so many times the largest figure is not drawn: the figures would be squeezed to its left."""
_LOSS = (
    "What is a loss?",
    "At every place of a text a language model gives each possible next token a probability. The loss is how far these "
    "probabilities moved from those of the 16-bit model (Kullback-Leibler divergence), in bits per byte of text, so "
    "that languages with long and short tokens can be compared. 0 means that nothing changed. The changed next tokens "
    "are the places where another token is now the most likely one.",
)
_INTERVAL = (
    "What are the lines beside the points?",
    "95 % intervals: the sentences are a sample, and another sample of the same kind would have given figures in about "
    "this range (bootstrap over sentences). Where the intervals of two languages overlap widely, do not read much into "
    "their order.",
)


def damage_section(compared: Compared, gate: Gate) -> Section:
    """Return the first part of the page: the loss of each language, the largest first."""
    rows = in_order(compared.after)
    counted = [row for row in rows if row.status != "unsupported"]
    old = {row.language: row for row in compared.before}
    dots = _dots(counted, old, compared)
    bound = gate.most if gate.objective == "worst" else None
    near = bound if bound is not None and dots and bound <= _FAR * max(dot.high for dot in dots) else None
    return Section(
        name="damage",
        title="What each language loses",
        level="tldr",
        lead=_lead(counted, old),
        picture=Picture.of(
            lambda width: charts.intervals(dots, states=_states(compared), bound=near, width=width),
            _text(counted, old),
        )
        if counted
        else None,
        keys=_keys(compared, bound, drawn=near is not None),
        table=_table(rows, old, compared),
        table_open=not counted,
        notes=(_LOSS, _INTERVAL, *_left_out(rows)),
    )


def in_order(rows: Sequence[LanguageDamage]) -> list[LanguageDamage]:
    """Return languages by their loss, the largest first, and last what the 16-bit model does not know."""
    return sorted(rows, key=lambda row: (row.status == "unsupported", -row.kl_bits_per_byte.estimate))


def _states(compared: Compared) -> list[str]:
    return [compared.name_before, compared.name_after] if compared.before else [compared.name_after]


def _dots(rows: Sequence[LanguageDamage], old: dict[str, LanguageDamage], compared: Compared) -> list[charts.Dot]:
    pairs = [
        (state, row)
        for after in rows
        for state, row in ((compared.name_before, old.get(after.language)), (compared.name_after, after))
        if row is not None
    ]
    return [
        charts.Dot(
            label=Language.of(row.language).label,
            state=state,
            estimate=row.kl_bits_per_byte.estimate,
            low=row.kl_bits_per_byte.low,
            high=row.kl_bits_per_byte.high,
            text=decimals(row.kl_bits_per_byte.estimate) + (" collapsed" if row.status == "collapsed" else ""),
        )
        for state, row in pairs
    ]


def _text(rows: Sequence[LanguageDamage], old: dict[str, LanguageDamage]) -> str:
    figures = [_change(row, old.get(row.language)) for row in rows]
    return f"Loss of each language in bits per byte, the largest first: {'; '.join(figures)}."


def _change(row: LanguageDamage, before: LanguageDamage | None) -> str:
    after = decimals(row.kl_bits_per_byte.estimate)
    was = f"{decimals(before.kl_bits_per_byte.estimate)} before, {after} after" if before else after
    return f"{Language.of(row.language).name} {was}"


def _lead(rows: Sequence[LanguageDamage], old: dict[str, LanguageDamage]) -> str:
    if not rows:
        return "The 16-bit model knows none of these languages, so there is no loss to show."
    first, last = rows[0], rows[-1]
    names = [Language.of(row.language).name for row in (first, last)]
    most, least = (decimals(row.kl_bits_per_byte.estimate) for row in (first, last))
    text = f"{names[0]} loses most, {most} bits per byte"
    text += f"; {names[1]} least, {least}." if len(rows) > 1 else "."
    better = [r for r in rows if r.language in old and old[r.language].kl_bits_per_byte.low > r.kl_bits_per_byte.high]
    if not old:
        return text
    return f"{text} Protection clearly lowered the loss of {len(better)} of {len(rows)} languages (intervals apart)."


def _keys(compared: Compared, bound: float | None, *, drawn: bool) -> tuple[Key, ...]:
    keys = [Key(symbol="after", text=compared.name_after)]
    if compared.before:
        keys.insert(0, Key(symbol="before", text=compared.name_before))
    if bound is not None:
        where = "" if drawn else ", far to the right of this picture"
        keys.append(Key(symbol="dashed", text=f"what the verdict accepts: {bound:g} bits per byte{where}"))
    return tuple(keys)


def _table(rows: Sequence[LanguageDamage], old: dict[str, LanguageDamage], compared: Compared) -> Table:
    columns = ["language", "16-bit model, bits per byte"]
    columns += [f"loss, {compared.name_before}"] if old else []
    columns += ["loss [95 % interval]", "ΔBPB [95 % interval]", "changed next tokens", "status"]

    def cells(row: LanguageDamage) -> tuple[Cell, ...]:
        before = old.get(row.language)
        was: list[Cell] = [number(before.kl_bits_per_byte) if before else "not measured"] if old else []
        return (
            Language.of(row.language),
            Figure(decimals(row.baseline_bpb)),
            *was,
            number(row.kl_bits_per_byte),
            number(row.delta_bpb),
            Figure(f"{row.flip_rate.estimate:.0%}"),
            row.status,
        )

    caption = "Loss: KL divergence from the 16-bit model. ΔBPB: bits per byte that the text itself costs more."
    return Table(caption=caption, columns=tuple(columns), rows=tuple(cells(row) for row in rows))


def _left_out(rows: Sequence[LanguageDamage]) -> list[tuple[str, str]]:
    reasons = [f"{Language.of(row.language).label}: {row.status}, {row.reason}." for row in rows if row.reason]
    return [("Which languages do not count, and why?", " ".join(reasons))] if reasons else []
