"""A backend of a third party: rounds to nearest, writes a folder as other tools do, with a mistake where asked."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from quant_fairness_plugin.artifacts import Grid
from quant_fairness_plugin.checkpoint.formats import checkpoint_format
from quant_fairness_plugin.model.linear import linear_weight
from quant_fairness_plugin.quantize import backends
from quant_fairness_plugin.quantize.backends import Job
from quant_fairness_plugin.quantize.grid import quantize_rtn

Tensors = dict[str, Tensor]
KINDS: dict[str, dict[str, Any]] = {
    "gptq": {"quant_method": "gptq", "checkpoint_format": "gptq"},
    "awq": {"quant_method": "awq", "version": "gemm"},
    "compressed-tensors": {"quant_method": "compressed-tensors"},
}


class FakeTool:
    """Installed, willing and able; `mistake` changes the tensors before they are written."""

    name = "fake"
    methods: tuple[str, ...] = ("gptq", "awq")
    packages = ("torch",)

    def __init__(self, layout: str = "gptq", mistake: Callable[[Tensors], None] = lambda tensors: None) -> None:
        self.layout, self.mistake = layout, mistake
        self.jobs: list[Job] = []

    def check(self) -> None: ...

    def refuse(self, family: str, method: str, grid: Grid) -> str | None:
        return "the fake tool cannot do opt. Use another." if family == "opt" else None

    def quantize(self, job: Job, out: Path) -> Path:
        self.jobs.append(job)
        model: nn.Module = AutoModelForCausalLM.from_pretrained(job.source, dtype=getattr(torch, job.dtype))
        layout = checkpoint_format(self.layout)
        tensors = dict(model.state_dict())
        for name, grid in job.grids.items():
            weight = linear_weight(model.get_submodule(name))
            del tensors[f"{name}.weight"]
            tensors |= layout.tensors(name, quantize_rtn(weight, grid, scale_dtype=getattr(torch, job.dtype)))
        self.mistake(tensors)
        save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, out / "model.safetensors")
        config = json.loads((job.source / "config.json").read_text(encoding="utf-8"))
        config["quantization_config"] = KINDS[self.layout]
        (out / "config.json").write_text(json.dumps(config), encoding="utf-8")
        return out


class _Point:
    value = "elsewhere:FakeTool"

    def __init__(self, name: str, load: Callable[[], Callable[[], object]]) -> None:
        self.name, self.load = name, load


def register(monkeypatch: pytest.MonkeyPatch, **tools: object) -> None:
    """Make these the only backends that are registered; a tool that is an exception is raised when it is loaded."""

    def loading(tool: object) -> Callable[[], Callable[[], object]]:
        def load() -> Callable[[], object]:
            if isinstance(tool, Exception):
                raise tool
            return lambda: tool

        return load

    points = [_Point(name, loading(tool)) for name, tool in tools.items()]

    def entry_points(*, group: str) -> Iterable[_Point]:
        assert group == "quant_fairness.backends"
        return points

    monkeypatch.setattr(backends, "entry_points", entry_points)
