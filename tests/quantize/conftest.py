"""A small parallel text set and calibration rows for the tests of this folder."""

from __future__ import annotations

import pytest

from quant_fairness_plugin.artifacts import TextSet
from quant_fairness_plugin.quantize.calibration import CalibrationSet, build_calibration

SENTENCES: dict[str, tuple[str, ...]] = {
    "en": ("The boat left early.", "Rain fell on the hills all night.", "Nobody opened the door.", "Search only."),
    "he": ("הסירה הפליגה מוקדם.", "גשם ירד על הגבעות כל הלילה.", "איש לא פתח את הדלת.", "חיפוש בלבד."),
    "zh": ("船很早就开走了。", "山上整夜都在下雨。", "没有人开门。", "仅供搜索。"),
}


def small_texts() -> TextSet:
    """Return three sentences to calibrate on in three languages, and one that must not be calibrated on."""
    return TextSet(
        name="small",
        sentences=SENTENCES,
        ids=("a", "b", "c", "d"),
        parts=("calibrate", "calibrate", "calibrate", "search"),
        registers=("everyday",) * 4,
        parallel=True,
        sha256="0" * 64,
    )


@pytest.fixture(scope="session")
def texts() -> TextSet:
    """The small text set."""
    return small_texts()


@pytest.fixture
def rows(texts: TextSet) -> CalibrationSet:
    """Calibration rows of 24 tokens (bytes), the last one of each language shorter."""
    from tests.tiny import byte_tokenizer

    return build_calibration(byte_tokenizer(), texts, row_tokens=24)
