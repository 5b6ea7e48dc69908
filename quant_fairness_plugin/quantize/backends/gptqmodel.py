"""Backend `gptqmodel` (7.6): GPTQ with its group-aware order, and AWQ. The only file that imports it to quantize."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quant_fairness_plugin.artifacts import Grid
from quant_fairness_plugin.errors import UnsupportedModelError
from quant_fairness_plugin.quantize.backends import Job, require
from quant_fairness_plugin.quantize.backends.rules import gptqmodel_config
from quant_fairness_plugin.quantize.backends.running import running

_logger = logging.getLogger(__name__)

INSTALL = "pip install torch==2.13.0 && pip install torch==2.13.0 'quant-fairness[gptqmodel]'"
WORKERS = "GPTQMODEL_CPU_WORKERS"


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolMethod:
    """What gptqmodel 7.6 makes of a method."""

    title: str
    """In messages."""
    config: str
    """Its configuration class."""
    row_multiple: int = 1
    """What a module's output channels must be a multiple of."""
    one_length: bool = False
    """Whether rows must have one length."""
    cpu_backend: str | None = None
    """The kernel to name where there is no GPU; None where its choice is right."""
    fails: Mapping[str, str] = field(default_factory=dict)
    """Family → what goes wrong."""


TOOL_METHODS: Mapping[str, ToolMethod] = {
    "gptq": ToolMethod(title="GPTQ", config="QuantizeConfig"),
    "awq": ToolMethod(
        title="AWQ",
        config="AWQConfig",
        row_multiple=64,  # it searches clips for 64 output channels at a time and asserts that they divide
        one_length=True,
        cpu_backend="AWQ_TORCH",  # its choice is a CUDA kernel, also where there is no GPU
        fails={
            "gpt2": "takes GPT-2's transposed Conv1D weights for Linear ones",
            "bloom": "calls BLOOM's attention without its residual",
        },
    ),
}


class GptqModelBackend:
    """Hands our plan to gptqmodel as `dynamic` rules and our rows as they are, one row a batch."""

    name = "gptqmodel"
    methods: tuple[str, ...] = tuple(TOOL_METHODS)
    packages = ("gptqmodel",)

    def check(self) -> None:
        """Check that gptqmodel is installed.

        Raises:
            MissingExtraError: it is not.
        """
        require(("gptqmodel",), backend=self.name, install=INSTALL)

    def refuse(self, family: str, method: str, grid: Grid) -> str | None:
        """Return the reason why gptqmodel fails on a family, or None."""
        tool = TOOL_METHODS[method]
        if family not in tool.fails:
            return None
        others = ", ".join(name for name, other in TOOL_METHODS.items() if family not in other.fails)
        return (
            f"gptqmodel's {tool.title} {tool.fails[family]}; {others} is accepted for {family}. Use --method {others}."
        )

    def quantize(self, job: Job, out: Path) -> Path:
        """Quantize with gptqmodel's defaults in everything but grid, skipped modules and dtype."""
        _check_shapes(job)
        # Its thread pools are sized from the cores at import, and below four cores they do not fit each other.
        os.environ.setdefault(WORKERS, "2")
        with running(self.name):
            return _quantize(job, out)


def _check_shapes(job: Job) -> None:
    tool = TOOL_METHODS[job.method]
    for name, (rows, _) in job.shapes.items():
        if rows % tool.row_multiple:
            raise UnsupportedModelError(
                f"{name} has {rows} output channels; gptqmodel's {tool.title} takes multiples of {tool.row_multiple} "
                "only. Use --backend native, or --method gptq."
            )


def longest_rows(rows: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Return the rows of the largest length, and log a warning of what that leaves out.

    Where rows differ in length, gptqmodel 7.6's AWQ keeps only the last of a module's inputs and rounds `down_proj`
    without a search (its log: "fallback quant").
    """
    longest = max(map(len, rows))
    equal = [row for row in rows if len(row) == longest]
    tokens, used = sum(map(len, rows)), longest * len(equal)
    if used < tokens:
        _logger.warning(
            "gptqmodel's AWQ needs rows of one length: %d of %d calibration tokens are left out", tokens - used, tokens
        )
    return equal


def _quantize(job: Job, out: Path) -> Path:
    import torch
    from gptqmodel import BACKEND, GPTQModel
    from gptqmodel.quantization import config as configs

    tool = TOOL_METHODS[job.method]
    settings = gptqmodel_config(job.grids, job.kept, grid=job.grid, blocks=job.blocks, method=job.method)
    # Offloading cannot find GPT-NeoX's head, and saves little while the 16-bit model is in memory anyway.
    config = getattr(configs, tool.config)(**settings, offload_to_disk=False)
    # Without a dtype it turns a float16 model into bfloat16 weights with float16 scales.
    model = GPTQModel.load(str(job.source), config, device=job.device, dtype=getattr(torch, job.dtype))
    # One row a batch: no padding. It drops rows of at most `calibration_data_min_length` tokens.
    used = longest_rows(job.rows) if tool.one_length else job.rows
    rows = [{"input_ids": list(row), "attention_mask": [1] * len(row)} for row in used]
    options: dict[str, Any] = {"batch_size": 1, "calibration_data_min_length": 0}
    if tool.cpu_backend is not None and job.device == "cpu":
        options["backend"] = BACKEND[tool.cpu_backend]
    model.quantize(rows, **options)
    model.save(str(out))
    return out
