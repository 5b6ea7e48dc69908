"""Options of `recommend`: how much may be protected, and what is printed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

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
    max_bytes: Annotated[
        int | None, Option("The best for this budget: bytes of the checkpoint.", "What to protect")
    ] = None
    target: Annotated[
        float | None,
        Option("The fewest bytes for this damage: KL in bits per byte, by --objective.", "What to protect"),
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

    def __post_init__(self) -> None:
        given = self.given
        if len(given) > 1:
            raise ConfigError(
                f"{' and '.join(given)} exclude each other; give the number of layers, a budget or a target"
            )
        if self.weights is not None and (self.top is not None or not given):
            weights = ",".join(f"{language}={weight:g}" for language, weight in self.weights.items())
            raise ConfigError(f"--weights {weights} count for a budget or a target; give --max-overhead, say")

    @property
    def given(self) -> list[str]:
        """Return the options that were given."""
        names = ("top", "max_overhead", "max_bytes", "target")
        return [f"--{name.replace('_', '-')}" for name in names if getattr(self, name) is not None]

    @property
    def is_budget(self) -> bool:
        """Return whether a budget or a target was given."""
        return bool(self.given) and self.top is None

    def check_search(self, config: FairConfig, *, swept: bool) -> None:
        """Refuse bounds of a search by scores where there is none.

        Args:
            config: the configuration, with `time` and `sentences`.
            swept: whether a saved sweep, or what only a sweep can answer, was asked for.

        Raises:
            ConfigError: names the bound.
        """
        given = {"--time": config.time, "--sentences": config.sentences}
        for name, value in given.items():
            if value is not None and (swept or self.weights is not None or not self.is_budget):
                raise ConfigError(
                    f"{name} {value} bounds the search for a plan by scores, and this is answered by a sweep: give "
                    "--max-overhead, --max-bytes or --target, without a saved sweep, --weights, --frontier or --verify"
                )

    def within(self, config: FairConfig) -> FairConfig:
        """Return the configuration with the number of layers, three without any limit, and the budget."""
        top = self.top if self.given else SEED_TOP
        budget = config.max_overhead if self.max_overhead is None else self.max_overhead
        target = None if self.target is None else f"{self.target!r}"
        return replace(config, top=top, max_overhead=budget, max_size=self.max_bytes, target=target)


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
        if self.imatrix is not None:
            check_gguf()
        if self.evidence is not None and not self.verify:
            raise ConfigError(f"--evidence {self.evidence} is what --verify measures; add --verify")
