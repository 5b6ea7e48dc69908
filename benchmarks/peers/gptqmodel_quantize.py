"""Quantizes a model folder with gptqmodel on given token rows. Runs in gptqmodel's own environment, never in ours.

    .venv-gptqmodel/bin/python benchmarks/peers/gptqmodel_quantize.py MODEL REQUEST.json OUT

REQUEST holds `method` (`gptq` or `awq`), `rows` (lists of token ids), `bits`, `group_size`, `symmetric`; for GPTQ also
`damp` and `order`: `default` (gptqmodel's group-aware order) or `static` (columns by Hessian diagonal over all groups,
grids fixed before).

OUT becomes gptqmodel's own checkpoint folder, with `peer.json` (versions, and the settings that gptqmodel says it used)
beside the weights.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

# gptqmodel sizes its thread pools from the cores at import, and refuses to start with fewer than two workers.
os.environ["GPTQMODEL_CPU_WORKERS"] = "2"
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from gptqmodel.quantization.config import AWQConfig

USED = {
    "gptq": ("damp_percent", "act_group_aware", "desc_act", "static_groups", "mse", "true_sequential"),
    "awq": ("sym", "desc_act", "true_sequential", "scale_search_chunked_activations"),
}


def settings(request: dict[str, Any]) -> QuantizeConfig | AWQConfig:
    """The defaults (true-sequential, no MSE search) in everything but grid, damping and, where asked, column order."""
    if request["method"] == "awq":
        return AWQConfig(bits=request["bits"], group_size=request["group_size"], sym=request["symmetric"])
    static = request["order"] == "static"
    return QuantizeConfig(
        bits=request["bits"],
        group_size=request["group_size"],
        sym=request["symmetric"],
        damp_percent=request["damp"],
        desc_act=static,
        static_groups=static,
        act_group_aware=not static,
    )


def quantize(model_folder: str, request: dict[str, Any], out: Path) -> None:
    config = settings(request)
    # Without a dtype gptqmodel turns a float16 model into bfloat16, and compares another model.
    model = GPTQModel.load(model_folder, config, device="cpu", dtype=torch.float16)
    rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in request["rows"]]
    # One row a batch: no padding, and rows of every length as they are. Shorter rows than two tokens hold no context.
    # On its own gptqmodel picks a packing kernel for AWQ that only a GPU has.
    backend = BACKEND.AWQ_TORCH if request["method"] == "awq" else BACKEND.AUTO
    model.quantize(rows, batch_size=1, calibration_data_min_length=1, backend=backend)
    model.save(str(out))
    given = asdict(config)
    used = {name: given[name] for name in USED[request["method"]]}
    names = ("gptqmodel", "torch", "transformers", "numpy")
    peer = {"versions": {name: metadata.version(name) for name in names}, "settings": used}
    (out / "peer.json").write_text(json.dumps(peer, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    model_folder, request, out = sys.argv[1:]
    torch.set_num_threads(1)
    torch.manual_seed(0)
    quantize(model_folder, json.loads(Path(request).read_text(encoding="utf-8")), Path(out))


if __name__ == "__main__":
    main()
