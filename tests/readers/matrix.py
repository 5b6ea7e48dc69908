"""The reader matrix: which checkpoints are made, who reads them, and which of these cells must be refused at plan time.

Every family in every format for every reader, and beside them what a plan or a model can bring along: INT8 layers,
single units, other grids and dtypes, shards, a tied head, trained models. Plain data.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from quant_fairness_plugin.artifacts import CheckpointFormat, Reader
from quant_fairness_plugin.checkpoint import readers as checkpoint_readers
from quant_fairness_plugin.checkpoint.readers.vllm import NO_INT8
from tests.tiny import FAMILIES

FORMATS: tuple[CheckpointFormat, ...] = ("compressed-tensors", "gptq", "awq")
READERS = tuple(name for name, entry in checkpoint_readers.READERS.items() if entry.script)
"""Those that are run here."""
BUNDLED = {"demo": "llama", "demo-gpt2": "gpt2"}
"""Trained models that the package brings, and their families."""
PROTECTED = (0, 1)
"""A reader that matches names by prefix or as a substring takes layers 10 and 11 for layer 1."""
MISTAKABLE = (10, 11)
LAYERS = 12
WIDTH = 256
"""With four heads, so that they have 64 channels: a size that vLLM's attention has on a CPU."""

_INT8 = "INT8 layer"
MIXED = "groups of 64 and 128"
_MIXED_SIZES = {
    "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64,
}  # fmt: skip
"""Those of SmolLM2-135M: groups of 128 divide the input channels of `down` alone."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One export."""

    model: str
    """A family of `tests/tiny.py` (random weights), or a bundled model."""
    format: CheckpointFormat
    variant: str = ""
    """What is special about it; empty for the plain export of a family."""
    options: dict[str, Any] = field(default_factory=dict, hash=False)
    """Fields of `FairConfig`."""
    dtype: str = "float16"
    tied: bool = False
    changes: dict[str, Any] = field(default_factory=dict, hash=False)
    """Fields of the random model's config."""
    shard_bytes: int | None = None

    @property
    def name(self) -> str:
        """A file name."""
        return "-".join(part for part in (self.model, self.format, self.variant.replace(" ", "_")) if part)


@dataclass(frozen=True, slots=True)
class Cell:
    """One checkpoint in one reader."""

    checkpoint: Checkpoint
    reader: Reader

    @property
    def name(self) -> str:
        """A file name, and the test's id."""
        return f"{self.checkpoint.name}-in-{self.reader}"

    @property
    def environment(self) -> str:
        """The virtual environment in which the reader runs."""
        if self.reader == "transformers":
            return ".venv" if self.checkpoint.format == "compressed-tensors" else ".venv-gptqmodel"
        return f".venv-{self.reader}"

    @property
    def missing_kernel(self) -> str | None:
        """What the reader lacks where it is only its CPU build, on any CPU, that cannot compute this; not refused."""
        return NO_INT8 if self.checkpoint.variant == _INT8 and self.reader == "vllm" else None

    @property
    def refusal(self) -> str | None:
        """Words of the reason for which this must be refused at plan time; None: must be read right."""
        made = self.checkpoint
        family = family_of(made.model)
        for families, formats, readers, variant, words in REFUSED:
            if (
                family in families
                and made.format in formats
                and self.reader in readers
                and variant in ("", made.variant)
            ):
                return words
        return None


REFUSED: tuple[tuple[tuple[str, ...], tuple[str, ...], tuple[Reader, ...], str, str], ...] = (
    (("gpt2",), FORMATS, ("transformers",), "", "Conv1D"),
    (("gpt2",), ("compressed-tensors",), ("gptqmodel",), "", "Conv1D"),
    (("gpt_neox",), ("gptq", "awq"), ("gptqmodel",), "", "embed_out"),
    (("gpt_neox",), ("awq",), ("vllm",), "", "mlp.act.scales"),
    (("bloom",), FORMATS, ("vllm",), "", "BLOOM"),
    (FAMILIES, ("gptq",), ("transformers",), _INT8, "dynamic"),
)
"""Families, formats, readers and variant (empty: all) → words of the refusal. Each was tried: see `docs/readers.md`."""


def family_of(model: str) -> str:
    """The family of a tiny or bundled model."""
    return BUNDLED.get(model, model)


def family_checkpoints(family: str) -> list[Checkpoint]:
    """The plain export of a family in every format."""
    return [Checkpoint(family, format) for format in FORMATS]


def further_checkpoints() -> list[Checkpoint]:
    """What plans and models can bring along, on Llama."""
    plain: tuple[CheckpointFormat, ...] = ("compressed-tensors", "gptq")
    return [
        *(Checkpoint("llama", format, _INT8, {"int8_layers": (5,)}) for format in plain),
        *(Checkpoint("llama", format, "single units", {"protect_units": ("3.down", "5.qkv")}) for format in FORMATS),
        Checkpoint("llama", "compressed-tensors", "zero points", {"symmetric": False}),
        Checkpoint("llama", "awq", "without zero points", {"symmetric": True}),
        *(Checkpoint("llama", format, "group 32", {"group_size": 32}) for format in FORMATS),
        *(Checkpoint("llama", format, MIXED, {"group_size": 128}, changes=_MIXED_SIZES) for format in plain),
        *(Checkpoint("llama", format, "one group per row", {"group_size": -1}) for format in FORMATS),
        *(Checkpoint("llama", format, "bfloat16", dtype="bfloat16") for format in FORMATS),
        *(Checkpoint("llama", format, "shards", shard_bytes=1_000_000) for format in FORMATS),
        *(Checkpoint("llama", format, "tied head", tied=True) for format in FORMATS),
    ]


def trained_checkpoints() -> list[Checkpoint]:
    """The bundled models."""
    return [Checkpoint(model, format) for model in BUNDLED for format in FORMATS]


def all_cells() -> list[Cell]:
    """Every cell, in the order of the table."""
    made = [c for family in FAMILIES for c in family_checkpoints(family)]
    made += [*further_checkpoints(), *trained_checkpoints()]
    return [Cell(checkpoint, reader) for checkpoint in made for reader in READERS]
