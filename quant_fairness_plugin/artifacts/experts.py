"""How many tokens of every language reached each expert of a mixture: in calibration, and in text that it meets."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import ConfigDict

ENOUGH = 64
"""Calibration tokens below which an expert is called reached with too few."""
Counts = dict[str, dict[str, tuple[int, ...]]]
"""Layer (`layers.3`) → language → tokens of each expert."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertUse:
    """How one language uses the experts of one layer, and how calibration reached these."""

    language: str
    layer: str
    used: int
    """Experts that at least one of its tokens was routed to."""
    few: int
    """Of these, experts with fewer than enough calibration tokens of all languages together."""
    few_own: int
    """Of these, experts with fewer than enough calibration tokens of this language."""
    gates_few: float
    """Share of its gate weights that falls on the experts of `few`."""
    gates_few_own: float
    """Share of its gate weights that falls on the experts of `few_own`."""
    entropy: float
    """Of its gate weights over the experts, in bits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertCoverage:
    """Tokens per expert and language, as the 16-bit model routes them."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    schema_version: Literal[1] = 1
    kind: Literal["expert-coverage"] = "expert-coverage"
    experts: int
    """Routed experts of a layer."""
    calibrated: Counts
    """In the calibration text, whose languages alone are there."""
    reached: Counts
    """In the part of the text set that `part` names."""
    gates: dict[str, dict[str, tuple[float, ...]]]
    """Layer → language → share of its gate weights on each expert, in that part."""
    part: str
    enough: int = ENOUGH

    @property
    def languages(self) -> tuple[str, ...]:
        """The languages of the part."""
        return tuple(next(iter(self.reached.values())))

    def use(self, language: str, layer: str) -> ExpertUse:
        """Return how a language uses the experts of a layer."""
        calibrated = self.calibrated[layer]
        total = [sum(counts) for counts in zip(*calibrated.values(), strict=True)]
        own = calibrated.get(language, (0,) * self.experts)
        gates = self.gates[layer][language]
        used = [number for number, count in enumerate(self.reached[layer][language]) if count]
        few = [number for number in used if total[number] < self.enough]
        few_own = [number for number in used if own[number] < self.enough]
        return ExpertUse(
            language=language,
            layer=layer,
            used=len(used),
            few=len(few),
            few_own=len(few_own),
            gates_few=sum(gates[number] for number in few),
            gates_few_own=sum(gates[number] for number in few_own),
            entropy=-sum(share * math.log2(share) for share in gates if share > 0),
        )

    def worst(self, language: str) -> ExpertUse:
        """Return the layer in which most of a language's gate weights fall on experts with too few tokens.

        Of all languages, then of its own; the first layer of equals.
        """
        uses = [self.use(language, layer) for layer in self.reached]
        return max(uses, key=lambda use: (use.gates_few, use.gates_few_own))

    def lines(self) -> Iterator[str]:
        """Yield a sentence for every language, on its worst layer."""
        for language in self.languages:
            use = self.worst(language)
            if not use.few_own:
                reached = "calibration reached every expert that it uses"
                yield f"{language}: {reached} with {self.enough} of its own tokens or more"
                continue
            place = f"{use.used} of {self.experts} experts of layer {use.layer.removeprefix('layers.')}"
            yield (
                f"{language} uses {place}; calibration reached {use.few} of them with fewer than {self.enough} tokens "
                f"({use.gates_few:.0%} of its gate weights), {use.few_own} with fewer than {self.enough} of its own "
                f"({use.gates_few_own:.0%})"
            )
