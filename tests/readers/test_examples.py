"""The example that serves a checkpoint runs as written, in vLLM's own environment."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from quant_fairness_plugin.export.writer import export
from tests.export.build import TEXTS, quantize_tiny
from tests.readers.session import ENVIRONMENT, skip_without_int4_kernel
from tests.tiny import write_tiny_model

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.readers


def test_vllm_serves_the_checkpoint(tmp_path: Path) -> None:
    skip_without_int4_kernel()
    write_tiny_model(tmp_path / "model", "llama", layers=2, width=128)  # heads of 32, the smallest that vLLM takes
    export(quantize_tiny(tmp_path / "model"), tmp_path / "out", texts=TEXTS, reader="vllm")
    line = [ROOT / ".venv-vllm" / "bin" / "python", ROOT / "examples" / "serve_with_vllm.py", "out", "abc", "de"]
    environment = ENVIRONMENT | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    done = subprocess.run(
        line, cwd=tmp_path, env=os.environ | environment, capture_output=True, text=True, check=False, timeout=1800
    )
    assert done.returncode == 0, done.stderr[-4000:]
    printed = [row for row in done.stdout.splitlines() if " → " in row]
    assert [row.split(" → ")[0] for row in printed] == ["'abc'", "'de'"]
