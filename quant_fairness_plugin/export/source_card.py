"""What an export's card takes over from the source's: licence, languages, tags and where the model comes from."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quant_fairness_plugin.documents import parse_yaml, read_text
from quant_fairness_plugin.export.companions import SOURCE_CARD, Companions
from quant_fairness_plugin.model.resolve import ModelFiles

KEPT_KEYS = ("license", "license_name", "license_link", "datasets", "pipeline_tag", "new_version")
"""Keys of the front matter that hold for the quantized model too; results and hardware do not."""
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SourceCard:
    """What is taken over."""

    base_model: str | list[str] | None = None
    """Hub ids; None where none is known."""
    relation: str | None = None
    """How the model was made from it; None where nobody said."""
    languages: list[str] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)
    kept: dict[str, Any] = field(default_factory=dict)
    """Further keys of the front matter, as they are."""
    file: str | None = None
    """The name of the copy of the card in the export."""


NO_CARD = SourceCard()


def read_source_card(files: ModelFiles, companions: Companions) -> SourceCard:
    """Return what the card of a model says. Front matter that is malformed is said in the log, and left out."""
    path = companions.files.get(SOURCE_CARD)
    matter = front_matter(path) if path is not None else {}
    base, relation = matter.get("base_model"), matter.get("base_model_relation")
    if files.revision is not None:
        base, relation = files.name, "quantized"
    return SourceCard(
        base_model=_hub_ids(base),
        relation=relation if isinstance(relation, str) else None,
        languages=_words(matter.get("language")),
        tags=_words(matter.get("tags")),
        kept={key: matter[key] for key in KEPT_KEYS if matter.get(key) is not None},
        file=None if path is None else SOURCE_CARD,
    )


def front_matter(path: Path) -> dict[str, Any]:
    """Return the YAML at the head of a card; nothing where there is none, or a malformed one, which is logged."""
    try:
        text = read_text(path)
        match = re.match(r"---[ \t]*\r?\n(.*?\r?\n)---[ \t]*(\r?\n|$)", text, re.DOTALL)
        if match is None:
            return {}
        content = parse_yaml(match[1])
        if not isinstance(content, dict):
            raise ValueError("it is no mapping")
        return {str(key): value for key, value in content.items()}
    except (OSError, ValueError) as err:
        reason = " ".join(str(err).split())[:150]
        _logger.warning("%s: its front matter cannot be read (%s); the export's card says no licence", path, reason)
        return {}


def _words(value: object) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [entry for entry in values if isinstance(entry, str) and entry]


def _hub_ids(value: object) -> str | list[str] | None:
    """Return the entries that can be ids of the Hub; None where there are none."""
    ids = [entry for entry in _words(value) if _HUB_ID.fullmatch(entry)]
    if not ids:
        return None
    return ids if isinstance(value, list) else ids[0]
