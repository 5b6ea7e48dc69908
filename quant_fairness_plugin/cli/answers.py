"""What the checkpoint answered, beside the 16-bit model, in 80 columns; `--details` has every answer."""

from __future__ import annotations

from collections.abc import Iterator

import typer
from rich.cells import cell_len, set_cell_size
from rich.table import Table

from quant_fairness_plugin.artifacts import FAULTS, Answer, Answers, LanguageAnswers, Measurement, Undefined
from quant_fairness_plugin.cli.damage import language_label
from quant_fairness_plugin.cli.say import say
from quant_fairness_plugin.cli.tables import show

WIDTH = 80
_INDENT = 14


def show_answers(measurement: Measurement, *, details: bool) -> None:
    """Print how many answers are faulty, and the clearest one; or that nothing was asked, with the reason."""
    answers = measurement.answers
    if isinstance(answers, Undefined):
        say(f"No prompts were asked: {answers.undefined}")
    elif answers is not None:
        say(summary(answers))
        if any(row.faulty != (0, 0) for row in answers.languages):
            show(fault_table(answers))
        for line in _every(answers) if details else _example(answers):
            typer.echo(line)


def summary(answers: Answers) -> str:
    """Return what was asked, and that nothing is wrong where that is so."""
    through = "the chat template" if answers.chat_template else "no chat template"
    asked = f"Answers to {answers.prompts} prompts in {len(answers.languages)} languages"
    how = f"(at most {answers.new_tokens} tokens, greedy, {answers.dtype}, {through})"
    if any(row.faulty != (0, 0) for row in answers.languages):
        return f"{asked} {how}, 16-bit model → checkpoint:"
    return f"{asked}: of either model none is empty, repeats itself or is in another script {how}"


def fault_table(answers: Answers) -> Table:
    """Return how many answers have each fault, 16 bit → checkpoint; languages without any are left out."""
    table = Table(box=None, pad_edge=False)
    table.add_column("language")
    for fault in FAULTS:
        table.add_column(fault, justify="right", no_wrap=True)
    for row in answers.languages:
        if row.faulty != (0, 0):
            table.add_row(language_label(row.language), *_cells(row), style="bold" if row.new_faults else "")
    return table


def _cells(row: LanguageAnswers) -> Iterator[str]:
    for fault in FAULTS:
        before, after = row.counts(fault)
        yield f"{before} → {after} of {len(row.answers)}" if before or after else "0"


def _example(answers: Answers) -> Iterator[str]:
    example = answers.example()
    if example is not None:
        yield from _lines(*example)


def _every(answers: Answers) -> Iterator[str]:
    for row in answers.languages:
        for answer in row.answers:
            yield from _lines(row.language, answer)


def _lines(language: str, answer: Answer) -> Iterator[str]:
    """Yield a prompt and both answers, a line each, cut to the width; Chinese takes two columns a character."""
    for name, text in (
        (f"{language} asked", answer.prompt),
        ("  16 bit", answer.sixteen_bit),
        ("  checkpoint", answer.checkpoint),
    ):
        # The last token can end within a character.
        shown, room = " ".join(text.split()).rstrip("\ufffd"), WIDTH - _INDENT
        cut = shown if cell_len(shown) <= room else f"{set_cell_size(shown, room - 1).rstrip()}…"
        yield f"{name:<{_INDENT}}{cut}".rstrip()
