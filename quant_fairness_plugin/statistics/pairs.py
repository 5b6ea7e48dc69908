"""Whether a checkpoint is worse than another, in words, as a gate needs it. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from quant_fairness_plugin.artifacts import Interval
from quant_fairness_plugin.artifacts.pairs import CheckpointPair
from quant_fairness_plugin.statistics.verdict import more_sentences

PairDecision = Literal["NO WORSE", "WORSE", "CANNOT TELL"]


@dataclass(frozen=True, slots=True)
class PairVerdict:
    """A decision on the second checkpoint, with its reason."""

    decision: PairDecision
    reason: str

    def __str__(self) -> str:
        return f"{self.decision}: {self.reason}"


def judge_pair(pair: CheckpointPair, margin: float) -> PairVerdict:
    """Return whether the second checkpoint loses more than a margin beyond the first, in any language.

    No worse is what every language's interval must show; worse what one of them shows, or a language that only the
    second has lost. Between the two the sentences cannot tell.

    Args:
        pair: both, measured on the same sentences.
        margin: KL in bits per byte, at least 0.
    """
    if pair.collapsed:
        return PairVerdict("WORSE", f"collapsed: {', '.join(pair.collapsed)}")
    if not pair.differences:
        return PairVerdict("CANNOT TELL", "no language is known to the 16-bit model and intact in both")
    beyond = f"more than {margin:g} bits per byte beyond A"
    above = {name: loss for name, loss in pair.differences.items() if loss.low > margin}
    if above:
        worst = max(above, key=lambda name: above[name].estimate)
        count = f"{len(above)} of {len(pair.differences)} languages lose {beyond}"
        return PairVerdict("WORSE", f"{count}; most {worst}, {_figures(above[worst])}")
    unsure = {name: loss for name, loss in pair.differences.items() if loss.high > margin}
    if unsure:
        name = max(unsure, key=lambda name: unsure[name].high)
        sentences = next(row.sentences for row in pair.second.languages if row.language == name)
        more = more_sentences(unsure[name], sentences, margin)
        return PairVerdict(
            "CANNOT TELL", f"{name} loses {_figures(unsure[name])}, around {margin:g}, by {sentences} sentences; {more}"
        )
    name = max(pair.differences, key=lambda name: pair.differences[name].high)
    return PairVerdict("NO WORSE", f"no language loses {beyond}; most {name}, {_figures(pair.differences[name])}")


def _figures(loss: Interval) -> str:
    return f"{loss.estimate:+.4f} [{loss.low:+.4f}, {loss.high:+.4f}]"
