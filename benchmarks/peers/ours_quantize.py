"""Makes our checkpoint for the peers' table, as the command line would; see `peers_table`.

python benchmarks/peers/ours_quantize.py MODEL REQUEST.json OUT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from peers_table import calibration_texts
from peers_variants import SEED, TOKENS

from quant_fairness_plugin import FairQuantizer
from quant_fairness_plugin.artifacts import package_versions


def quantize(model: str, request: dict[str, Any], out: Path) -> None:
    """Write a checkpoint folder, or a folder with a GGUF file; `peer.json` lies in either."""
    quantizer = quantizer_of(model, request)
    if request.get("gguf"):
        out.mkdir(parents=True)
        quantizer.save_gguf(out / "model.gguf")
    else:
        quantizer.save_pretrained(out, measure=None)
    quantized = quantizer.quantize()
    plan, rows = quantized.plan, quantized.calibration
    assert rows is not None
    settings = {"grid": str(plan.grid), "plan": plan.source, "reasons": list(plan.reasons)}
    settings["starts"] = list(rows.summary()["starts"])
    peer = {"versions": package_versions(), "settings": settings, "calibrated": rows.sha256}
    (out / "peer.json").write_text(json.dumps(peer, indent=1) + "\n", encoding="utf-8")


def quantizer_of(model: str, request: dict[str, Any]) -> FairQuantizer:
    """Return our quantizer with what a variant asks for."""
    options: dict[str, Any] = {
        key: request[key] for key in ("protect_layers", "max_overhead", "max_size") if key in request
    }
    if "our_bits" in request:
        options["bits"] = request["our_bits"]
    if request.get("gguf"):
        options |= {"format": "gguf", "like": request["full"]}
    weights = "english" if request["calibration"] == "English" else request.get("weights", "uniform")
    return FairQuantizer.from_pretrained(
        model, texts=calibration_texts(request["calibration"]), seed=SEED,
        tokens_per_language=TOKENS[request["calibration"]],
        calibration=weights, **options,
    )  # fmt: skip


def main() -> None:
    model, request, out = sys.argv[1:]
    torch.set_num_threads(1)
    quantize(model, json.loads(Path(request).read_text(encoding="utf-8")), Path(out))


if __name__ == "__main__":
    main()
