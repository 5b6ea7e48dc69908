"""Exports of tiny models, made once each: layer 1 in 16 bit, layer 0 in 4 bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.export.build import GRID

Served = Callable[..., Path]


@pytest.fixture(scope="session")
def served(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Served:
    """Export a tiny model of a family in a format, with further arguments of `quantize_tiny`."""
    from quant_fairness_plugin.export.writer import export
    from tests.export.build import TEXTS, quantize_tiny

    root, made = tmp_path_factory.mktemp("served"), dict[str, Path]()

    def build(family: str = "llama", format_name: Any = "compressed-tensors", *, width: int = 32, **how: Any) -> Path:
        key = f"{family} {format_name} {width} {sorted(how.items())}"
        if key not in made:
            made[key] = root / str(len(made))
            quantized = quantize_tiny(tiny_model(family, layers=2, width=width), **{"grid": GRID} | how)
            reader = "vllm" if family == "gpt2" or "overrides" in how else "transformers"
            export(quantized, made[key], texts=TEXTS, format=format_name, reader=reader)
        return made[key]

    return build


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same choices on every machine."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
