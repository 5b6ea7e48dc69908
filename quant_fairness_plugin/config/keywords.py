"""The fields of `FairConfig` as keyword arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, TypedDict

from quant_fairness_plugin.artifacts import (
    CheckpointFormat,
    Clip,
    Effort,
    Precision,
    Reader,
    SchemeName,
    Start,
    TextSet,
    Weighting,
)
from quant_fairness_plugin.model.devices import Dtype
from quant_fairness_plugin.model.gguf import Embedding


class FairOptions(TypedDict, total=False):
    """The fields of `FairConfig` as keyword arguments, for type checkers; `texts` can also be the set itself.

    A test compares the two.
    """

    method: str
    bits: int
    quantize_rest_to: str | None
    scheme: SchemeName
    group_size: int | Literal["auto"]
    symmetric: bool | None
    clip: Clip | None
    effort: Effort
    backend: str
    protect_layers: Literal["auto", "none"] | tuple[int, ...] | list[int]
    precisions: tuple[Precision, ...] | list[Precision] | None
    exhaustive: bool
    time: str | None
    sentences: int | None
    protect_units: tuple[str, ...] | list[str]
    int8_layers: tuple[int, ...] | list[int]
    protect_columns: float
    top: int | None
    max_overhead: float
    max_size: int | None
    target_bits: float | None
    target: str | None
    limits: dict[str, float] | None
    objective: str
    languages: tuple[str, ...] | list[str] | None
    reference: str | None
    texts: str | Path | TextSet
    calibration_texts: str | None
    start: Start
    tokens_per_language: int | None
    tokens_per_expert: int | None
    calibration: Weighting
    format: CheckpointFormat
    reader: Reader
    like: str | None
    embedding: Embedding
    gate: str | None
    protect_biases: bool
    protect_final_ln: bool
    device: str
    dtype: Dtype
    prompts: str
    draws: int
    seed: int
    strict: bool
