"""What a checkpoint answered to a few prompts in every language, beside the 16-bit model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

Fault = Literal["empty", "repeats itself", "other script"]
"""What is wrong with an answer whatever it says: no letter or digit; one piece again and again; mostly letters of a
script that the prompts of its language are not written in."""
FAULTS: tuple[Fault, ...] = get_args(Fault)

ENOUGH = 3
"""Answers of a language that count as all it says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One prompt, and how the two models went on."""

    prompt: str
    sixteen_bit: str
    checkpoint: str
    sixteen_bit_faults: tuple[Fault, ...]
    checkpoint_faults: tuple[Fault, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LanguageAnswers:
    """The answers in one language."""

    language: str
    answers: tuple[Answer, ...]

    def counts(self, fault: Fault) -> tuple[int, int]:
        """Return how many answers have a fault: of the 16-bit model, and of the checkpoint."""
        before = sum(fault in answer.sixteen_bit_faults for answer in self.answers)
        return before, sum(fault in answer.checkpoint_faults for answer in self.answers)

    @property
    def new_faults(self) -> tuple[Fault, ...]:
        """Faults of the checkpoint that the 16-bit model shows in no answer of the language."""
        return tuple(fault for fault in FAULTS if self.counts(fault)[0] == 0 < self.counts(fault)[1])

    @property
    def broken(self) -> bool:
        """Whether every answer of the checkpoint has a fault and no answer of the 16-bit model, of `ENOUGH` or more."""
        return len(self.answers) >= ENOUGH and self.faulty == (0, len(self.answers))

    @property
    def faulty(self) -> tuple[int, int]:
        """How many answers have any fault: of the 16-bit model, and of the checkpoint."""
        before = sum(bool(answer.sixteen_bit_faults) for answer in self.answers)
        return before, sum(bool(answer.checkpoint_faults) for answer in self.answers)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """All languages. Greedy: every token is the likeliest one, and penalties of the generation config do not act."""

    source: str
    """`bundled`, or the name of a file of prompts."""
    chat_template: bool
    """Whether a prompt was put into the tokenizer's chat template; else the text is continued as it is."""
    new_tokens: int
    """The most that an answer has; one that the model ends itself is shorter."""
    dtype: str
    """What both models were computed in."""
    languages: tuple[LanguageAnswers, ...]
    not_asked: dict[str, str] = field(default_factory=dict)
    """Measured language → why it was not asked."""

    @property
    def prompts(self) -> int:
        """Prompts of each language."""
        return max((len(row.answers) for row in self.languages), default=0)

    def example(self) -> tuple[str, Answer] | None:
        """Return language and answer of the clearest new fault, for people to read; None where there is none."""
        faulty = [
            (row, answer)
            for row in self.languages
            for answer in row.answers
            if set(answer.checkpoint_faults) & set(row.new_faults)
        ]
        if not faulty:
            return None
        row, answer = max(faulty, key=lambda pair: pair[0].faulty[1] - pair[0].faulty[0])
        return row.language, answer
