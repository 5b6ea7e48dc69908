"""Damage of each language in a small mixture of experts, calibrated on English only and on all languages alike.

    python examples/train_demo_moe.py --data CORPUS --out demo-moe --steps 1500
    python benchmarks/experts_table.py demo-moe            # minutes on one core; writes the rows

Everything is in memory, every layer quantized. Calibration is the `calibrate` part of the bundled sentences, damage and
the experts that a language uses are those of the `confirm` part; all states are measured under the same resamples.
The model is not bundled: its checksum and what it was trained with are in the rows.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rows import conditions

from quant_fairness_plugin.artifacts import write_atomically

ROOT = Path(__file__).parents[1]
ROWS = ROOT / "benchmarks" / "results" / "cpu" / "experts_table.jsonl"
STATES: tuple[tuple[str, str | None, int | None], ...] = (
    ("rtn", None, None),
    ("gptq", "english", None),  # all that the text has
    ("gptq", "uniform", 53),  # as many tokens in all as English alone has
    ("gptq", "uniform", None),
)
"""Method, calibration, tokens of each language."""
WIDTHS = (4, 3)
SEED = 0


def measure(model: Path) -> Iterator[dict[str, Any]]:
    """One row per width, method and calibration, all measured together."""
    import torch

    from quant_fairness_plugin import FairQuantizer
    from quant_fairness_plugin.steps import unprotected_state

    torch.set_num_threads(1)
    training = json.loads((model / "training.json").read_text(encoding="utf-8"))
    quantizer = FairQuantizer.from_pretrained(model, protect_layers="none", seed=SEED)
    made = {
        (bits, method, calibration, tokens): quantize(quantizer, bits, method, calibration, tokens)
        for bits in WIDTHS
        for method, calibration, tokens in STATES
    }
    states = [unprotected_state(quantized)._replace(name=str(key)) for key, quantized in made.items()]
    measured = quantizer.measure(*states).measurements
    for key, quantized in made.items():
        bits, method, calibration, _ = key
        yield (
            row_of(quantized, measured[str(key)])
            | {
                "model": model.name,
                "bits": bits,
                "method": method,
                "calibration": calibration,
                "trained": {key: training[key] for key in ("command", "tokens", "steps", "test_bits_per_byte")},
            }
            | conditions(command=f"python benchmarks/experts_table.py {model.name}", seed=SEED)
        )


def quantize(quantizer: Any, bits: int, method: str, calibration: str | None, tokens: int | None) -> Any:
    """Quantize every layer of the loaded model."""
    from quant_fairness_plugin import steps

    options: dict[str, Any] = {} if calibration is None else {"calibration": calibration}
    config = replace(quantizer.config, bits=bits, method=method, tokens_per_language=tokens, **options)
    plan = steps.plan_of_layers(quantizer.loaded, config, ())
    return steps.quantize(quantizer.loaded, plan, quantizer.texts, config)


def row_of(quantized: Any, found: Any) -> dict[str, Any]:
    """Return damage by language, and how calibration reached the experts that each language uses."""
    row: dict[str, Any] = {
        "model_sha256": found.provenance.model_sha256,
        "text_sha256": found.provenance.text_sha256,
        "grid": str(quantized.grid),
        "part": found.part,
        "status": {damage.language: damage.status for damage in found.languages},
        "kl_bits_per_byte": {damage.language: asdict(damage.kl_bits_per_byte) for damage in found.languages},
        "worst_kl": asdict(found.worst_kl),
        "mean_kl": asdict(found.mean_kl),
    }
    coverage = quantized.experts
    if coverage is None or quantized.calibration is None:
        return row
    return row | {
        "calibration_tokens": quantized.calibration.coverage,
        "enough": coverage.enough,
        "experts_in_words": list(coverage.lines()),
        "worst_layer": [asdict(coverage.worst(language)) for language in coverage.languages],
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, help="folder of examples/train_demo_moe.py")
    rows = list(measure(parser.parse_args().model))
    write_atomically(ROWS, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
