"""Makes our checkpoint for the peers' table, as the command line would; see `peers_table`.

python benchmarks/peers/ours_quantize.py MODEL REQUEST.json OUT
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from peers_table import SEED, TOKENS, calibration_texts

from quant_fairness_plugin import FairQuantizer
from quant_fairness_plugin.artifacts import package_versions
from quant_fairness_plugin.export.gguf import write_gguf


def quantize(model: str, request: dict[str, Any], out: Path) -> None:
    """Write a checkpoint folder, or a folder with a GGUF file; `peer.json` lies in either."""
    if request.get("gguf"):
        out.mkdir(parents=True)
        with tempfile.TemporaryDirectory() as beside:
            peer = checkpoint(model, request, Path(beside) / "checkpoint")
            write_gguf(Path(beside) / "checkpoint", Path(request["full"]), out / "model.gguf")
    else:
        peer = checkpoint(model, request, out)
    (out / "peer.json").write_text(json.dumps(peer, indent=1) + "\n", encoding="utf-8")


def checkpoint(model: str, request: dict[str, Any], out: Path) -> dict[str, Any]:
    """Write a checkpoint folder; return what its row says of it."""
    options = {key: request[key] for key in ("protect_layers", "max_overhead") if key in request}
    if "our_group_size" in request:  # by default it is the largest that fits each module
        options["group_size"] = request["our_group_size"]
    english = request["calibration"] == "English"
    quantizer = FairQuantizer.from_pretrained(
        model, texts=calibration_texts(request["calibration"]), seed=SEED,
        tokens_per_language=TOKENS[request["calibration"]],
        calibration="english" if english else "uniform", **options,
    )  # fmt: skip
    record = quantizer.save_pretrained(out, measure=None)
    settings = {"grid": str(record.plan.grid), "plan": record.plan.source, "reasons": list(record.plan.reasons)}
    settings["starts"] = list(record.calibration["starts"])
    return {"versions": package_versions(), "settings": settings, "calibrated": record.calibration["tokens_sha256"]}


def main() -> None:
    model, request, out = sys.argv[1:]
    torch.set_num_threads(1)
    quantize(model, json.loads(Path(request).read_text(encoding="utf-8")), Path(out))


if __name__ == "__main__":
    main()
