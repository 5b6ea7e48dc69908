"""Which plans a sweep evaluates, as one value: made from options, or read back from a report. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypedDict

from typing_extensions import Unpack

from quant_fairness_plugin.artifacts import Granularity, Mode, Precision, SweepReport
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.plans.plan_set import MOST_COMBINATIONS, PlanSet, check_plans, check_precisions
from quant_fairness_plugin.plans.search import Search
from quant_fairness_plugin.plans.units import check_around_names


class SweepOptions(TypedDict, total=False):
    """The fields of `SweepConfig` without its modes as keyword arguments, each optional."""

    granularity: Granularity
    precisions: Sequence[Precision]
    combine: int
    search: Search | None
    max_plans: int
    also: Sequence[str]
    top: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepConfig:
    """The plans of a sweep, and what its ranking is about.

    Raises:
        ConfigError: what no model can be swept with.
    """

    modes: tuple[Mode, ...] = ("protect-one",)
    """`protect-one` (all others quantized) and/or `quantize-one` (all others 16 bit)."""
    granularity: Granularity = "layer"
    """Single out whole layers, or their fusion groups. Groups that the grid does not fit stay in 16 bit."""
    precisions: tuple[Precision, ...] = ("fp16",)
    """What each unit is singled out at under `protect-one`: `fp16`, and others for a plan of several precisions."""
    combine: int = 1
    """2 for all pairs as well as the single units, 3 for all triples too."""
    search: Search | None = None
    """How to search for larger sets of units to protect."""
    max_plans: int = MOST_COMBINATIONS
    """Most sets of one size. Where there are more, those of the units that count most by themselves."""
    also: tuple[str, ...] = ()
    """What else to quantize in further plans that are simulation only (`plans.units.AROUND`)."""
    top: int = 3
    """How many units the stability figures are about."""

    def __post_init__(self) -> None:
        check_precisions(self.precisions, self.modes)
        check_plans(self.modes, None, self.combine, self.max_plans)
        check_around_names(self.also)
        if self.top < 1:
            raise ConfigError(f"top {self.top} ranks nothing; use 1 or more")

    @classmethod
    def make(cls, modes: Sequence[Mode] = ("protect-one",), **options: Unpack[SweepOptions]) -> SweepConfig:
        """Return a configuration from options that can be any sequences."""
        values: dict[str, Any] = {"modes": modes, **options}
        for name in ("modes", "precisions", "also"):
            if name in values:
                values[name] = tuple(values[name])
        return cls(**values)

    @classmethod
    def of(cls, report: SweepReport) -> SweepConfig:
        """Return the configuration that a report was made with."""
        values = {name: report.provenance.arguments[name] for name in cls.__slots__}
        search = values.pop("search")
        return cls.make(**values, search=None if search is None else Search(**search))

    @property
    def arguments(self) -> dict[str, Any]:
        """Plain JSON data, as in a report's provenance."""
        lists = {name: list(value) for name, value in asdict(self).items() if isinstance(value, tuple)}
        return asdict(self) | lists

    def covers(self, other: SweepConfig) -> bool:
        """Return whether a sweep of this configuration holds all plans and figures of another one."""
        return (
            set(other.modes) <= set(self.modes)
            and set(other.precisions) <= set(self.precisions)
            and other.combine <= self.combine
            and other.granularity == self.granularity
            and other.top == self.top
            and other.search in (None, self.search)
            and other.also in ((), self.also)
            and (other.combine == 1 or other.max_plans == self.max_plans)
        )

    def plan_set(self, units: Sequence[str], quantized: Precision) -> PlanSet:
        """Return the plans for the units of a model.

        Args:
            units: what is singled out, in forward order.
            quantized: the grid's precision.

        Raises:
            ConfigError: sets that are not smaller than the model, or the grid's precision among those to single out at.
        """
        if self.search is not None:
            self.search.check(len(units))
        return PlanSet(tuple(units), self.modes, self.combine, self.max_plans, quantized, self.precisions)
