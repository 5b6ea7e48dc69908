"""Backend `gptqmodel` (7.6): GPTQ with its group-aware order, and AWQ. The only file that imports it to quantize."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quant_fairness_plugin.artifacts import Grid, Method
from quant_fairness_plugin.errors import UnsupportedModelError
from quant_fairness_plugin.quantize.backends import Job, require
from quant_fairness_plugin.quantize.backends.rules import gptqmodel_config
from quant_fairness_plugin.quantize.backends.running import running

log = logging.getLogger(__name__)

INSTALL = "pip install torch==2.13.0 && pip install torch==2.13.0 'quant-fairness[gptqmodel]'"
AWQ_ROWS = 64
"""gptqmodel's AWQ searches clips for 64 output channels at a time and asserts that they divide."""
AWQ_FAILS = {
    "gpt2": "takes GPT-2's transposed Conv1D weights for Linear ones",
    "bloom": "calls BLOOM's attention without its residual",
}
"""Family → what goes wrong."""
WORKERS = "GPTQMODEL_CPU_WORKERS"


class GptqModelBackend:
    """Hands our plan to gptqmodel as `dynamic` rules and our rows as they are, one row a batch."""

    name = "gptqmodel"
    methods: tuple[Method, ...] = ("gptq", "awq")
    packages = ("gptqmodel",)

    def check(self) -> None:
        """Check that gptqmodel is installed.

        Raises:
            MissingExtraError: it is not.
        """
        require(("gptqmodel",), backend=self.name, install=INSTALL)

    def refuse(self, family: str, method: Method, grid: Grid) -> str | None:
        """The reason why gptqmodel fails on a family, or None."""
        if method == "awq" and family in AWQ_FAILS:
            return f"gptqmodel's AWQ {AWQ_FAILS[family]}; allowed for {family} is gptq. Use --method gptq."
        return None

    def quantize(self, job: Job, out: Path) -> Path:
        """Quantize with gptqmodel's defaults in everything but grid, skipped modules and dtype."""
        _check_shapes(job)
        # Its thread pools are sized from the cores at import, and below four cores they do not fit each other.
        os.environ.setdefault(WORKERS, "2")
        with running(self.name):
            return _quantize(job, out)


def _check_shapes(job: Job) -> None:
    if job.method != "awq":
        return
    for name, (rows, _) in job.shapes.items():
        if rows % AWQ_ROWS:
            raise UnsupportedModelError(
                f"{name} has {rows} output channels; gptqmodel's AWQ takes multiples of {AWQ_ROWS} only. "
                "Use --backend native, or --method gptq."
            )


def longest_rows(rows: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """The rows of the largest length, and a warning of what that leaves out.

    Where rows differ in length, gptqmodel 7.6's AWQ keeps only the last of a module's inputs and rounds `down_proj`
    without a search (its log: "fallback quant").
    """
    longest = max(map(len, rows))
    kept = [row for row in rows if len(row) == longest]
    tokens, used = sum(map(len, rows)), longest * len(kept)
    if used < tokens:
        log.warning(
            "gptqmodel's AWQ needs rows of one length: %d of %d calibration tokens are left out", tokens - used, tokens
        )
    return kept


def _quantize(job: Job, out: Path) -> Path:
    import torch
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
    from gptqmodel.quantization.config import AWQConfig

    settings = gptqmodel_config(job.grids, job.kept, grid=job.grid, blocks=job.blocks, method=job.method)
    kind = AWQConfig if job.method == "awq" else QuantizeConfig
    # Offloading cannot find GPT-NeoX's head, and saves little while the 16-bit model is in memory anyway.
    config = kind(**settings, offload_to_disk=False)
    # Without a dtype it turns a float16 model into bfloat16 weights with float16 scales.
    model = GPTQModel.load(str(job.source), config, device=job.device, dtype=getattr(torch, job.dtype))
    # One row a batch: no padding. It drops rows of at most `calibration_data_min_length` tokens.
    chosen = longest_rows(job.rows) if job.method == "awq" else job.rows
    rows = [{"input_ids": list(row), "attention_mask": [1] * len(row)} for row in chosen]
    options: dict[str, Any] = {"batch_size": 1, "calibration_data_min_length": 0}
    if job.method == "awq" and job.device == "cpu":
        options["backend"] = BACKEND.AWQ_TORCH  # its choice for AWQ is a CUDA kernel, also where there is no GPU
    model.quantize(rows, **options)
    model.save(str(out))
    return out
