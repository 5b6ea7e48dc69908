"""A backend: your tool gets our plan and calibration rows and writes its folder; we verify, export and measure it."""

from __future__ import annotations

import json
from pathlib import Path

from quant_fairness_plugin.artifacts import Grid
from quant_fairness_plugin.quantize.backends import Job


class Nearest:
    """Rounds every weight to the nearest grid point; stands for a tool that does something cleverer."""

    name, methods, packages = "nearest", ("gptq",), ("nearest-backend",)

    def check(self) -> None:
        """Raise MissingExtraError here where the tool is not installed."""

    def refuse(self, family: str, method: str, grid: Grid) -> str | None:
        """Say what the tool cannot do, before anything is loaded: `check` and `refuse` import neither it nor torch."""
        return None if grid.symmetric else "nearest cannot do asymmetric grids; accepted are symmetric ones. Use --sym."

    def quantize(self, job: Job, out: Path) -> Path:
        """Write a gptq, awq or compressed-tensors folder: exactly the modules of `job.grids`, all else as it was."""
        import torch
        from safetensors.torch import load_file, save_file

        from quant_fairness_plugin.checkpoint.formats import FORMATS
        from quant_fairness_plugin.quantize.grid import quantize_rtn

        tensors, layout = load_file(job.source / "model.safetensors"), FORMATS["compressed-tensors"]
        for module, grid in job.grids.items():  # job.rows are the calibration rows, which rounding does not need
            weight = tensors.pop(f"{module}.weight")
            tensors |= layout.tensors(module, quantize_rtn(weight, grid, scale_dtype=getattr(torch, job.dtype)))
        save_file(tensors, out / "model.safetensors")
        config = json.loads((job.source / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "compressed-tensors"}
        (out / "config.json").write_text(json.dumps(config))
        return out
