"""What a sweep measured: its plans, what their scores say, and what of it is needed to choose without a model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from pydantic import ConfigDict

from quant_fairness_plugin.artifacts.grids import Grid
from quant_fairness_plugin.artifacts.measurements import LanguageDamage, StateScores
from quant_fairness_plugin.artifacts.names import Granularity, Mode, Precision, SearchMethod, Status
from quant_fairness_plugin.artifacts.numbers import Number, Undefined
from quant_fairness_plugin.artifacts.provenance import NO_SURPRISES, Provenance
from quant_fairness_plugin.artifacts.units import Unit
from quant_fairness_plugin.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepRow:
    """One evaluated plan of a sweep, without its per-sentence scores."""

    plan: str
    """`none` (everything quantized), `protect 3`, `protect 0+3`, `protect 3.down`, `int8 3` or `quantize 3`."""
    mode: Mode | None
    """What the units are singled out for; None where there are none."""
    units: tuple[str, ...]
    """The singled-out units by full name, in forward order: `layers.3` or `layers.3.down`."""
    precision: Precision | None
    """What the singled-out units get: `fp16` under `protect`, `int8` under `int8`, the grid's own under `quantize`."""
    damage: tuple[LanguageDamage, ...]
    objectives: dict[str, Number]
    """Objective name → value on the search part; lower is better."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranking:
    """Units by one objective, best first, with how much the order can be trusted."""

    objective: str
    units: tuple[str, ...]
    """Full names: `layers.3`, or `layers.3.down`."""
    top_probability: tuple[float, ...]
    """Bootstrap probability of each unit (in the order of `units`) to be among the first `top`."""
    top: int
    kendall_tau_halves: float | None
    """Kendall τ between the rankings on two halves of the sentences; None where all values tie."""
    stable: bool
    reason: str

    @property
    def layers(self) -> tuple[int, ...]:
        """The order as layer indices, where the units are whole layers.

        Raises:
            ConfigError: they are fusion groups.
        """
        if not all(map(Unit.is_layer, self.units)):
            raise ConfigError("the ranking is of fusion groups, not of whole layers; read its units instead")
        return tuple(Unit.parse(name).layer for name in self.units)


@dataclass(frozen=True, slots=True, kw_only=True)
class Combinations:
    """How many sets of one size a sweep singled out, in each of its modes."""

    evaluated: int
    possible: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchRecord:
    """How sets of units were looked for, and how many of all there are were evaluated."""

    method: SearchMethod
    width: int
    """Sets that are kept from one generation to the next; 1 unless it is a beam."""
    size: int
    objective: str
    """What sets were compared by, such as `worst` or `mean`."""
    combinations: dict[int, Combinations]
    """Units in a set → how many such sets were compared, of how many; the singles are part of every sweep."""
    best: tuple[str, ...]
    """The best set of `size` that was found."""

    @property
    def coverage(self) -> Combinations:
        """All sizes together."""
        counts = self.combinations.values()
        return Combinations(
            evaluated=sum(count.evaluated for count in counts), possible=sum(count.possible for count in counts)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Synergy:
    """What two units gain together, against what each gains alone."""

    pair: tuple[str, str]
    gain: Number
    """Of protecting both."""
    gains_alone: tuple[Number, Number]
    additive: Number
    """gain(ij) - gain(i) - gain(j): above 0, together they bring more than the sum of each alone."""
    multiplicative: Number
    """D(ij)·D(none) / (D(i)·D(j)): below 1, together they shrink the damage by more than both factors alone would."""
    adjusted_p: float | None
    """Two-sided bootstrap p-value of `additive` = 0, Benjamini-Hochberg adjusted over the pairs; None if undefined."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SynergyMatrix:
    """The synergies of all pairs that were evaluated."""

    units: tuple[str, ...]
    pairs: tuple[Synergy, ...]

    @property
    def possible(self) -> int:
        """How many pairs of these units there are."""
        return len(self.units) * (len(self.units) - 1) // 2

    @property
    def coverage(self) -> str:
        """How many pairs were evaluated, of how many."""
        return f"{len(self.pairs)} of {self.possible} pairs"

    def between(self, first: str, second: str) -> Synergy | None:
        """The synergy of two units in either order; None where their pair was not evaluated."""
        return next((cell for cell in self.pairs if set(cell.pair) == {first, second}), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Necessity:
    """What one change of a chosen set does to the objective."""

    change: str
    """The member that is dropped, or the exchange of one for another unit."""
    rise: Number
    """Objective after the change minus before: above 0, the change hurts."""
    adjusted_p: float | None
    """Two-sided, adjusted over the changes; None where the rise is undefined."""
    necessary: bool
    """The change raises the objective, with an adjusted p-value below 0.05."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NecessityTest:
    """Whether the best evaluated set of its size needs its members."""

    objective: str
    units: tuple[str, ...]
    changes: tuple[Necessity, ...]
    """Every member dropped or exchanged for another unit, as far as the plan after that was evaluated."""
    possible: int
    """How many such changes there are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepReport:
    """Everything a sweep measured: budgets and objectives can be changed later without a model."""

    __pydantic_config__: ClassVar[ConfigDict] = NO_SURPRISES

    schema_version: Literal[3] = 3
    kind: Literal["sweep"] = "sweep"
    provenance: Provenance
    layers: int
    granularity: Granularity
    precisions: tuple[Precision, ...] = ("fp16",)
    """What each unit was singled out at with all others on the grid; sets of units are all in 16 bit."""
    combine: int
    """The most units that a plan singles out."""
    combinations: dict[int, Combinations]
    """Units in a set → how many such sets were evaluated, of how many."""
    grid: Grid
    reference: str | None
    languages: dict[str, Status]
    rows: tuple[SweepRow, ...]
    around: tuple[SweepRow, ...] = ()
    """Plans that also quantize embeddings, positions, biases, norms or the head: simulation only, as no checkpoint
    format stores these quantized. They take no part in rankings and recommendations."""
    rankings: dict[str, Ranking | Undefined]
    """`protect-one worst` and so on, one per mode and objective."""
    search: SearchRecord | None = None
    interactions: dict[str, SynergyMatrix] = field(default_factory=dict)
    """`protect-one worst` and so on, where pairs were evaluated."""
    necessity: tuple[NecessityTest, ...] = ()
    scores: dict[str, StateScores]
    """Per-sentence scores of the 16-bit state and of every plan, on the search part."""
    layer_bytes: dict[str, tuple[int, ...]]
    """Bytes of each layer's linear weights as `fp16`, `quantized` (scales included), `int8` and each other precision of
    the sweep, and of each of its fusion groups as `fp16.down` and so on."""
    other_bytes: int
    """Bytes of everything that is never quantized."""
    condition: str = ""
    """What the search part shares with other parts, as one sentence; empty where it shares nothing."""

    @property
    def modes(self) -> tuple[Mode, ...]:
        """The modes of its plans."""
        return tuple(dict.fromkeys(row.mode for row in self.rows if row.mode is not None))

    @property
    def units(self) -> tuple[str, ...]:
        """Every unit that was singled out by itself, in forward order; in the plan `none` all are quantized."""
        first = self.modes[0]
        own = "fp16" if first == "protect-one" else self.grid.precision
        rows = [row for row in self.rows if row.mode == first and row.precision == own]
        return tuple(row.units[0] for row in rows if len(row.units) == 1)
