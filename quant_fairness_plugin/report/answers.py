"""The four answers at the top of the page: who loses most, is that acceptable, what to ship, what it costs."""

from __future__ import annotations

from dataclasses import dataclass, replace

from quant_fairness_plugin.artifacts import LanguageDamage, ProtectionPlan, SweepReport
from quant_fairness_plugin.artifacts.gates import Gate
from quant_fairness_plugin.model.resolve import BUNDLED
from quant_fairness_plugin.report.compared import Compared, size_of
from quant_fairness_plugin.report.sources import Sources
from quant_fairness_plugin.report.words import Language, decimals, is_hub_id, plan_words, size
from quant_fairness_plugin.statistics.verdict import Verdict, judge


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A question that everybody has, and its answer."""

    question: str
    short: str
    more: str
    command: str = ""
    """What to type next; empty where nothing is to be done."""


_MARKS = {"SHIP": ("ship", "✓"), "SHIP WITH CARE": ("care", "!"), "DO NOT SHIP": ("stop", "✕")}


_READ_ANSWERS = Answer(
    question="Is that acceptable?",
    short="The loss is. Read the answers.",
    more="To some prompts it answers with a fault that the 16-bit model does not have; “Practitioner” shows them all.",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Heading:
    """The first line of the page."""

    tone: str
    """`ship`, `care`, `stop` or `unknown`: the class of its colour."""
    mark: str
    """A sign that says the same without colour."""
    decision: str
    reason: str


def heading(verdict: Verdict | None) -> Heading:
    """Return the first line: the verdict, or that there is no checkpoint to judge."""
    if verdict is None:
        return Heading(tone="unknown", mark="?", decision="NO CHECKPOINT YET", reason="nothing was measured on one")
    tone, mark = _MARKS.get(verdict.decision, ("unknown", "?"))
    return Heading(tone=tone, mark=mark, decision=verdict.decision, reason=verdict.reason)


def verdict_of(sources: Sources, gate: Gate | None) -> Verdict | None:
    """Return the verdict on the checkpoint; None where none was measured."""
    return None if sources.measurement is None else judge(sources.measurement, gate)


def answers(
    sources: Sources, compared: Compared | None, plan: ProtectionPlan | None, verdict: Verdict | None, gate: Gate
) -> list[Answer]:
    """Return the four answers, in the order in which people ask."""
    faulty = verdict is not None and verdict.decision == "SHIP WITH CARE" and _loses_little(sources, gate)
    return [
        _who(compared, sources),
        _READ_ANSWERS if faulty else _acceptable(verdict, gate),
        _what_to_ship(sources, plan, verdict, faulty=faulty),
        _cost(sources, plan),
    ]


def _loses_little(sources: Sources, gate: Gate) -> bool:
    """Return whether a checkpoint's losses alone would let it be shipped, so that its answers are what is wrong."""
    measured = sources.measurement
    return measured is not None and judge(replace(measured, answers=None), gate).decision == "SHIP"


def _who(compared: Compared | None, sources: Sources) -> Answer:
    question = "Which language loses most?"
    rows = [row for row in compared.after if row.status != "unsupported"] if compared else []
    if not rows:
        return Answer(question=question, short="Unknown.", more="No loss was measured in a language the model knows.")
    collapsed = [Language.of(row.language).name for row in rows if row.status == "collapsed"]
    if collapsed:
        return Answer(
            question=question,
            short=f"{', '.join(collapsed)}: collapsed.",
            more="The quantized model predicts no better there than one that knows nothing of the language.",
        )
    worst = max(rows, key=lambda row: row.kl_bits_per_byte.estimate)
    return Answer(question=question, short=f"{_named(worst.language)}.", more=_loss(worst, rows, sources))


def _loss(worst: LanguageDamage, rows: list[LanguageDamage], sources: Sources) -> str:
    said = f"{decimals(worst.kl_bits_per_byte.estimate)} bits per byte"
    measured = sources.measurement or sources.before
    reference = next((row for row in rows if measured is not None and row.language == measured.reference), None)
    if reference is not None and reference is not worst and reference.kl_bits_per_byte.low > 0:
        ratio = worst.kl_bits_per_byte.estimate / reference.kl_bits_per_byte.estimate
        said += f", {ratio:.1f} times as much as {Language.of(reference.language).name}"
    return f"{said}. In {worst.flip_rate.estimate:.0%} of places another next token is now the most likely one."


def _named(tag: str) -> str:
    language = Language.of(tag)
    return tag if language.name == tag else f"{language.name} ({tag})"


def _acceptable(verdict: Verdict | None, gate: Gate) -> Answer:
    question = "Is that acceptable?"
    over = "in any language" if gate.objective == "worst" else "in the mean of the languages"
    bound = f"Accepted is a loss of at most {gate.most:g} bits per byte {over}; see the line above for what was found."
    if verdict is None:
        return Answer(question=question, short="Not known yet.", more="Only a checkpoint that was measured is judged.")
    said = {
        "SHIP": "Yes.",
        "SHIP WITH CARE": "It depends on who uses it.",
        "DO NOT SHIP": "No.",
        "CANNOT TELL": "These sentences cannot tell.",
    }[verdict.decision]
    return Answer(question=question, short=said, more=bound)


def _what_to_ship(sources: Sources, plan: ProtectionPlan | None, verdict: Verdict | None, *, faulty: bool) -> Answer:
    question = "What should I ship?"
    if verdict is None:
        return _plan_to_make(question, sources, plan)
    made = "" if plan is None else _sentence(plan_words(plan))
    model = _to_type(sources.model)
    if verdict.decision == "SHIP":
        return Answer(question=question, short="This checkpoint.", more=made)
    if faulty:
        return Answer(question=question, short="This checkpoint, if its answers are good enough.", more=made)
    if verdict.decision == "SHIP WITH CARE":
        return Answer(
            question=question,
            short="This checkpoint, if its users can accept these losses.",
            more=f"{made} Else protect more of it, or use 8 bits:",
            command=f"quant-fairness run --model {model} --max-overhead 0.4",
        )
    if verdict.decision == "DO NOT SHIP":
        return Answer(
            question=question,
            short="Not this checkpoint.",
            more="Protect more layers, or use 8 bits:",
            command=f"quant-fairness run --model {model} --bits 8",
        )
    return Answer(
        question=question,
        short="Nothing yet.",
        more="Measure on more sentences first, of your own where you can:",
        command="quant-fairness measure DIR --texts FILE",
    )


def _to_type(model: str) -> str:
    """Return a model's name where it can be found by it; a record of a local folder does not say where that is."""
    return model if model in BUNDLED or is_hub_id(model) else "MODEL"


def _plan_to_make(question: str, sources: Sources, plan: ProtectionPlan | None) -> Answer:
    if plan is None:
        return Answer(question=question, short="Unknown.", more="No plan was given, and no sweep recommends one.")
    doubt = "" if plan.stable else " The order of the layers is not stable on these sentences, so this is a guess."
    layers = ",".join(map(str, plan.protected_layers)) or "none"
    command = f"quant-fairness quantize {_to_type(sources.model)} --protect-layers {layers}"
    return Answer(
        question=question,
        short="A checkpoint by this plan, once it is measured.",
        more=f"{_sentence(plan_words(plan))}{doubt}",
        command="quant-fairness quantize MODEL --plan plan.json" if plan.overrides else command,
    )


def _cost(sources: Sources, plan: ProtectionPlan | None) -> Answer:
    question = "What does it cost?"
    parts = []
    if sources.record is not None:
        weights = sources.record.weight_bytes
        share = weights / sources.record.sixteen_bit_bytes
        short = f"{size(weights)} instead of {size(sources.record.sixteen_bit_bytes)} ({share:.0%})."
    else:
        short = _forecast(sources.sweep, plan)
    if plan is not None:
        free = "Nothing was protected." if not plan.extra_bytes else ""
        parts.append(free or f"Protection is {size(plan.extra_bytes)} of it, {plan.overhead:.1%} extra.")
    return Answer(question=question, short=short, more=" ".join([*parts, "Speed was not measured."]))


def _forecast(sweep: SweepReport | None, plan: ProtectionPlan | None) -> str:
    """Say how large a checkpoint by a plan would be."""
    total = None if sweep is None or plan is None else size_of(sweep, plan)
    if sweep is not None and total is not None:
        dense = dense_bytes(sweep)
        return f"{size(total)} instead of {size(dense)} ({total / dense:.0%})."
    return "Size unknown." if plan is None else f"{plan.overhead:.1%} more bytes than without protection."


def dense_bytes(sweep: SweepReport) -> int:
    """Return the bytes of the swept model in 16 bit."""
    return sweep.other_bytes + sum(sweep.layer_bytes["fp16"])


def _sentence(clause: str) -> str:
    return f"{clause[:1].upper()}{clause[1:].rstrip('.')}."
