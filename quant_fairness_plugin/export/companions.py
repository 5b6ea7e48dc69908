"""The other files of a source: which an export takes along, which it leaves out, and what is wrong with them.

Decided from names and file types before anything is quantized; no torch. What no list names is left out: a folder of
years can hold metadata of other tools, optimizer states and weights in every form.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from quant_fairness_plugin.errors import ArtifactError
from quant_fairness_plugin.model.native import CODE_KEYS
from quant_fairness_plugin.model.weights import check_inside, read_json

if TYPE_CHECKING:
    from quant_fairness_plugin.model.load import LoadedModel

CARD = "README.md"
SOURCE_CARD = "README.source.md"
"""The source's card in an export."""
TEMPLATE_FOLDERS = ("additional_chat_templates",)
"""The only folders that tokenizers read from."""
MAX_TEXT_BYTES = 16_000_000
"""Of a licence or a card; a larger file of that name is something else."""
_NEEDED = re.compile(
    r"tokenizer(_config)?\.json|special_tokens_map\.json|added_tokens\.json|(vocab|encoder|merges|emoji|normalizer|"
    r"tekken)\.json|(vocab|merges|dict|bpe|sentencepiece)\.txt|vocab\.bpe|bpe\.codes|.*\.(model|tiktoken|spm)|"
    r"chat_template\.json|.*\.jinja|generation_config\.json",
    re.ASCII,
)
"""What a loader of the text model reads: without one of these, the export would be another model's."""
_PROCESSORS = re.compile(r"(|\w+_)(pre)?processor_config\.json", re.ASCII)
_PROVENANCE = frozenset({"gguf_source.json", "training.json"})
"""What a model was made from: of GGUF files (`model.gguf.SOURCE`) and of the bundled models."""
_TEXTS = re.compile(
    r"(.*[._-])?(licen[cs]es?|copying|copyright|notices?|authors|citation|readme|(acceptable_)?use[._-]policy|terms)"
    r"([._-].*)?",
    re.IGNORECASE,
)
_TEXT_SUFFIXES = frozenset({"", ".txt", ".md", ".rst", ".cff", ".html", ".pdf"})
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Companions:
    """The files that an export takes from its source, and those that it does not."""

    files: dict[str, Path]
    """Relative name in the export → file of the source."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Name → why; of files that one may expect there, not of weights and what the export writes anew."""
    runs_code: bool = False
    """Whether what names code keeps doing so."""

    def copy(self, folder: Path) -> None:
        """Copy them byte for byte; of settings that name code which nobody runs, all but that."""
        for name, path in self.files.items():
            target = folder / name
            target.parent.mkdir(exist_ok=True)
            content = read_json(path) if _is_settings(path) and not self.runs_code else {}
            if any(key in content for key in CODE_KEYS):
                kept = {key: value for key, value in content.items() if key not in CODE_KEYS}
                target.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            else:
                shutil.copyfile(path, target)

    def say_what_is_left_out(self, source: Path) -> None:
        """Log in one line what an export will lack."""
        if self.left_out:
            said = "; ".join(f"{name} ({reason})" for name, reason in self.left_out.items())
            _logger.warning("%s: not copied into the export: %s", source, said)


def find_companions(source: Path, weights: tuple[Path, ...], *, runs_code: bool = False) -> Companions:
    """Sort the files of a model folder.

    Args:
        source: the folder.
        weights: its weight files, which are read and not copied.
        runs_code: whether the model is loaded with code of the folder, which is then copied too.

    Raises:
        ArtifactError: a file that loaders need (tokenizer, template, generation settings) is no readable file, leads
            out of the folder, or is no JSON where it has to be.
    """
    files: dict[str, Path] = {}
    left_out: dict[str, str] = {}
    for path in _candidates(source):
        name = path.relative_to(source).as_posix()
        if path in weights or name == "config.json" or name.startswith("model.safetensors"):
            continue
        if _NEEDED.fullmatch(path.name) or (runs_code and path.suffix == ".py"):
            _check_needed(source, path)
            files[name] = path
        elif _PROCESSORS.fullmatch(path.name) or path.name in _PROVENANCE or _is_text(path):
            reason = _why_not(source, path, limit=MAX_TEXT_BYTES)
            if reason:
                left_out[name] = reason
            else:
                files[SOURCE_CARD if name == CARD else name] = path
        else:
            left_out[name] = "not a file that loaders or people need"
    return Companions(files, _shortened(left_out), runs_code)


def companions_of(loaded: LoadedModel) -> Companions:
    """Return the files that an export takes from a model's folder; none of one that is only in memory.

    Raises:
        ArtifactError: as `find_companions`.
    """
    files = loaded.files
    return find_companions(files.folder, files.weights, runs_code=files.runs_code) if files.weights else Companions({})


def _candidates(source: Path) -> Iterator[Path]:
    for path in sorted(source.iterdir()):
        if path.name in TEMPLATE_FOLDERS and path.is_dir():
            yield from sorted(path.glob("*.jinja"))
        elif not path.name.startswith("."):
            yield path


def _is_text(path: Path) -> bool:
    return path.suffix.lower() in _TEXT_SUFFIXES and _TEXTS.fullmatch(path.name) is not None


def _check_needed(source: Path, path: Path) -> None:
    check_inside(source, path)
    reason = _why_not(source, path, limit=None)
    if reason:
        raise ArtifactError(
            f"{path}: {reason}; expected a readable file, which loaders of the export need. Put the file there."
        )
    if _is_settings(path):
        read_json(path)


def _is_settings(path: Path) -> bool:
    return path.name.endswith(("config.json", "tokens_map.json"))


def _why_not(source: Path, path: Path, *, limit: int | None) -> str:
    """Return why a file cannot be copied; empty where it can."""
    try:
        check_inside(source, path)
    except ArtifactError:
        return "a link that leaves the model's folder"
    if not path.exists():
        return "a link to nothing"
    if path.is_dir():
        return "a folder"
    if not path.is_file():
        return "not a regular file"
    if not os.access(path, os.R_OK):
        return "not readable"
    if limit is not None and path.stat().st_size > limit:
        return f"larger than {limit} bytes"
    return ""


def _shortened(left_out: dict[str, str]) -> dict[str, str]:
    """Return the reasons with files of the same reason as one entry."""
    names: dict[str, list[str]] = {}
    for name, reason in left_out.items():
        names.setdefault(reason, []).append(name)
    return {", ".join(some): reason for reason, some in names.items()}
