"""How many tokens a model takes at once, by its config alone. No torch."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from quant_fairness_plugin.errors import UnsupportedModelError

POSITION_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len")
"""Keys of config.json for the longest input: of most models, of those that follow GPT-2, and of MPT."""
SMALLEST_CONTEXT = 4
"""With fewer tokens a window cannot overlap the one before it and still score a new token."""


def longest_input(config: Mapping[str, Any], default: int | None = None) -> int:
    """Return how many tokens a model takes at once; `sys.maxsize` where nothing bounds them (ALiBi, as in BLOOM).

    Args:
        config: the model's config.json; of a model with several parts, that of its text decoder counts.
        default: what the architecture takes where the config says nothing; None where nothing bounds it.
    """
    text = config.get("text_config")
    sources = (config, text) if isinstance(text, Mapping) else (config,)
    given = [source[key] for source in sources for key in POSITION_KEYS if type(source.get(key)) is int]
    return min(given, default=default or sys.maxsize)


def check_context(name: str, positions: int) -> int:
    """Return the longest input, checked that sentences can be scored and calibrated on in windows of it.

    Raises:
        UnsupportedModelError: fewer than `SMALLEST_CONTEXT` tokens.
    """
    if positions < SMALLEST_CONTEXT:
        raise UnsupportedModelError(
            f"{name}: takes {positions} tokens at once, too few to measure or to calibrate; at least "
            f"{SMALLEST_CONTEXT} are needed. Use a model with a longer context, or correct "
            f"{' or '.join(POSITION_KEYS[:2])} in its config.json"
        )
    return positions
