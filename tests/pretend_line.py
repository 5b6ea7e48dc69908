"""Load, measure, sweep and quantize on the pretend device and on the CPU, and print what is equal.

python -m tests.pretend_line MODEL OUT
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from quant_fairness_plugin.config import FairConfig
from quant_fairness_plugin.fair_quantizer import FairQuantizer
from quant_fairness_plugin.measure import streamed
from quant_fairness_plugin.model.devices import ByDevice
from quant_fairness_plugin.model.load import load_model
from quant_fairness_plugin.plans.plan_set import BASELINE
from quant_fairness_plugin.quantize import gptq, moments
from tests.planted_model import planted_texts
from tests.pretend import NAME, PretendMode, PretendTensor

TEXTS = planted_texts()
CONFIG = FairConfig(protect_layers="auto", top=1, draws=100, tokens_per_language=32)


def line(model: str, device: str, out: Path | None = None) -> dict[str, Any]:
    """Return the numbers of every step as plain data."""
    quantizer = FairQuantizer(load_model(model, device=device), TEXTS, CONFIG)
    measured = quantizer.measure().measurements[BASELINE]
    report = quantizer.sweep(precisions=("fp16",))
    quantized = quantizer.quantize()
    tensors = {name: (t.integers.cpu().tolist(), t.scales.cpu().tolist()) for name, t in quantized.tensors.items()}
    written = None if out is None else quantizer.save_pretrained(out, measure=None).quantized_modules
    return {
        "device": measured.provenance.device,
        "bpb": [row.baseline_bpb for row in measured.languages],
        "kl": [scores.languages["en"].kl_nats for scores in report.scores.values()],
        "plan": dict(quantizer.recommend().units),
        "tensors": tensors,
        "written": written,
    }


def problem(work: Callable[[], object]) -> str:
    """Return the message of the error that the work meets; empty where it meets none."""
    try:
        work()
    except RuntimeError as err:
        return str(err)
    return ""


class Forgetful:
    """`torch` for one module, in which a function forgets on which device its tensor should be."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Any:
        made = getattr(torch, name)
        return (lambda *args, device=None, **kwargs: made(*args, **kwargs)) if name == self._name else made


def main(model: str, out: str) -> None:
    """Print the result as JSON."""
    here = line(model, "cpu")
    # Accelerators solve in float32 and take larger pieces. Here both are as on the CPU, so that the bits are the same.
    with (
        PretendMode(),
        patch.object(moments, "working_dtype", _float64),
        patch.object(gptq, "working_dtype", _float64),
        patch.object(ByDevice, "on", lambda limit, kind: limit.cpu),
    ):
        there = line(model, NAME, Path(out))
        loaded = load_model(model, device=NAME)
        weight = next(iter(loaded.linears(0).values())).weight
        with patch.object(gptq, "torch", Forgetful("empty")):
            planted_buffer = problem(lambda: FairQuantizer(loaded, TEXTS, CONFIG).protecting("none").quantize())
        with patch.object(streamed, "torch", Forgetful("full")):
            planted_sums = problem(lambda: FairQuantizer(loaded, TEXTS, CONFIG).sweep())
    print(  # noqa: T201
        json.dumps(
            {
                "placed": isinstance(weight.data, PretendTensor) or isinstance(weight, PretendTensor),
                "device": (here.pop("device"), there.pop("device")),
                "written": sorted(there.pop("written")) == sorted(there["tensors"]) and here.pop("written") is None,
                "kl_distance": _distance(here.pop("kl"), there.pop("kl")),
                "moved": _moved(here.pop("tensors"), there.pop("tensors")),
                "equal": {key: here[key] == there[key] for key in here},
                "planted_buffer": planted_buffer,
                "planted_sums": planted_sums,
            }
        )
    )


def _moved(here: dict[str, Any], there: dict[str, Any]) -> list[float]:
    """Return which share of the integers differs, and of the scales."""
    assert here.keys() == there.keys()
    parts = []
    for part in range(2):
        values = [torch.cat([torch.tensor(each[part]).flatten() for each in side.values()]) for side in (here, there)]
        parts.append(float((values[0] != values[1]).double().mean()))
    return parts


def _distance(here: list[tuple[float, ...]], there: list[tuple[float, ...]]) -> float:
    """Return the largest difference of a sentence in a state, in nats."""
    pairs = zip(here, there, strict=True)
    return max(abs(a - b) for one, other in pairs for a, b in zip(one, other, strict=True))


def _float64(device: torch.device, columns: int) -> torch.dtype:
    return torch.float64


if __name__ == "__main__":
    main(*sys.argv[1:])
