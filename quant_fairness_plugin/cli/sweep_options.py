"""Options of a sweep: which plans it evaluates, which sets it looks for, and where it computes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from quant_fairness_plugin.artifacts import Granularity, Mode, Precision, SearchMethod
from quant_fairness_plugin.cli.legacy import HowMeasured
from quant_fairness_plugin.cli.options import MemoryBudget
from quant_fairness_plugin.config import FairConfig
from quant_fairness_plugin.config.option import Option
from quant_fairness_plugin.config.parsers import parse_names, parse_precisions
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.plans.plan_set import MOST_COMBINATIONS
from quant_fairness_plugin.plans.search import Search
from quant_fairness_plugin.sweep.config import SweepConfig


def parse_modes(text: str) -> tuple[Mode, ...]:
    """Return the sweep modes; `both` is both.

    Raises:
        ConfigError: another word than `protect-one`, `quantize-one`, `both`.
    """
    match text:
        case "protect-one" | "quantize-one":
            return (text,)
        case "both":
            return ("protect-one", "quantize-one")
    raise ConfigError(f"--mode {text!r} is unknown; use protect-one, quantize-one or both")


def parse_combine(text: str) -> int:
    """Return how many units a plan singles out at most.

    Raises:
        ConfigError: anything but 1, 2 or 3.
    """
    if text not in ("1", "2", "3"):
        raise ConfigError(f"--combine {text!r} is not allowed; use 1 (single), 2 (and pairs) or 3 (and triples)")
    return int(text)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlansOptions:
    """Which plans a sweep evaluates."""

    mode: Annotated[
        tuple[Mode, ...],
        Option(
            "Keep one layer in 16 bit, or quantize nothing but one: protect-one, quantize-one or both.",
            "What to sweep",
            parse=parse_modes,
            metavar="NAME",
            names=("protect-one", "quantize-one", "both"),
        ),
    ] = ("protect-one",)
    granularity: Annotated[
        Granularity, Option("Single out whole layers, or each unit of a layer (3.down):", "What to sweep")
    ] = "layer"
    precisions: Annotated[
        tuple[Precision, ...] | None,
        Option(
            "Precisions to try in each: fp16, int8, int6 … with commas. Default: the configuration's, fp16.",
            "What to sweep",
            parse=parse_precisions,
            metavar="LIST",
            names=("fp16", "fp16,int8"),
        ),
    ] = None
    combine: Annotated[
        int,
        Option(
            "Single out one at a time, all pairs too, or all triples too.",
            "What to sweep",
            parse=parse_combine,
            metavar="1|2|3",
            names=("1", "2", "3"),
        ),
    ] = 1
    max_plans: Annotated[
        int,
        Option(
            "Most pairs, and most triples; where there are more, those of the leading units.",
            "What to sweep",
            minimum=1,
        ),
    ] = MOST_COMBINATIONS
    also: Annotated[
        tuple[str, ...],
        Option(
            "Simulation only, no checkpoint stores these quantized: further plans that quantize embeddings, positions, "
            "biases, norms, final_norm or head (a list with commas), alone or with all else.",
            "What to sweep",
            parse=parse_names,
            metavar="LIST",
        ),
    ] = ()
    method: HowMeasured = "rigorous"

    def to_sweep(self, config: FairConfig, *, search: Search | None = None, top: int = 3) -> SweepConfig:
        """Return the plans of the sweep, with the configuration's precisions where none were typed.

        Raises:
            ConfigError: what no model can be swept with.
        """
        return SweepConfig(
            modes=self.mode,
            granularity=self.granularity,
            precisions=self.precisions or config.precisions or ("fp16",),
            combine=self.combine,
            search=search,
            max_plans=self.max_plans,
            also=self.also,
            top=top,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchOptions:
    """Which larger sets a sweep looks for, and what its stability figures are about."""

    search: Annotated[SearchMethod | None, Option("Look for a set to protect by evaluating sets:", "What to sweep")] = (
        None
    )
    size: Annotated[int, Option("Layers or units in the set of --search.", "What to sweep")] = 3
    width: Annotated[int, Option("Sets that --search beam keeps.", "What to sweep")] = 4
    top: Annotated[int, Option("How many layers or units the stability figures are about.", "What to sweep")] = 3

    def to_search(self, objective: str) -> Search | None:
        """Return how to look for sets; None without `--search`.

        Raises:
            ConfigError: an objective that sets are not compared by, or a size or width that no search has.
        """
        if self.search is None:
            return None
        return Search(method=self.search, size=self.size, width=self.width, objective=objective)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutionOptions:
    """How a sweep is run. Nothing of it changes what is ranked, apart from `bank`."""

    bank: Annotated[
        Path | None,
        Option(
            "Take the quantized weights from this checkpoint of the model (GPTQ, AWQ or compressed-tensors), instead "
            "of rounding to nearest.",
            "How to quantize",
            metavar="DIR",
        ),
    ] = None
    work: Annotated[
        Path | None,
        Option("Keep finished trials in this folder: an interrupted sweep goes on there.", "More", metavar="DIR"),
    ] = None
    executor: Annotated[
        Literal["local", "processes", "ray"] | None,
        Option("Trials of one thread each, the same bits everywhere (default: all threads here):", "More"),
    ] = None
    workers: Annotated[int | None, Option("Processes of --executor. Default: as many as fit.", "More", minimum=1)] = (
        None
    )
    memory_budget: MemoryBudget = None

    def __post_init__(self) -> None:
        if self.executor in {None, "local"} and self.workers is not None:
            raise ConfigError(
                f"--workers {self.workers} is for --executor processes or ray. Name one, or leave it out."
            )
