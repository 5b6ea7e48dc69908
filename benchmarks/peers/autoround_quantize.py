"""Quantizes a model folder with AutoRound on given token rows. Runs in AutoRound's own environment, never in ours.

    .venv-peers-autoround/bin/python benchmarks/peers/autoround_quantize.py MODEL REQUEST.json OUT

REQUEST holds `rows` (lists of token ids, all of one length), `bits`, `group_size`, `symmetric` and `iters`; everything
else is AutoRound's default. OUT becomes its `auto_gptq` folder, with `peer.json` beside the weights.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from auto_round import AutoRound
from transformers import AutoModelForCausalLM, AutoTokenizer


def quantize(folder: str, request: dict[str, Any], out: Path) -> None:
    rows = torch.tensor(request["rows"])
    # Of bare ids AutoRound hides those that are the padding token, which here is EOS and stands in the rows.
    dataset = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows.split(1)]
    # float16 holds its scales exactly as they are written; of bfloat16 it would keep 8 bits.
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16)
    settings = {"iters": request["iters"], "nsamples": len(rows), "seqlen": rows.shape[1], "batch_size": 8}
    tool = AutoRound(
        model, AutoTokenizer.from_pretrained(folder), bits=request["bits"], group_size=request["group_size"],
        sym=request["symmetric"], dataset=dataset, device_map="cpu", seed=0, **settings,
    )  # fmt: skip
    tool.quantize_and_save(str(out), format="auto_gptq", inplace=True)
    saved = next(out.rglob("config.json")).parent
    if saved != out:  # a folder of its own below, named after the model and the scheme
        for file in saved.iterdir():
            file.rename(out / file.name)
        saved.rmdir()
    names = ("auto-round", "torch", "transformers", "numpy")
    peer = {"versions": {name: metadata.version(name) for name in names}, "settings": settings}
    (out / "peer.json").write_text(json.dumps(peer, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    folder, request, out = sys.argv[1:]
    torch.set_num_threads(1)
    # What torch.compile left of an earlier run would make this one look cheaper.
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        quantize(folder, json.loads(Path(request).read_text(encoding="utf-8")), Path(out))


if __name__ == "__main__":
    main()
