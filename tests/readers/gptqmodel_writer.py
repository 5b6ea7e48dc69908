"""Quantizes a model folder with gptqmodel, leaving some modules out the only way it knows: by `dynamic` rules.

    .venv-gptqmodel/bin/python tests/readers/gptqmodel_writer.py MODEL REQUEST.json OUT

Runs in gptqmodel's own environment. REQUEST holds `method` (`gptq` or `awq`), `group_size`, `rows` (lists of token ids)
and `dynamic`. OUT becomes the folder that gptqmodel writes, as it writes it.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

# gptqmodel sizes its thread pools from the cores at import, and refuses to start with fewer than two workers.
os.environ["GPTQMODEL_CPU_WORKERS"] = "2"
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from gptqmodel import GPTQModel, QuantizeConfig
from gptqmodel.quantization.config import AWQConfig


def write(model_folder: str, request: dict[str, Any], out: str) -> None:
    given = {"bits": 4, "group_size": request["group_size"], "dynamic": request["dynamic"]}
    config = QuantizeConfig(**given) if request["method"] == "gptq" else AWQConfig(**given, sym=False)
    # Without a dtype gptqmodel turns a float16 model into bfloat16 and keeps scales in float16.
    model = GPTQModel.load(model_folder, config, device="cpu", dtype=torch.float16)
    rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in request["rows"]]
    model.quantize(rows, batch_size=1, calibration_data_min_length=1)
    model.save(out)


def main() -> None:
    model_folder, request, out = sys.argv[1:]
    torch.set_num_threads(1)
    torch.manual_seed(0)
    write(model_folder, json.loads(Path(request).read_text(encoding="utf-8")), out)


if __name__ == "__main__":
    main()
