"""One exported tiny Llama per format, made once; tests that damage it work on a copy."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Exported = Callable[..., Path]


@pytest.fixture(scope="session")
def exported(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Export a tiny model (once per argument list): twelve layers, layer 1 in 16 bit."""
    from quant_fairness_plugin.export.writer import export
    from tests.export.build import TEXTS, quantize_tiny

    root = tmp_path_factory.mktemp("exports")

    def build(family: str = "llama", format_name: Any = "compressed-tensors", reader: str = "transformers") -> Path:
        out = root / f"{family}-{format_name}"
        if not out.exists():
            quantized = quantize_tiny(tiny_model(family, layers=12))
            export(quantized, out, texts=TEXTS, format=format_name, reader=reader)
        return out

    return build


@pytest.fixture
def damaged(exported: Exported, tmp_path: Path) -> Exported:
    """A copy of an export that a test may change."""

    def build(*args: str) -> Path:
        return Path(shutil.copytree(exported(*args), tmp_path / "copy"))

    return build


def rewrite_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
