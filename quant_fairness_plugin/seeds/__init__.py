"""The calls of the research scripts that this library grew out of ("the seeds"), with their signatures.

    from quant_fairness import quick_sweep, simulate_int4

They work on a model and tokenizer that are already in memory, and `simulate_int4` changes the model in place, as the
seeds do. Measuring is rigorous by default; `method="legacy"` measures as the seeds did: one sentence a language, one
scale per tensor, ratios of perplexity changes.

- `simulation`: `simulate_int4`, bit for bit, and the way back
- `protection`: layers by the seeds' rules, `fair_quantize`, `quantize_except`
- `sweeps`: `layer_sweep`, `quick_sweep`
- `measuring`: `measure_disparity`
- `legacy`: the measurement of `--method legacy`, with every disparity
- `computing`: in which precision
- `disparity`, `clipping`, `texts`: formulas and sentences of the scripts
"""

from __future__ import annotations

from quant_fairness_plugin.seeds.measuring import DisparityResult, measure_disparity
from quant_fairness_plugin.seeds.protection import fair_quantize, quantize_except
from quant_fairness_plugin.seeds.simulation import protect_layers, simulate_int4, undo_simulation
from quant_fairness_plugin.seeds.sweeps import LegacySweepRow, layer_sweep, quick_sweep

__all__ = [
    "DisparityResult",
    "LegacySweepRow",
    "fair_quantize",
    "layer_sweep",
    "measure_disparity",
    "protect_layers",
    "quantize_except",
    "quick_sweep",
    "simulate_int4",
    "undo_simulation",
]
