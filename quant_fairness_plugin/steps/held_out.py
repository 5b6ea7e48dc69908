"""Whether a checkpoint was made without the sentences that it is measured on, by what its record says of them."""

from __future__ import annotations

from quant_fairness_plugin.artifacts import ExportRecord, Part, TextSet, UsedSentences
from quant_fairness_plugin.artifacts.plans import UNSEARCHED
from quant_fairness_plugin.texts.load import choose_texts, load_texts
from quant_fairness_plugin.texts.parts import used_before
from quant_fairness_plugin.texts.sources import BUNDLED


def held_out_of(record: ExportRecord, texts: TextSet, part: Part) -> tuple[bool | None, str]:
    """Return whether no measured sentence was used before, None where that is not known; and why not, or "".

    A text set is known by its checksum, and never by its name: files grow. Of another set the sentences are counted
    that the record has digests of; an older record has none.

    Args:
        record: of the checkpoint.
        texts: the whole text set that it is measured on.
        part: the part of it.
    """
    if not record.calibration and record.plan.source in UNSEARCHED:
        return True, ""  # no sentence was used
    same = _is_same_set(record, texts)
    if same and (used := used_before(texts, part)):
        return False, used
    if record.sentences is not None:
        used = _counted(record.sentences, texts.part(part))
        return not used, used
    if same:
        return True, ""
    made_on, here = record.provenance, texts.sha256[:12]
    content = (
        f" with sha256 {made_on.text_sha256[:12]}, and here it has {here}" if made_on.text_set == texts.name else ""
    )
    return None, f"made on {made_on.text_set}{content}: whether {texts.name} shares sentences with it is not known"


def _counted(used: UsedSentences, measured: TextSet) -> str:
    """Return how many of the sentences were used, and for what; empty where none was."""
    calibrated, searched = used.calibrated_in(measured), used.searched_in(measured)
    found = [f"{calibrated} were calibrated on"] if calibrated else []
    found += [f"on {searched} plans were searched"] if searched else []
    return f"of the {len(measured)} sentences of {measured.name}, {' and '.join(found)}: not held out" if found else ""


def _is_same_set(record: ExportRecord, texts: TextSet) -> bool:
    """Return whether a checkpoint was made on this text set, perhaps in more languages or in fewer."""
    made_on = record.provenance
    if made_on.text_sha256 == texts.sha256:
        return True
    if record.measurement is None:
        return False
    names = [row.language for row in record.measurement.languages]
    whole = load_texts(BUNDLED, reference=None) if made_on.text_set == texts.name == BUNDLED else texts
    if not set(names) <= set(whole.languages):
        return False
    return choose_texts(whole, languages=names, reference=None).sha256 == made_on.text_sha256
