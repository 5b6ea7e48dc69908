"""Artifacts of no model, with figures that can be recognised."""

from __future__ import annotations

from dataclasses import replace

from quant_fairness_plugin.artifacts import (
    Comparison,
    Evidence,
    EvidenceRow,
    ExportRecord,
    FileRecord,
    Frontier,
    FrontierRow,
    Grid,
    Interval,
    Measurement,
    ProtectionPlan,
    Standing,
)
from tests.export.build import measurement

HOSTILE = "<script>alert('x')</script>\"&"
PLAN = ProtectionPlan(
    model="m",
    units={"layers.0": "fp16", "layers.1": "int4", "layers.2": "int8", "layers.1.down": "fp16"},
    grid=Grid(group_size=64),
    source="explicit",
    reasons=("given by the user",),
    stable=True,
    predicted=False,
    extra_bytes=2500,
    overhead=0.125,
)


def interval(value: float) -> Interval:
    return Interval(value, value / 2, 2 * value)


def measured(state: str = "exported", *, held_out: bool | None = True, **kl: float) -> Measurement:
    """A measurement with these losses; `hi` is unsupported, `xx` has collapsed."""
    first, base = measurement().languages[0], measurement()
    statuses = {"hi": "unsupported", "xx": "collapsed"}
    languages = tuple(
        replace(
            first,
            language=name.replace("_", "-"),
            kl_bits_per_byte=interval(value),
            delta_bpb=interval(value),
            flip_rate=interval(0.25),
            status=statuses.get(name, "supported"),
            reason="no better than chance" if name in statuses else "",
        )
        for name, value in kl.items()
    )
    return replace(base, state=state, languages=languages, worst_kl=interval(max(kl.values())), held_out=held_out)


def record(measurement: Measurement | None = None) -> ExportRecord:
    """A checkpoint of three layers: layer 0 in 16 bit, `down` of layer 1 too, layer 2 with 8 bits."""
    modules = {f"model.layers.1.{name}": 4 for name in ("self_attn.q_proj", "mlp.up_proj")}
    modules |= {f"model.layers.2.{name}": 8 for name in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")}
    return ExportRecord(
        provenance=measured(en=1.0).provenance,
        method="gptq",
        format="compressed-tensors",
        plan=PLAN,
        family="llama",
        quantized_modules=modules,
        kept_modules={"model.layers.2.mlp.odd": "its width is odd"},
        linear_modules=10,
        sixteen_bit_bytes=40_000,
        calibration={
            "source": "bundled",
            "weighting": "uniform",
            "tokens_per_language": {"en": 1234, "he": 77},
            "rows_per_language": {"en": 5, "he": 1},
            "weights": {"en": 0.75, "he": 0.25},
        },
        measurement=measurement,
        files={
            "model.safetensors": FileRecord(bytes_=10_000, sha256="0"),
            "README.md": FileRecord(bytes_=9, sha256="1"),
        },
    )


def evidence() -> Evidence:
    """The plan is better than seven of eight random plans, and worse than one control."""
    figures = {"the plan": 0.1, "none": 0.4, "first": 0.05} | {f"random {i}": 0.09 + 0.02 * i for i in range(8)}
    rows = tuple(
        EvidenceRow(
            name=name,
            precisions={} if name == "none" else {"layers.1": "fp16"},
            bytes_=900 if name == "none" else 1200,
            matched=name != "none",
            worst=interval(value),
            mean=interval(value / 2),
            why="",
        )
        for name, value in figures.items()
    )
    frontier = Frontier(
        rows=tuple(
            FrontierRow(
                plan=row.name,
                bytes_=row.bytes_,
                worst=row.worst,
                mean=row.mean,
                dominated_by=() if row.name in ("none", "first") else ("first",),
                on_frontier_probability=1.0 if row.name in ("none", "first") else 0.25,
            )
            for row in rows
        )
    )
    standing = Standing(percentile=87.5, low=47.3, high=99.7, random_plans=8, p_value=0.222, over_sentences=None)
    return Evidence(
        provenance=measured(en=1.0).provenance,
        plan=PLAN,
        objective="worst",
        grid=Grid(),
        bank="rtn",
        languages=("en", "he"),
        rows=rows,
        standing=standing,
        comparisons=(Comparison(control="first", difference=interval(-0.05), adjusted_p=0.01, outcome="better"),),
        frontier=frontier,
        verdict="the plan does not beat the first layers",
    )
