"""The metrics as pure functions on numbers (or, element by element, on numpy arrays).

Takes nats, bytes, tokens and flips as `scoring` counted them; returns one figure each. Nothing here knows about models.
"""

from __future__ import annotations

import math
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Value = TypeVar("Value", float, Array)

NATS_PER_BIT = math.log(2.0)
LARGEST_EXPONENT = 700.0
"""exp(709.78) is the end of float64; a model that is 700 nats per token worse is collapsed whatever the figure says."""


def bits_per_byte(nll_nats: Value, bytes_: Value) -> Value:
    """Return the negative log-likelihood in bits per UTF-8 byte: comparable between languages and tokenizers."""
    return nll_nats / (NATS_PER_BIT * bytes_)


def kl_bits_per_byte(kl_nats: Value, bytes_: Value) -> Value:
    """Return KL(p16 ‖ p) in bits per UTF-8 byte: the extra code length for text from the 16-bit model."""
    return kl_nats / (NATS_PER_BIT * bytes_)


def nats_per_token(nll_nats: Value, tokens: Value) -> Value:
    """Return the negative log-likelihood of the average scored token."""
    return nll_nats / tokens


def flip_rate(flips: Value, tokens: Value) -> Value:
    """Return the share of scored tokens whose most likely next token is no longer the 16-bit model's."""
    return flips / tokens


def perplexity(nll_nats: float, tokens: float) -> float:
    """Return the token perplexity, saturated at exp(700) so that a destroyed model still has a finite figure."""
    return math.exp(min(nats_per_token(nll_nats, tokens), LARGEST_EXPONENT))


def percent_change(before: float, after: float) -> float:
    """Return the change of a positive figure in percent of what it was before.

    Raises:
        ZeroDivisionError: `before` is 0.
    """
    return (after - before) / before * 100.0


def perplexity_change_percent(delta_nats: float, tokens: float) -> float:
    """Return the percent change of token perplexity, from the change of the log-likelihood, saturated likewise.

    It is `percent_change` of the two perplexities without their cancellation: a change of 1e-9 keeps its digits.
    """
    return 100.0 * math.expm1(min(nats_per_token(delta_nats, tokens), LARGEST_EXPONENT))


def significant(value: float, digits: int = 7) -> float:
    """Return the number with so many significant digits: what float32 arithmetic can vouch for.

    >>> significant(123.456789012)
    123.4568
    """
    return float(f"{value:.{digits}g}")
