"""Load texts: any source of sentences in, a checked `TextSet` with a checksum out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from quant_fairness_plugin.artifacts import TextSet, digest
from quant_fairness_plugin.errors import ArtifactError
from quant_fairness_plugin.texts.hub import PREFIX, read_dataset
from quant_fairness_plugin.texts.languages import choose_languages, normalise_language
from quant_fairness_plugin.texts.parts import split_parts
from quant_fairness_plugin.texts.sentences import RawTexts, drop_repeated
from quant_fairness_plugin.texts.sources import parse_jsonl, read_path

__all__ = ["BUNDLED", "choose_texts", "load_texts", "normalise_language", "split_parts"]

BUNDLED = Path(__file__).parent / "bundled" / "parallel.jsonl"
# One fixed split for sets that bring none, so that two runs on the same file use the same parts.
_SPLIT_SEED = 0


def load_texts(
    source: str | Path = "bundled", *, languages: Sequence[str] | None = None, reference: str | None = "en"
) -> TextSet:
    """Load sentences in several languages, check them, and choose languages.

    Sentences are brought to Unicode NFC; rows that repeat an earlier one are left out, with their number in the log.
    A set without parts is split by `split_parts`. The checksum covers ids, parts, registers and the sentences of the
    languages loaded, not where they came from.

    Args:
        source: `bundled`; a `.json` file `{lang: text or [texts]}`; a `.jsonl` file of `{"id", "part", "register",
            "<lang>": text, ...}` (the first three may be left out; `id` is Indonesian where it holds sentences, and
            `row_id` names the rows in any case); a `.tsv` file with the same columns; a folder of
            `<lang>.txt`, one sentence a line; or `datasets:<name>[:split]`.
        languages: tags of the languages to load, in this order; all of the set where None.
        reference: the language that others are compared with, which must be among them; None for no reference.

    Returns:
        The text set, with normalised language tags.

    Raises:
        UnknownLanguageError: a language that the set does not hold, or that is no language.
        ConfigError: the reference is not among the languages, or an argument cannot be used.
        MissingExtraError: a `datasets:` source without that extra.
        ArtifactError: a file that is missing, malformed, altered (the bundled set) or holds an empty or damaged text.
        ExternalServiceError: a dataset that could not be fetched.

    Example:
        >>> load_texts("bundled", languages=["en", "he"]).languages
        ('en', 'he')
    """
    name, raw = _read(source)
    tags = choose_languages(tuple(raw.sentences), languages=languages, reference=reference, source=name)
    raw = drop_repeated(raw, name)
    parts = raw.parts or split_parts(len(raw.ids), raw.registers, _SPLIT_SEED)
    sentences = {language: raw.sentences[language] for language in tags}
    content = {"ids": raw.ids, "parts": parts, "registers": raw.registers, "sentences": sentences}
    return TextSet(
        name=name,
        sentences=sentences,
        ids=raw.ids,
        parts=parts,
        registers=raw.registers,
        parallel=True,
        sha256=digest(content),
    )


def choose_texts(texts: TextSet, *, languages: Sequence[str] | None = None, reference: str | None = "en") -> TextSet:
    """Return a text set in some of its languages, as `load_texts` would have loaded it with these languages.

    Args:
        texts: a text set.
        languages: tags of the languages, in the order to have them in; None for the set as it is.
        reference: the language that others are compared with, which must be among them; None for no reference.

    Raises:
        UnknownLanguageError: a language that the set does not hold, or that is no language.
        ConfigError: the reference is not among the languages.
    """
    names = choose_languages(texts.languages, languages=languages, reference=reference, source=texts.name)
    if languages is None:
        return texts
    fewer = texts.choose(names)
    content = {
        "ids": fewer.ids,
        "parts": fewer.parts,
        "registers": fewer.registers,
        "sentences": fewer.sentences,
    }
    return replace(fewer, sha256=digest(content))


def _read(source: str | Path) -> tuple[str, RawTexts]:
    if source == "bundled":
        return "bundled", parse_jsonl(bundled_content(BUNDLED), "bundled")
    if isinstance(source, str) and source.startswith(PREFIX):
        return source, read_dataset(source)
    path = Path(source).expanduser()
    # Not the whole path: a measurement must not differ from machine to machine by where its texts lay.
    return path.resolve().name, read_path(path)


def bundled_content(path: Path) -> bytes:
    """Return the content of a bundled file, compared with the checksum beside it.

    Raises:
        ArtifactError: it is missing or altered.
    """
    try:
        content = path.read_bytes()
        stored = path.with_suffix(".sha256").read_text(encoding="ascii").split()[:1]
    except (OSError, UnicodeDecodeError) as err:
        raise ArtifactError(
            f"{path}: the bundled text set or its checksum cannot be read ({err}); install again"
        ) from err
    actual = hashlib.sha256(content).hexdigest()
    if stored != [actual]:
        raise ArtifactError(
            f"{path}: altered, its sha256 is {actual} instead of the one stored beside it; install again"
        )
    return content
