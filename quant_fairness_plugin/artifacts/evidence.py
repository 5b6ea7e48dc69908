"""What a plan is worth: against plans that needed no search, and with protection against without."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import ConfigDict

from quant_fairness_plugin.artifacts.checkpoints import ExportRecord
from quant_fairness_plugin.artifacts.grids import Grid
from quant_fairness_plugin.artifacts.measurements import Measurement
from quant_fairness_plugin.artifacts.names import Precision
from quant_fairness_plugin.artifacts.numbers import Interval, Number, Undefined
from quant_fairness_plugin.artifacts.plans import ProtectionPlan
from quant_fairness_plugin.artifacts.provenance import NO_SURPRISES, Provenance

Outcome = Literal["beaten", "not beaten", "better", "undefined"]
"""Of a control, against the plan: `not beaten` means that the sentences cannot tell the two apart."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """Where a value stands among those of random plans."""

    percentile: float
    """Percent of the random plans that are worse; ties count half. 100: better than all of them."""
    low: float
    high: float
    """95 % interval of the percentile, exact binomial: what another draw of so many random plans could have said."""
    random_plans: int
    p_value: float
    """One-sided: the chance of a random plan at least as good, the plan itself counted as one of them."""
    over_sentences: Interval | None
    """The percentile again under resampled sentences, with the same random plans; None where only values were given."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A plan against one control."""

    control: str
    difference: Number
    """Objective of the control minus that of the plan: above 0, the plan is better."""
    adjusted_p: float | None
    """Two-sided, Benjamini-Hochberg adjusted over the controls."""
    outcome: Outcome


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontierRow:
    """One plan, and what is better than it."""

    plan: str
    bytes_: int
    worst: Number
    """Harm of the language that is hurt most; lower is better."""
    mean: Number
    dominated_by: tuple[str, ...]
    """Plans that are nowhere worse and somewhere better, in bytes, worst and mean harm; smallest first."""
    on_frontier_probability: float | None
    """Share of the resamples in which nothing dominates the plan; None where a harm is undefined."""

    @property
    def on_frontier(self) -> bool:
        """Whether the plan has figures and nothing dominates them."""
        return self.on_frontier_probability is not None and not self.dominated_by


@dataclass(frozen=True, slots=True, kw_only=True)
class Frontier:
    """All plans by bytes, then by worst harm."""

    rows: tuple[FrontierRow, ...]

    @property
    def plans(self) -> tuple[str, ...]:
        """The plans that nothing dominates, smallest first."""
        return tuple(row.plan for row in self.rows if row.on_frontier)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvidenceRow:
    """One plan that was evaluated."""

    name: str
    """`the plan`, `none`, `random 3`, `first`, `kurtosis`, …"""
    precisions: dict[str, Precision]
    """Of the units that are not on the grid."""
    bytes_: int
    matched: bool
    """Equal bytes to the plan's, within half of the cheapest layer."""
    worst: Number
    """KL in bits per byte of the language that is hurt most."""
    mean: Number
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What a plan is worth, on the confirm part."""

    __pydantic_config__: ClassVar[ConfigDict] = NO_SURPRISES

    schema_version: Literal[1] = 1
    kind: Literal["evidence"] = "evidence"
    provenance: Provenance
    plan: ProtectionPlan
    objective: str
    """What plans were compared by, such as `worst` or `mean`."""
    grid: Grid
    bank: str
    """The weights that all plans were evaluated with; a checkpoint's own figures come from the checkpoint."""
    languages: tuple[str, ...]
    """Those that the 16-bit model supports: the ones that count."""
    rows: tuple[EvidenceRow, ...]
    standing: Standing | Undefined
    """Of the plan among the random ones."""
    comparisons: tuple[Comparison, ...]
    """With all others of equal bytes or fewer: a plan that needs fewer and is better is the worst rebuke."""
    frontier: Frontier
    verdict: str
    """In words, also where protection does not help."""
    condition: str = ""
    """What keeps the sentences from being held out, as one sentence; empty where nothing was selected on them."""

    def row(self, name: str) -> EvidenceRow:
        """The row of that name.

        Raises:
            KeyError: there is none.
        """
        return next(row for row in self.rows if row.name == name)


@dataclass(frozen=True, slots=True)
class RunResult:
    """What `run` made: the plan, the checkpoint's record, and the damage without and with protection."""

    plan: ProtectionPlan
    record: ExportRecord
    unprotected: Measurement
    protected: Measurement
    gain: Number
    """Worst language's KL without protection minus with it, in bits per byte: above 0, protection helped."""

    @property
    def verdict(self) -> str:
        """What protection bought, in one sentence, with what keeps the sentences from being held out."""
        condition = f" ({self.protected.condition})" if self.protected.condition else ""
        return f"{self._gain_in_words}{condition}"

    @property
    def _gain_in_words(self) -> str:
        if not (self.plan.protected_layers or self.plan.overrides or self.plan.protect_columns):
            return "nothing was protected"
        if isinstance(self.gain, Undefined):
            return f"what protection bought is undefined: {self.gain.undefined}"
        figures = f"{self.gain.estimate:.5f} [{self.gain.low:.5f}, {self.gain.high:.5f}] bits per byte"
        if self.gain.low > 0:
            return f"protection lowered the worst language's KL by {figures}"
        if self.gain.high < 0:
            return f"protection did not help: it changed the worst language's KL by {figures} for the worse"
        return f"protection did not measurably help: it lowered the worst language's KL by {figures}, which includes 0"
