"""Quantized tiny models for the export tests: real quantizer, twelve layers where the prefix trap matters."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from quant_fairness_plugin.artifacts import (
    Grid,
    Interval,
    LanguageDamage,
    Measurement,
    Precision,
    Provenance,
    TextSet,
    Undefined,
)
from quant_fairness_plugin.checkpoint.module_map import ModuleMap
from quant_fairness_plugin.checkpoint.readers.transformers import wants_unpacked_zeros
from quant_fairness_plugin.model.load import load_model
from quant_fairness_plugin.quantize.calibration import build_calibration
from quant_fairness_plugin.quantize.quantized import QuantizedModel
from quant_fairness_plugin.quantize.selection import NO_OVERRIDES
from tests.planning import quantize_layers
from tests.tiny import byte_tokenizer

TEXTS = TextSet(
    name="three words",
    sentences={"en": ("one", "two", "three"), "he": ("אחת", "שתיים", "שלוש")},
    ids=("a", "b", "c"),
    parts=("all", "all", "all"),
    registers=("everyday", "everyday", "everyday"),
    parallel=True,
    sha256="0" * 64,
)
GRID = Grid(group_size=32)
ASYMMETRIC_READER = "vllm" if wants_unpacked_zeros() else "transformers"
"""That reads asymmetric compressed-tensors with the installed Transformers."""


def quantize_tiny(
    folder: Path,
    *,
    protected: Collection[int] = (1,),
    grid: Grid = GRID,
    overrides: Mapping[str, Precision] = NO_OVERRIDES,
) -> QuantizedModel:
    loaded = load_model(str(folder))
    return quantize_layers(loaded, tuple(protected), method="rtn", grid=grid, overrides=overrides)


def quantize_with_columns(
    folder: Path,
    *,
    method: str = "gptq",
    share: float = 0.1,
    protected: Collection[int] = (1,),
    grid: Grid | None = None,
    overrides: Mapping[str, Precision] = NO_OVERRIDES,
) -> QuantizedModel:
    loaded = load_model(str(folder))
    grid = grid or Grid(group_size=32, symmetric=method == "gptq")
    calibration = build_calibration(byte_tokenizer(), TEXTS, row_tokens=8)
    return quantize_layers(
        loaded,
        tuple(protected),
        method=method,
        grid=grid,
        overrides=overrides,
        calibration=calibration,
        columns=share,
    )


def llama_map(
    *,
    layers: int = 12,
    kept: Collection[int] = (1,),
    also_kept: Collection[str] = (),
    int8: Collection[int] = (),
) -> ModuleMap:
    """The linear modules of a Llama, written out by hand; the layers `int8` have 8 bits."""
    attention = [f"self_attn.{name}_proj" for name in "qkvo"]
    parts = [*attention, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    names = [f"model.layers.{layer}.{part}" for layer in range(layers) for part in parts]
    still = {name for name in names if int(name.split(".")[2]) in kept} | set(also_kept)
    fused = {}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        fused[f"{prefix}.self_attn.qkv_proj"] = tuple(f"{prefix}.{part}" for part in attention[:3])
        fused[f"{prefix}.mlp.gate_up_proj"] = (f"{prefix}.mlp.gate_proj", f"{prefix}.mlp.up_proj")
    return ModuleMap(
        blocks="model.layers",
        quantized=tuple(name for name in names if name not in still),
        kept=(*(name for name in names if name in still), "lm_head"),
        fused=fused,
        bits={name: 8 for name in names if name not in still and int(name.split(".")[2]) in int8},
    )


def measurement(reason: str = "") -> Measurement:
    """Numbers of no model, to be shown."""
    interval = Interval(0.125, 0.0625, 0.25)
    languages = tuple(
        LanguageDamage(
            language=language,
            status="supported" if language == "en" else "unsupported",
            reason="" if language == "en" else reason or "no better than a byte unigram model",
            sentences=3,
            tokens=30,
            bytes_=60,
            baseline_bpb=1.5,
            quantized_bpb=1.625,
            delta_bpb=interval,
            kl_bits_per_byte=interval,
            delta_nats_per_sentence=interval,
            flip_rate=interval,
            excess_bpb=Undefined("reference"),
            disparity=interval,
            adjusted_p=0.5,
            minimum_detectable_bpb=0.01,
            perplexity_change_percent=3.0,
        )
        for language in ("en", "he")
    )
    return Measurement(
        provenance=Provenance(
            versions={}, model="m", model_sha256="1", text_set="t", text_sha256="2", arguments={}, seed=0
        ),
        state="exported",
        part="confirm",
        reference="en",
        languages=languages,
        worst_kl=interval,
        mean_kl=interval,
        mean_delta_bpb=Undefined("no supported language"),
    )
