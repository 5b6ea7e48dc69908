"""The importance matrix that `recommend --as llama.cpp --imatrix FILE` writes beside the plan."""

from __future__ import annotations

from pathlib import Path

from quant_fairness_plugin.artifacts import ProtectionPlan
from quant_fairness_plugin.cli.progress import progress
from quant_fairness_plugin.config import FairConfig
from quant_fairness_plugin.preflight import ModelSource, preflight


def write_importance(path: Path, plan: ProtectionPlan, source: ModelSource, config: FairConfig) -> None:
    """Run the 16-bit model on the calibration text and write how much each input channel carries.

    Raises:
        QuantFairnessError: as `preflight`, or an architecture whose tensor names llama.cpp's are not known for.
    """
    checked = preflight(source, config)

    # Loads torch.
    from quant_fairness_plugin import steps
    from quant_fairness_plugin.fair_quantizer import FairQuantizer
    from quant_fairness_plugin.recommend.imatrix import write_imatrix

    with progress() as tell:
        loaded = FairQuantizer.from_source(source, config, checked=checked, progress=tell).loaded
        importance, calibration = steps.importance(loaded, plan, checked.texts, config, progress=tell)
    write_imatrix(importance, calibration, loaded.family, path)
