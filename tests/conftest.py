"""Fixtures: tiny random models and a tokenizer on disk, so that the whole pipeline runs on CPU, offline, in seconds."""

from __future__ import annotations

import gc
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from quant_fairness_plugin.model.load import LoadedModel

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the number of torch threads: two on a loaded machine turned 1.5 s into 52 s, so one is the default."""
    parser.addoption("--torch-threads", type=int, default=1, help="torch threads of every test process")


def pytest_collection_finish() -> None:
    """Keep what is imported and collected out of every later garbage collection, which checkpoints ask for often."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """Let go of it at the end, where libraries count what they have not seen freed."""
    gc.unfreeze()


@pytest.fixture(autouse=True, scope="session")
def _torch_threads(pytestconfig: pytest.Config) -> None:
    import torch

    threads = pytestconfig.getoption("--torch-threads")
    torch.set_num_threads(threads)
    assert torch.get_num_threads() == threads
    # Processes that tests start count the same: work is gone on from by as many threads as it was begun with.
    os.environ["OMP_NUM_THREADS"] = str(threads)


@pytest.fixture(autouse=True, scope="session")
def _signals_as_usual() -> None:
    """Undo what `nohup` and a shell's `&` leave ignored, which our commands respect and processes inherit."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def _own_random_numbers() -> None:
    import torch

    torch.manual_seed(0)  # what a test draws must not depend on the tests that ran before it in this process


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Build (once per family and size) a tiny random model folder; see `tests/tiny.py`."""
    from tests.tiny import write_tiny_model

    root = tmp_path_factory.mktemp("models")

    def build(family: str = "llama", *, layers: int = 2, width: int = 32, dtype: str = "float16") -> Path:
        folder = root / f"{family}-{layers}-{width}-{dtype}"
        if not folder.exists():
            write_tiny_model(folder, family, layers=layers, width=width, dtype=dtype)
        return folder

    return build


@pytest.fixture(scope="session")
def load(tiny_model: Callable[..., Path]) -> Callable[..., LoadedModel]:
    """A tiny model of a family, loaded anew on each call."""
    from quant_fairness_plugin.model.load import load_model

    def build(family: str = "llama", **sizes: int) -> LoadedModel:
        return load_model(str(tiny_model(family, **sizes)))

    return build


@pytest.fixture(scope="session")
def planted_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose damage is known; see `tests/planted_model.py`."""
    from tests.planted_model import write_planted_model

    folder = tmp_path_factory.mktemp("planted") / "planted"
    write_planted_model(folder)
    return folder


@pytest.fixture(scope="session")
def planted_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The planted model's sentences as a text set on disk."""
    from tests.planted_model import planted_texts

    texts = planted_texts()
    rows = [
        {"id": texts.ids[i], "part": texts.parts[i]} | {lang: rows[i] for lang, rows in texts.sentences.items()}
        for i in range(len(texts))
    ]
    path = tmp_path_factory.mktemp("texts") / "planted.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)
