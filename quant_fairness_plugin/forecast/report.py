"""A forecast in words, for people: one line for each thing that it says."""

from __future__ import annotations

from collections.abc import Iterator

from quant_fairness_plugin.artifacts import Undefined
from quant_fairness_plugin.checkpoint.readers import READERS
from quant_fairness_plugin.forecast import Forecast, Memory, Range, Step, Verdict
from quant_fairness_plugin.forecast.speed import NOTHING, Speed
from quant_fairness_plugin.model.sizes import shown

_STEPS = ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds"))


def forecast_lines(result: Forecast) -> Iterator[str]:
    """The lines, in the order of the work."""
    yield (
        f"model       {result.model}: {result.family}, {result.layers} layers, {result.parameters:,} parameters; from "
        "config.json and file headers alone, nothing was loaded"
    )
    if result.kept_groups:
        yield f"            {', '.join(result.kept_groups)}: not fitted by the grid, 16 bit in every plan"
    yield _run_line(result.run, result.speed)
    if not isinstance(result.unplanned, Undefined):
        whole = _duration(sum((step.seconds for step in result.unplanned), NOTHING))
        yield f"            {whole} without a plan: quantize --protect-layers none"
    yield from _sweep_lines(result)
    yield _time_line(result)
    yield from _memory_lines(result)
    yield (
        f"disk        {shown(result.disk.plan)} of tensors under the plan; all layers quantized "
        f"{shown(result.disk.quantized)}, all in 16 bit {shown(result.disk.sixteen_bit)}"
    )
    yield from map(_verdict, result.readers)
    notes = {verdict.reader: READERS[verdict.reader].note for verdict in result.readers}
    yield from (f"            {reader}: {note}" for reader, note in notes.items() if note)


def _sweep_lines(result: Forecast) -> Iterator[str]:
    text, most = result.text, result.most
    exact = result.least.block_passes == most.block_passes
    passes = f"{most.block_passes:,}" if exact else f"{result.least.block_passes:,} to {most.block_passes:,}"
    alone = len(text.batches) * result.layers * (result.plans + 1)
    yield (
        f"sweep       of sweep and --exhaustive alone: {result.plans} plans; {passes} block passes, {alone:,} if every "
        "plan were run by itself"
    )
    yield (
        f"text        {text.sentences} sentences in {text.languages} languages: {text.scored:,} tokens, "
        f"{text.padded:,} with padding, in {len(text.batches)} batches"
    )


def _time_line(result: Forecast) -> str:
    speed = result.speed
    return (
        f"sweep time  {_duration(result.seconds)} on this CPU: an estimate for {result.most.flops / 1e9:,.1f} GFLOP in "
        "blocks and head, from matmuls, attention, scoring and rounding in the model's shapes, timed just now for "
        f"{speed.seconds:.1f} s with {speed.threads} thread(s) ({speed.flops.low / 1e9:.0f} to "
        f"{speed.flops.high / 1e9:.0f} GFLOP/s in matmuls); without loading the model and without the "
        f"statistics{_sharing(speed)}"
    )


def _sharing(speed: Speed) -> str:
    """Say what other work on the machine was counted."""
    if speed.shared < 1.1:
        return "; other work on the machine makes it longer"
    return f"; {speed.shared:.1f} times as long as on a machine of its own, as other work goes on here just now"


def _run_line(steps: tuple[Step, ...] | Undefined, speed: Speed) -> str:
    if isinstance(steps, Undefined):
        return f"run         how long it takes is not known: {steps.undefined}"
    whole = sum((step.seconds for step in steps), NOTHING)
    factor, unit = _unit(whole)
    parts = [f"{step.name} {step.seconds.low / factor:.1f} to {step.seconds.high / factor:.1f}" for step in steps]
    return (
        f"run         {_duration(whole)} as it comes, with a plan by gradients: an estimate, from parts of the work "
        f"timed just now. In {unit}: {', '.join(parts)}{_sharing(speed)}"
    )


def _memory_lines(result: Forecast) -> Iterator[str]:
    peaks = [f"{one.command} {shown(one.peak)} (at its stage {one.largest.name!r})" for one in result.commands]
    yield (
        f"memory      {', '.join(peaks)}: resident at the peak, {shown(result.commands[0].libraries)} of Python, its "
        "libraries and the tokenizer included; a forecast for a CPU"
    )
    yield f"            sweep: at least {_memory(result.memory)}; Python, its libraries and freed memory come on top"
    yield f"            sweep layer by layer (--memory-budget): at least {_memory(result.streamed)}"


def _memory(memory: Memory) -> str:
    parts = [f"weights {shown(memory.weights)}"]
    parts += [f"rounded weights {shown(memory.rounded)}"] if memory.rounded else []
    parts += [f"hidden states {shown(memory.states)}", f"work {shown(memory.work)}"]
    spilled = f", and {shown(memory.spilled)} of hidden states on disk" if memory.spilled else ""
    return f"{shown(memory.peak)} ({', '.join(parts)}){spilled}"


def _duration(seconds: Range) -> str:
    factor, unit = _unit(seconds)
    return f"{seconds.low / factor:.1f} to {seconds.high / factor:.1f} {unit}"


def _unit(seconds: Range) -> tuple[float, str]:
    return next((step for step in _STEPS if seconds.high >= 2 * step[0]), _STEPS[-1])


def _verdict(verdict: Verdict) -> str:
    words = f"no: {verdict.reason}" if verdict.reason else "loads it"
    return f"readers     {verdict.format:<18} {verdict.reader:<12} {words}"
