"""Backend `llmcompressor` (0.14): GPTQ and AWQ of the vLLM project. The only file that imports it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from quant_fairness_plugin.artifacts import Grid
from quant_fairness_plugin.model.architectures import find_architecture
from quant_fairness_plugin.quantize.backends import Job, require
from quant_fairness_plugin.quantize.backends.rules import LLMCOMPRESSOR_MODIFIERS, llmcompressor_recipe
from quant_fairness_plugin.quantize.backends.running import running

INSTALL = "pip install torch==2.13.0 && pip install torch==2.13.0 'quant-fairness[llmcompressor]'"
MAPPED_FAMILIES = {"awq": frozenset({"llama", "mistral", "qwen2", "qwen3", "gemma"})}
"""Method with smoothing mappings → the families whose names they fit. For OPT and GPT-NeoX it takes Llama's and fails
on the names; in BLOOM it looks for a weight of the activation."""


class LlmCompressorBackend:
    """Hands our plan to llm-compressor as `ignore` and our rows as a data loader, one row a batch."""

    name = "llmcompressor"
    methods: tuple[str, ...] = tuple(LLMCOMPRESSOR_MODIFIERS)
    packages = ("llmcompressor",)

    def check(self) -> None:
        """Check that llm-compressor is installed.

        Raises:
            MissingExtraError: it is not.
        """
        require(("llmcompressor",), backend=self.name, install=INSTALL)

    def refuse(self, family: str, method: str, grid: Grid) -> str | None:
        """Return the reason why llm-compressor fails on a family, or None."""
        architecture = find_architecture(family)
        if architecture is None:
            return None
        if architecture.conv1d:
            return (
                f"llm-compressor quantizes Linear modules only, and {family} has Conv1D; other families are accepted. "
                "Use --backend native, or --backend gptqmodel with --method gptq."
            )
        mapped = MAPPED_FAMILIES.get(method)
        if mapped is not None and family not in mapped:
            return (
                f"llm-compressor has no AWQ mapping for {family}; accepted: {', '.join(sorted(mapped))}. "
                "Use --method gptq, or --backend native."
            )
        return None

    def quantize(self, job: Job, out: Path) -> Path:
        """Quantize with llm-compressor's defaults in everything but grid, ignored modules and dtype."""
        with running(self.name):
            return _quantize(job, out)


def _quantize(job: Job, out: Path) -> Path:
    import torch
    from llmcompressor import oneshot
    from llmcompressor.core import reset_session
    from torch.utils.data import DataLoader
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(
        job.source, dtype=getattr(torch, job.dtype), use_safetensors=True, local_files_only=True
    )
    tokens = [torch.tensor(row) for row in job.rows]
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in tokens]
    recipe = llmcompressor_recipe(job.grids, job.kept, method=job.method)
    try:
        with _memory_not_pinned(job.device):
            oneshot(
                model=model,
                tokenizer=AutoTokenizer.from_pretrained(job.source, local_files_only=True),
                dataset=DataLoader(rows, batch_size=1),  # type: ignore[arg-type] # any sized collection will do
                recipe=json.dumps(recipe),  # YAML holds JSON
                pipeline="sequential",
            )
        model.save_pretrained(out, save_compressed=True)
    finally:
        reset_session()
    return out


@contextmanager
def _memory_not_pinned(device: str) -> Iterator[None]:
    """Its AWQ pins cached inputs in any case, which torch can do only beside an accelerator."""
    import torch

    if device != "cpu":
        yield
        return
    original = torch.Tensor.pin_memory
    torch.Tensor.pin_memory = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.Tensor.pin_memory = original  # type: ignore[method-assign]
