"""quant-fairness: INT4 quantization that is measured language by language.

The eight steps, each a package or module that takes plain data and returns plain data (`fair_quantizer.py` takes them
in this order; read it first, and `steps` for how a configuration becomes their arguments):

    1 model      a model and the map of its layers      5 recommend  which layers keep 16 bit, and why
    2 texts      the same sentences in every language   6 quantize   GPTQ or round-to-nearest, all other layers
    3 measure    damage per language, with intervals    7 export     a standard checkpoint, verified, then renamed
    4 sweep      damage of every single-layer plan      8 serve      read a checkpoint back from its files

Vocabulary, one word per thing:

- layer: a decoder block, counted from 0. unit: a whole layer, or a fusion group in it that servers merge.
- plan: unit → precision. protected: kept in 16 bit.
- text set: the same sentences in every language, with a checksum; its parts `calibrate`, `search` and `confirm` are
  disjoint. reference language: what excess and disparity are measured against.
- degradation: change against the 16-bit model, as bits per byte (ΔBPB) and as KL(p16 ‖ p) in bits per byte.
- excess: degradation minus the reference's. disparity: the ratio of the two, or undefined.
- collapse: a quantized model no better than chance. unsupported: a language that the 16-bit model does not know.
- overhead: extra bytes on disk over the all-quantized checkpoint.
- seeds: the research scripts (github.com/uprootiny/quant-disparity) whose commands, calls and formulas live on here.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quant_fairness_plugin.config import FairConfig
    from quant_fairness_plugin.fair_quantizer import FairQuantizer
    from quant_fairness_plugin.model.resolve import bundled_folder
    from quant_fairness_plugin.seeds import (
        fair_quantize,
        layer_sweep,
        measure_disparity,
        protect_layers,
        quantize_except,
        quick_sweep,
        simulate_int4,
        undo_simulation,
    )
    from quant_fairness_plugin.serve.load import load_quantized
    from quant_fairness_plugin.texts.load import load_texts

__all__ = [
    "FairConfig",
    "FairQuantizer",
    "bundled_folder",
    "fair_quantize",
    "layer_sweep",
    "load_quantized",
    "load_texts",
    "measure_disparity",
    "protect_layers",
    "quantize_except",
    "quick_sweep",
    "simulate_int4",
    "undo_simulation",
]

_WHERE = {
    "FairConfig": "config",
    "FairQuantizer": "fair_quantizer",
    "bundled_folder": "model.resolve",
    "load_quantized": "serve.load",
    "load_texts": "texts.load",
}


def __getattr__(name: str) -> Any:
    # Loaded on first use: importing the package must not import torch, which alone takes seconds.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_WHERE.get(name, 'seeds')}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
