"""A model by the Triton kernels, which triton's interpreter runs on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.serve.conftest import Served

pytest.importorskip("triton", reason="triton is not installed")


@pytest.mark.parametrize(("family", "launches"), [("gpt2", 4), ("qwen2", 4)])
def test_a_model_runs_by_the_triton_kernels(served: Served, family: str, launches: int) -> None:
    """Conv1D modules, and seven modules in four launches, both with biases.

    float16 keeps 11 bits, an error of 0.05 % a step: 0.1 % was seen.
    """
    script, environment = Path(__file__).with_name("interpreted.py"), os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, str(script), str(served(family, "gptq"))]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result.pop("difference") < 0.005
    # The same tiles of the same weights, added in the same order.
    assert result.pop("apart") == 0
    assert result == {"dtype": "torch.float16", "modules": launches, "kernels": ["triton"]}
