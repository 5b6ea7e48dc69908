"""What states are ranked by: one record per objective. A new objective is one entry of `OBJECTIVES`.

An objective makes one figure of what a state does to all languages; lower is better. Everything that ranks, searches,
allocates or compares takes the name of an objective and finds its record here. No torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from quant_fairness_plugin.artifacts import StateScores
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.measure.metrics import Array, kl_bits_per_byte


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """How the figures of all languages become one."""

    name: str
    description: str
    """One line, for help and reports."""
    figure: Literal["kl", "bpb"] = "kl"
    """What it is made of: each language's KL in bits per byte, or its ΔBPB."""
    over: Callable[[Array], Array]
    """[rows, languages] → [rows]: over all languages, or all but the reference where it is set against that."""
    against: Literal["difference", "ratio"] | None = None
    """What is done with the reference language's figure: subtracted, divided by, or nothing."""
    sums: Callable[[Array], Array] | None = None
    """Importance [languages], the largest 1 → [rows, languages]: the objective of weighted KLs is the largest row of
    this matrix times the KLs. None where it is no such maximum, so that it cannot be predicted unit by unit."""

    @property
    def unit(self) -> str:
        """The unit of the figure."""
        return "ratio" if self.against == "ratio" else "bits per byte"

    @property
    def needs_reference(self) -> bool:
        """Whether it is set against a reference language. It then falls when that one is hurt: never a default."""
        return self.against is not None

    @property
    def adds_up(self) -> bool:
        """Whether it can be predicted by adding up what single units do to each language."""
        return self.sums is not None

    @property
    def judges_sets(self) -> bool:
        """Whether it is made of KL alone: above 0 for every state, collapsed ones included, as factors need."""
        return self.figure == "kl" and not self.needs_reference

    def problem(self, languages: Sequence[str], reference: str | None) -> str:
        """Return why it cannot be computed for these languages; empty where it can."""
        if not self.needs_reference:
            return ""
        if reference is None:
            return "no reference language was given"
        if reference not in languages:
            return f"the reference language {reference} is not among the supported languages"
        return "" if len(languages) > 1 else f"there is no language besides the reference {reference}"

    def terms(self, figures: Array, languages: Sequence[str], reference: str | None) -> tuple[Array, Array | None]:
        """Return the two terms of the objective, the second one only where there is a reference to set it against.

        Args:
            figures: its figure of each language, [rows, languages].
            languages: their tags, in the order of the columns.
            reference: one of them, for objectives that need one.

        Returns:
            [rows] over the languages, and the reference's [rows] or None.
        """
        if not self.needs_reference:
            return self.over(figures), None
        is_reference = np.array([language == reference for language in languages])
        return self.over(figures[:, ~is_reference]), figures[:, is_reference][:, 0]

    def series(self, figures: Array, languages: Sequence[str], reference: str | None) -> Array:
        """Return the objective in every row [rows], from the arguments of `terms`.

        A ratio is NaN where the reference did not lose anything.
        """
        value, base = self.terms(figures, languages, reference)
        if base is None:
            return value
        if self.against == "difference":
            return value - base
        ratio: Array = np.divide(value, base, out=np.full(len(base), np.nan), where=base > 0)
        return ratio

    def of_scores(self, state: StateScores, languages: Sequence[str]) -> float:
        """Return the objective over all sentences, where it `judges_sets`: no baseline and no reference are needed.

        Args:
            state: scores of the state.
            languages: those that count.
        """
        rows = [state.languages[language] for language in languages]
        kl = [kl_bits_per_byte(float(sum(row.kl_nats)), float(sum(row.bytes_))) for row in rows]
        return self.of_figures(kl)

    def of_figures(self, figures: Sequence[float]) -> float:
        """Return one figure from that of each language, where there is no reference to set it against."""
        return float(self.over(np.array([figures]))[0])


def _largest(figures: Array) -> Array:
    largest: Array = figures.max(axis=1)
    return largest


def _mean(figures: Array) -> Array:
    mean: Array = figures.mean(axis=1)
    return mean


def _each_by_itself(importance: Array) -> Array:
    """One row per language that counts: the largest of them is the worst language's."""
    rows: Array = np.diag(importance)[importance > 0]
    return rows


def _all_in_one(importance: Array) -> Array:
    row: Array = (importance / importance.sum())[None]
    return row


OBJECTIVES: dict[str, Objective] = {
    objective.name: objective
    for objective in (
        Objective(
            name="worst",
            description="KL of the language that is hurt most",
            over=_largest,
            sums=_each_by_itself,
        ),
        Objective(name="mean", description="mean KL of the languages", over=_mean, sums=_all_in_one),
        Objective(name="bpb", description="mean rise of bits per byte", figure="bpb", over=_mean),
        Objective(
            name="excess",
            description="largest rise of bits per byte, minus the reference language's",
            figure="bpb",
            over=_largest,
            against="difference",
        ),
        Objective(
            name="disparity",
            description="mean rise of bits per byte of the other languages, over the reference language's",
            figure="bpb",
            over=_mean,
            against="ratio",
        ),
    )
}
"""By name, in the order of help and reports. `worst` and `mean` count the reference language as any other."""


def find_objective(name: str) -> Objective:
    """Return the objective of a name.

    Raises:
        ConfigError: there is none.
    """
    if name not in OBJECTIVES:
        raise ConfigError(f"objective {name!r} is not known; use one of {', '.join(OBJECTIVES)}")
    return OBJECTIVES[name]


def objectives_that(condition: Callable[[Objective], bool]) -> tuple[str, ...]:
    """Return the names of the objectives that meet a condition."""
    return tuple(name for name, objective in OBJECTIVES.items() if condition(objective))


def set_objectives() -> tuple[str, ...]:
    """Return the names of the objectives that sets of units are searched, tested and compared by."""
    return objectives_that(lambda objective: objective.judges_sets)


def additive_objectives() -> tuple[str, ...]:
    """Return the names of the objectives that precisions can be allocated by."""
    return objectives_that(lambda objective: objective.adds_up)


def one_of(names: Iterable[str]) -> str:
    """Write alternatives for a message: `worst or mean`, `worst, mean or bpb`."""
    *first, last = names
    return f"{', '.join(first)} or {last}" if first else last
