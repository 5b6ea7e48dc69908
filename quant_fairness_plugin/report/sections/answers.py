"""What the checkpoint wrote to a few prompts, beside the 16-bit model."""

from __future__ import annotations

from quant_fairness_plugin.artifacts import FAULTS, Answer, Answers, LanguageAnswers
from quant_fairness_plugin.report import charts
from quant_fairness_plugin.report.section import Key, Picture, Section, Table, joined
from quant_fairness_plugin.report.words import Cell, Language, Written

_FAULTS = (
    "What counts as a fault?",
    "What can be seen without knowing the language: no letter or figure at all; one piece three times or more behind "
    "itself that fills half of the answer; or mostly letters of another script than the prompts'. Whether an answer is "
    "true, polite or in the right language of its script was not looked at: read a few.",
)
_GREEDY = (
    "How were they asked?",
    "Both models take the likeliest token each time, without the penalties of their settings, so that the answers are "
    "the same on every run. A small 16-bit model repeats itself, too; only what it does not do counts against the "
    "checkpoint.",
)


def answers_section(answers: Answers) -> Section | None:
    """Return the part; None where no language was asked."""
    if not answers.languages:
        return None
    rows = sorted(answers.languages, key=lambda row: (not row.new_faults, row.faulty[0] - row.faulty[1]))
    return Section(
        name="answers",
        title="What it answers",
        level="practitioner",
        lead=_lead(answers),
        picture=Picture.of(lambda width: _chart(rows, width), _lead(answers)),
        keys=(
            Key(symbol="shade-low", text="no answer has the fault"),
            Key(symbol="shade-high", text="all have it; in figures: 16-bit model → this checkpoint"),
        ),
        table=_table(rows),
        table_open=any(row.new_faults for row in rows),
        notes=(_FAULTS, _GREEDY, *_left_out(answers)),
    )


def _lead(answers: Answers) -> str:
    through = "through the chat template" if answers.chat_template else "as texts to go on with"
    asked = (
        f"{answers.prompts} prompts in {len(answers.languages)} languages, {through}, up to {answers.new_tokens} tokens"
    )
    new = [Language.of(row.language).name for row in answers.languages if row.new_faults]
    before, after = (sum(row.faulty[state] for row in answers.languages) for state in (0, 1))
    total = sum(len(row.answers) for row in answers.languages)
    faults = f"{after} of {total} answers of this checkpoint have a fault, {before} of the 16-bit model's"
    where = f"in {joined(new)} it shows one that the 16-bit model does not" if new else "none is new"
    return f"{asked}. {faults}; {where}."


def _chart(rows: list[LanguageAnswers], width: int) -> object:
    cells = [
        charts.Tile(
            row=Language.of(row.language).label,
            column=fault,
            shade=round((charts.CLASSES - 1) * row.counts(fault)[1] / len(row.answers)),
            text="{} → {} of {}".format(*row.counts(fault), len(row.answers)),
        )
        for row in rows
        for fault in FAULTS
    ]
    return charts.tiles(cells, columns=list(FAULTS), width=width)


def _table(rows: list[LanguageAnswers]) -> Table:
    def cells(row: LanguageAnswers, answer: Answer) -> tuple[Cell, ...]:
        # The last token can end within a character.
        written = (answer.prompt, *(text.rstrip("\ufffd") for text in (answer.sixteen_bit, answer.checkpoint)))
        texts = (Written(text, row.language) for text in written)
        return Language.of(row.language), *texts, ", ".join(answer.checkpoint_faults) or "none"

    columns = ("language", "prompt", "the 16-bit model", "this checkpoint", "faults of this checkpoint")
    return Table(
        caption="Every prompt with both answers; languages with new faults first.",
        columns=columns,
        rows=tuple(cells(row, answer) for row in rows for answer in row.answers),
    )


def _left_out(answers: Answers) -> list[tuple[str, str]]:
    said = "; ".join(f"{Language.of(name).label}: {reason}" for name, reason in answers.not_asked.items())
    return [("Which languages were not asked, and why?", f"{said}.")] if said else []
