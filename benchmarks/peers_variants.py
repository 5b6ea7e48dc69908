"""What the peers' table compares: models, languages, tools with their calibrations, and where each is installed."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parents[1]
MODELS = {"SmolLM2-135M": str(ROOT / "out" / "smollm2-135m"), "demo": "demo"}
"""Name → bundled name or folder. `demo` came in no GGUF file, and so has no rows of GGUF."""
LANGUAGES = ("en", "fr", "es", "de", "ru", "zh", "ar")
TOKENS = {"7 languages": 512, "English": 1280}
"""Tokens of each language of a calibration: the most whole rows that every language has, and that English has."""
OURS = "quant-fairness, INT4"
"""What the others are compared with, pair by pair."""
SEED = 0
Calibration = Literal["7 languages", "English", "none"]


@dataclass(frozen=True, slots=True)
class Variant:
    """One tool with one calibration."""

    tool: str
    """Its script is `peers/TOOL_quantize.py`."""
    calibration: Calibration
    settings: dict[str, Any] = field(default_factory=dict)


ENVIRONMENTS = {
    "gptqmodel": ".venv-gptqmodel",
    "llmcompressor": ".venv-gptqmodel",
    "autoround": ".venv-peers-autoround",
    "llamacpp": ".venv-peers-llamacpp",
}
"""Tool → its environment; ours runs in this one."""
AUTOROUND = {"iters": 20}
"""Its default of 200 takes ten times as long: one row has it."""
PLANNED = "quant-fairness, planned, +10 %"
AUTOSCHEME = AUTOROUND | {"within": PLANNED}
"""AutoRound chooses the bits of every layer, within the bytes of another variant."""
MERGED = [["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]]
"""What servers merge into one layer, and our plans give the same bits."""
AT_PEERS_BYTES = 112_500_000
"""Bytes of the tensors of planned GGUF files: with the tokenizer, which lies in the file too, those of the largest INT4
checkpoints of the others."""
VARIANTS = {
    OURS: Variant("ours", "7 languages", {"protect_layers": "none"}),
    "quant-fairness, INT4, minimax": Variant("ours", "7 languages", {"protect_layers": "none", "weights": "minimax"}),
    PLANNED: Variant("ours", "7 languages", {"max_overhead": 0.1}),
    "quant-fairness, GGUF": Variant("ours", "7 languages", {"protect_layers": "none", "gguf": True}),
    "quant-fairness, GGUF, planned": Variant("ours", "7 languages", {"max_size": AT_PEERS_BYTES, "gguf": True}),
    "quant-fairness, GGUF, 5 bits": Variant(
        "ours", "7 languages", {"protect_layers": "none", "our_bits": 5, "gguf": True}
    ),
    "quant-fairness, GGUF, 5 bits, planned": Variant(
        "ours", "7 languages", {"max_size": AT_PEERS_BYTES, "our_bits": 5, "gguf": True}
    ),
    "gptqmodel": Variant("gptqmodel", "7 languages"),
    "AutoRound, 20 iterations": Variant("autoround", "7 languages", AUTOROUND),
    "AutoRound, 200 iterations": Variant("autoround", "7 languages", {"iters": 200}),
    "AutoRound AutoScheme, +10 %": Variant("autoround", "7 languages", AUTOSCHEME),
    "AutoRound AutoScheme, +10 %, 200 iterations": Variant("autoround", "7 languages", AUTOSCHEME | {"iters": 200}),
    "AutoRound AutoScheme, +10 %, merged": Variant("autoround", "7 languages", AUTOSCHEME | {"merged": MERGED}),
    "llm-compressor GPTQ": Variant("llmcompressor", "7 languages"),
    "llama.cpp Q4_K_M": Variant("llamacpp", "7 languages"),
    "quant-fairness, INT4, English": Variant("ours", "English", {"protect_layers": "none"}),
    "gptqmodel, English": Variant("gptqmodel", "English"),
    "AutoRound, 20 iterations, English": Variant("autoround", "English", AUTOROUND),
    "llm-compressor GPTQ, English": Variant("llmcompressor", "English"),
    "llama.cpp Q4_K_M, English": Variant("llamacpp", "English"),
    "llama.cpp Q4_K_M, no calibration": Variant("llamacpp", "none"),
}


def possible(model: str) -> list[str]:
    """Return the names of the variants that a model can have: without a GGUF file of its own, none of GGUF."""
    return [
        name
        for name, variant in VARIANTS.items()
        if model != "demo" or not (variant.tool == "llamacpp" or variant.settings.get("gguf"))
    ]
