"""Artifacts of no model, with figures that can be recognised."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from quant_fairness_plugin.artifacts import (
    AnalysisAnswer,
    Answer,
    Answers,
    Comparison,
    Evidence,
    EvidenceRow,
    ExportRecord,
    Fault,
    FileRecord,
    Frontier,
    FrontierRow,
    Grid,
    Interval,
    LanguageAnswers,
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


def answers() -> Answers:
    """Hebrew loops in two of three answers, where the 16-bit model does not; English is fine."""

    def row(language: str, *texts: tuple[str, tuple[Fault, ...]]) -> LanguageAnswers:
        asked = Answer(
            prompt=f"{language} {HOSTILE}",
            sixteen_bit="fine",
            checkpoint="",
            sixteen_bit_faults=(),
            checkpoint_faults=(),
        )
        made = tuple(replace(asked, checkpoint=text, checkpoint_faults=faults) for text, faults in texts)
        return LanguageAnswers(language=language, answers=made)

    loop: tuple[str, tuple[Fault, ...]] = ("האור האור האור האור", ("repeats itself",))
    return Answers(
        source="bundled",
        chat_template=True,
        new_tokens=32,
        dtype="float32",
        languages=(row("en", ("Hello.", ()), ("Tea.", ()), ("Fish.", ())), row("he", loop, ("שלום לכולם", ()), loop)),
        not_asked={"hi": "the 16-bit model does not know it"},
    )


def analyses() -> list[AnalysisAnswer]:
    """One answer of every analysis that has a chart, and one that has none, with figures that can be recognised."""
    figure = {"estimate": 0.25, "low": 0.125, "high": 0.5}
    cells = [
        {
            "layer": layer,
            "language": language,
            "relative_error": figure | {"estimate": 0.1 * layer + 0.01},
            "global_error": 0.25 * layer,
            "best_error": 0.125 * layer,
        }
        for layer in range(3)
        for language in ("en", "he")
    ]
    plans = [("bits", "3 bits", figure), ("drop", HOSTILE, {"undefined": "no language"})]
    tokens = [{"language": name, "per_sentence": figure, "by_sentence": {"tokens": [1]}} for name in ("en", "he")]
    results: dict[str, dict[str, Any]] = {
        "weights": {"layers": [{"layer": layer, "kurtosis": 1.5 * layer} for layer in range(3)]},
        "tokens": {"languages": tokens},
        "representations": {"state": "rtn", "layers": cells},
        "interventions": {"plans": [{"kind": kind, "plan": plan, "worst_kl": kl} for kind, plan, kl in plans]},
        "choices": {"rows": [{"language": "he", "group": "verbs", "drop": figure}]},
        "hypotheses": {"claims": [{"figure": "tokens", "rho": figure, "without_a_family": [0.1, 0.2]}]},
        "configurations": {"configurations": [{"kept": "nothing", "worst_kl": figure}]},
        "clipping": {"languages": cells},
        "depth": {"pairs": [{"first": "m", "second": "n", "mode": "protect-one", "tau": figure, "verdict": "alike"}]},
        "new": {"rows": [{"name": "a thing", "value": 7}]},
    }
    known = {"model": "m", "model_sha256": "1"}
    return [
        AnalysisAnswer(analysis=name, question=f"What of {name}?", provenance=known, result=result)
        for name, result in results.items()
    ]


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
