"""What scores and exact evaluations of plans are estimated from."""

from __future__ import annotations

from dataclasses import dataclass

SENTENCES = 12
"""Of each language, evenly spread."""
DRAWS = 2
"""Labels of each token. With 12 sentences: 24 squared slopes a figure, each as variable as one of a normal variate."""
EXACT_SENTENCES = 8
"""Of each language, on which a plan and its neighbours are evaluated exactly."""
BACKWARD_STEPS = 3
"""What a block costs on the way back, in forward passes: one with its graph, and the graph back for two labels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """What scores are estimated from."""

    sentences: int = SENTENCES
    """Of each language."""
    draws: int = DRAWS
    """Labels drawn for each token."""
    seed: int = 0
    """Of the labels."""
