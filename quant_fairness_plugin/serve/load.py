"""Step 8: an exported folder in, a Transformers model that runs out."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from transformers import PreTrainedModel

from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.export.dequantize import load_dense_model

Kernel = Literal["reference"]


def load_quantized(folder: str | Path, *, kernel: Kernel = "reference") -> PreTrainedModel:
    """Load any of our exports, GPT-2 included, without another package's quantization code.

    Reads only files of the folder, and checks neither checksums nor metadata (`verify` does).

    Args:
        folder: a checkpoint folder written by `export`.
        kernel: `reference` dequantizes every module to float32 once and runs dense: exact, and as slow and as large as
            the unquantized model in 32 bit.

    Returns:
        The model in evaluation mode, float32, on the CPU.

    Raises:
        ConfigError: an unknown kernel.
        ArtifactError: files that are missing or malformed, or do not hold exactly the model's tensors.
        UnsupportedModelError: a quantization method that is not ours.
    """
    if kernel != "reference":
        raise ConfigError(f"unknown kernel {kernel!r}; allowed is 'reference'. Others arrive with a later version.")
    return load_dense_model(Path(folder))
