"""An importance matrix as the file that `llama-quantize --imatrix` reads (GGUF; llama.cpp's pull request 9400)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from quant_fairness_plugin.errors import MissingExtraError, UnsupportedModelError
from quant_fairness_plugin.model.families import Family

if TYPE_CHECKING:
    from torch import Tensor

    from quant_fairness_plugin.quantize.calibration import CalibrationSet


def check_gguf() -> None:
    """Check that such a file can be written.

    Raises:
        MissingExtraError: the package `gguf` is not installed.
    """
    if find_spec("gguf") is None:
        raise MissingExtraError(
            "--imatrix needs the package gguf. Install it: pip install torch==2.13.0 && pip install torch==2.13.0 "
            '"quant-fairness[gguf]"'
        )


def tensor_name(module: str, family: Family) -> str:
    """Return llama.cpp's name of a module's weight.

    Raises:
        UnsupportedModelError: an architecture whose names are not known.
    """
    layer, _, rest = module.removeprefix(f"{family.blocks}.").partition(".")
    known = family.architecture.gguf_names
    if rest not in known:
        raise UnsupportedModelError(
            f"llama.cpp's name of {module} ({family.name}) is not known. Use its llama-imatrix."
        )
    return f"blk.{layer}.{known[rest]}.weight"


def write_imatrix(importance: Mapping[str, Tensor], calibration: CalibrationSet, family: Family, path: Path) -> None:
    """Write the importance of every module's input channels as an importance matrix.

    Args:
        importance: module → `[cols]`.
        calibration: what it was made on; the file names its source, and its rows are its chunks.
        family: whose names the modules have.
        path: the file to write, complete or not at all.

    Raises:
        UnsupportedModelError: as `tensor_name`.
    """
    from gguf import GGUFType, GGUFWriter

    named = {tensor_name(module, family): values for module, values in importance.items()}
    rows = sum(calibration.row_counts.values())
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    writer = GGUFWriter(beside, arch="")
    try:
        writer.add_type(GGUFType.IMATRIX)
        writer.add_array("imatrix.datasets", [f"{calibration.source}: {', '.join(calibration.rows)}"])
        writer.add_uint32("imatrix.chunk_count", rows)
        writer.add_uint32("imatrix.chunk_size", calibration.row_tokens)
        for name, values in sorted(named.items()):
            tokens = float(sum(calibration.coverage.values()))
            writer.add_tensor(f"{name}.in_sum2", (values * tokens).reshape(1, -1).numpy())
            writer.add_tensor(f"{name}.counts", values.new_full((1, 1), tokens).numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        beside.rename(path)
    finally:
        beside.unlink(missing_ok=True)
