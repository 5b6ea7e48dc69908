"""A folder that gptqmodel really wrote, with layers left out by `dynamic` alone: broken in Transformers, then repaired.

Transformers, optimum and gptqmodel live in `.venv-gptqmodel`; everything real is run there.
"""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from quant_fairness_plugin.checkpoint.folder import file_record
from quant_fairness_plugin.export.repair import RepairReport, repair
from quant_fairness_plugin.export.verify import verify
from tests.readers.session import ENVIRONMENT, python_of, skip_without_int4_kernel
from tests.tiny import VOCABULARY, write_tiny_model

pytestmark = pytest.mark.readers

SKIPPED = (0, 1)
"""By prefix, layer 1 is also the beginning of layers 10 and 11."""
ROWS, ROW_LENGTH = 16, 48
AS_A_USER = """
import os, sys
os.environ["GPTQMODEL_CPU_WORKERS"] = "2"
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float16, device_map="cpu")
print(model(torch.tensor([[1, 2, 3, 4]])).logits.shape)
"""


@dataclass(frozen=True)
class Repaired:
    python: Path
    written: Path
    out: Path
    report: RepairReport


def run(python: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | ENVIRONMENT
    return subprocess.run([python, *arguments], capture_output=True, text=True, check=False, env=environment)


@pytest.fixture(scope="module")
def repaired(tmp_path_factory: pytest.TempPathFactory) -> Repaired:
    python, root = python_of(".venv-gptqmodel"), tmp_path_factory.mktemp("repair")
    write_tiny_model(root / "tiny", "llama", layers=12, width=256)
    draw = torch.Generator().manual_seed(0)
    rows = torch.randint(0, VOCABULARY, (ROWS, ROW_LENGTH), generator=draw).tolist()
    rules = {rf"-:^model\.layers\.({'|'.join(map(str, SKIPPED))})\..*": {}}
    request = {"method": "gptq", "group_size": 32, "rows": rows, "dynamic": rules}
    (root / "request.json").write_text(json.dumps(request))
    script = Path(__file__).with_name("gptqmodel_writer.py")
    done = run(python, script, root / "tiny", root / "request.json", root / "written")
    assert done.returncode == 0, done.stderr[-4000:]
    return Repaired(python, root / "written", root / "out", repair(root / "written", root / "out"))


def test_before_the_repair_transformers_fails(repaired: Repaired) -> None:
    done = run(repaired.python, "-c", AS_A_USER, repaired.written)
    assert done.returncode == 1
    assert "IndexError: index" in done.stderr


def test_the_repair_says_so_and_leaves_the_weights_alone(repaired: Repaired) -> None:
    assert "takes model.layers.0" in verify(repaired.written).problems["transformers"]
    assert repaired.report.verified is not None
    assert repaired.report.verified.problems == {"transformers": "", "vllm": "", "gptqmodel": "", "sglang": ""}
    weights = "model.safetensors"
    assert file_record(repaired.out / weights) == file_record(repaired.written / weights)


@pytest.mark.parametrize("reader", ["transformers", "gptqmodel"])
def test_after_the_repair_readers_compute_what_the_files_say(repaired: Repaired, reader: str) -> None:
    detail = verify(repaired.out, reader=reader, python=repaired.python).checks[-1].detail
    assert "of the dequantized weights" in detail


def test_after_the_repair_vllm_computes_what_the_files_say(repaired: Repaired) -> None:
    skip_without_int4_kernel()
    detail = verify(repaired.out, reader="vllm", python=python_of(".venv-vllm")).checks[-1].detail
    assert "greedy tokens within" in detail
