"""Options of `recommend`: how much may be protected, and what is printed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from quant_fairness_plugin.artifacts import check_file_place
from quant_fairness_plugin.checkpoint.formats import FILES
from quant_fairness_plugin.cli.legacy import HowMeasured
from quant_fairness_plugin.config import FairConfig
from quant_fairness_plugin.config.option import Option
from quant_fairness_plugin.config.parsers import parse_numbers
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.recommend.imatrix import check_gguf
from quant_fairness_plugin.recommend.tools import Tool

SEED_TOP = 3  # the research scripts' default: `recommend` alone prints three indices


def parse_weights(text: str) -> dict[str, float]:
    """Return the weight of each language. Raises as `parse_numbers`."""
    return parse_numbers(text, flag="--weights", example="en=1,fi=2")


BUDGETS = ("max_size", "target_bits", "target")
"""Fields of `FairConfig` that bound a plan, beside `max_overhead`, whose default bounds it where nothing is given."""
MADE = ("scheme", "bits", "group_size", "symmetric", "clip", "effort", "format", "reader", "embedding")
"""Fields of `FairConfig` that say of what checkpoint the plan is; a saved sweep has its grid."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How much may be protected (a number of layers, a budget or a target; at most one), and by which measurement."""

    top: Annotated[
        int | None,
        Option("Exactly this many layers (or units). Default: 3, or the budget's choice.", "What to protect"),
    ] = None
    max_overhead: Annotated[
        float | None,
        Option("The best for this budget: extra bytes over all-INT4, 0.2 = 20 %.", "What to protect"),
    ] = None
    weights: Annotated[
        dict[str, float] | None,
        Option(
            "How much each language counts for a budget or target, such as en=1,fi=2.",
            "What to protect",
            parse=parse_weights,
            metavar="LIST",
        ),
    ] = None
    method: HowMeasured = "rigorous"

    def given(self, config: FairConfig) -> list[str]:
        """Return the options that bound the plan."""
        values = {"top": self.top, "max_overhead": self.max_overhead}
        values |= {name: getattr(config, name) for name in BUDGETS}
        return [f"--{name.replace('_', '-')}" for name, value in values.items() if value is not None]

    def is_budget(self, config: FairConfig) -> bool:
        """Return whether a budget or a target was given."""
        return bool(self.given(config)) and self.top is None

    def check(self, config: FairConfig) -> None:
        """Refuse several limits, and what counts for a budget without one.

        Raises:
            ConfigError: names them.
        """
        given = self.given(config)
        if len(given) > 1:
            raise ConfigError(
                f"{' and '.join(given)} exclude each other; give the number of layers, a budget or a target"
            )
        if self.is_budget(config):
            return
        if self.weights is not None:
            weights = ",".join(f"{language}={weight:g}" for language, weight in self.weights.items())
            raise ConfigError(f"--weights {weights} count for a budget or a target; give --max-overhead, say")
        if config.limits is not None:
            limits = ",".join(f"{language}={limit:g}" for language, limit in config.limits.items())
            raise ConfigError(f"--limit {limits} counts beside a budget or a target; give --max-overhead, say")

    def by_scores(self, config: FairConfig, printed: Printed, *, saved: bool) -> bool:
        """Return whether the plan comes from scores of units, and not from a sweep.

        Args:
            config: the configuration.
            printed: what only a sweep can print.
            saved: whether a saved sweep was given.

        Raises:
            ConfigError: a sweep, beside what it does not know.
        """
        sweeps = saved or self.weights is not None or printed.frontier or printed.verify
        if not sweeps and self.is_budget(config):
            return True
        for name in ("time", "sentences"):
            if (value := getattr(config, name)) is not None:
                raise ConfigError(
                    f"--{name} {value} bounds the search for a plan by scores, and this is answered by a sweep: give "
                    "--max-overhead, --max-size or --target, without a saved sweep, --weights, --frontier or --verify"
                )
        if config.format in FILES:
            raise ConfigError(
                f"format {config.format!r}: plans for it are made from scores, and this is answered by a sweep: give "
                "--max-overhead, --max-size or --target, without a saved sweep, --weights, --frontier or --verify"
            )
        default = FairConfig()
        for name in MADE if saved else ():
            if (value := getattr(config, name)) != getattr(default, name):
                raise ConfigError(
                    f"{name} {value} has no effect beside a saved sweep, which has its grid; leave it out"
                )
        return False

    def within(self, config: FairConfig) -> FairConfig:
        """Return the configuration with the number of layers, three without any limit, and the budget."""
        top = self.top if self.given(config) else SEED_TOP
        budget = config.max_overhead if self.max_overhead is None else self.max_overhead
        return replace(config, top=top, max_overhead=budget)


@dataclass(frozen=True, slots=True, kw_only=True)
class Printed:
    """What is printed and saved."""

    frontier: Annotated[
        bool, Option("Print which evaluated plans are worth their bytes, and nothing else.", "Output")
    ] = False
    verify: Annotated[
        bool, Option("Evaluate the plan and its controls on other sentences; says if it helps.", "Output")
    ] = False
    evidence: Annotated[
        Path | None, Option("With --verify: save all its figures as JSON.", "Output", metavar="FILE")
    ] = None
    as_: Annotated[
        Tool | None, Option("Print the plan as the configuration of another tool:", "Output", flag="--as")
    ] = None

    imatrix: Annotated[
        Path | None,
        Option(
            "With --as llama.cpp: write an importance matrix of the calibration text too, every language counting the "
            "same.",
            "Output",
            metavar="FILE",
        ),
    ] = None

    def __post_init__(self) -> None:
        if self.imatrix is not None and self.as_ != "llama.cpp":
            raise ConfigError(
                f"--imatrix {self.imatrix} is read by llama.cpp alone; add --as llama.cpp, or leave it out"
            )
        for output in (self.evidence, self.imatrix):
            if output is not None:
                check_file_place(output)
        if self.imatrix is not None:
            check_gguf()
        if self.evidence is not None and not self.verify:
            raise ConfigError(f"--evidence {self.evidence} is what --verify measures; add --verify")
