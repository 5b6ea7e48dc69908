"""Language tags: one spelling per language, and the choice of languages out of a text set."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence

import langcodes

from quant_fairness_plugin.errors import ConfigError, UnknownLanguageError

# ISO 639 codes that langcodes accepts and that name no single language.
_NO_LANGUAGE = frozenset({"und", "mul", "mis", "zxx"})


def normalise_language(tag: str) -> str:
    """Return the shortest standard spelling of a language tag.

    Deprecated and ISO 639-2/3 codes become the current BCP 47 tag (`iw` and `heb` are `he`, `arb` is `ar`, `cmn` is
    `zh`); a script or region that is the likely one anyway is dropped (`zh-Hans` is `zh`, `en-US` is `en`), any other
    is preserved (`zh-TW` is `zh-Hant`, `sr-Latn`, `pt-PT`). Macro-languages stay what they are: `no` is not `nb`.

    Args:
        tag: a BCP 47 tag or an ISO 639 code, upper or lower case, with `-` or `_`; outer spaces are ignored.

    Returns:
        The tag by which text sets, measurements and reports name the language.

    Raises:
        UnknownLanguageError: the text is no language tag, or its code is not assigned to a language.

    Example:
        >>> normalise_language("iw"), normalise_language("eng"), normalise_language("zh_TW")
        ('he', 'en', 'zh-Hant')
    """
    try:
        parsed = langcodes.Language.get(langcodes.standardize_tag(tag.strip(), macro=True))
    except (ValueError, AttributeError) as err:
        raise _no_language(tag) from err
    language = parsed.language or "und"
    if language in _NO_LANGUAGE or language.startswith("x-") or not parsed.is_valid():
        raise _no_language(tag)
    return _shortest(parsed)


def language_name(tag: str) -> str:
    """Return the English name of a language; the tag itself where it has none.

    >>> language_name("zh-Hant"), language_name("he")
    ('Chinese (Traditional)', 'Hebrew')
    """
    name = langcodes.Language.get(tag).display_name()
    return tag if name.startswith("Unknown") else name


def script_name(tag: str) -> str:
    """Return the English name of the script that a language is written in.

    >>> script_name("he"), script_name("sr-Latn"), script_name("de")
    ('Hebrew', 'Latin', 'Latin')
    """
    return langcodes.Language.get(tag).maximize().script_name()


def choose_languages(
    held: Sequence[str], *, languages: Sequence[str] | None, reference: str | None, source: str
) -> tuple[str, ...]:
    """Return the languages to load, in the order requested (all that are held where none are named).

    Args:
        held: normalised tags of the text set.
        languages: tags as the caller wrote them, or None for all.
        reference: the reference language as the caller wrote it; None where no language is the reference.
        source: what to call the text set in a message.

    Raises:
        UnknownLanguageError: a tag is no language, or one that the set does not hold.
        ConfigError: no language, one named twice, one string instead of a list, or the reference is not among them.
    """
    requested = tuple(held) if languages is None else _requested(languages)
    if absent := [language for language in requested if language not in held]:
        raise UnknownLanguageError(
            f"text set {source} has no sentences in {', '.join(absent)}; it holds {', '.join(held)}. "
            "Choose among these, or give a text set that has the language."
        )
    if reference is not None and normalise_language(reference) not in requested:
        raise ConfigError(
            f"reference language {reprlib.repr(reference)} is not among the languages {', '.join(requested)}. "
            "Add it to them, or choose another: --reference LANG|none (reference=None in code)."
        )
    return requested


def _requested(languages: Sequence[str]) -> tuple[str, ...]:
    if isinstance(languages, str):
        raise ConfigError(f"languages is the string {reprlib.repr(languages)}; give a list, such as ['en', 'he']")
    requested = tuple(normalise_language(tag) for tag in languages)
    if not requested:
        raise ConfigError("the list of languages is empty; name at least one, or leave it out for all of the text set")
    if twice := sorted({language for language in requested if requested.count(language) > 1}):
        raise ConfigError(f"language {', '.join(twice)} is listed more than once; name each language once")
    return requested


def _no_language(tag: object) -> UnknownLanguageError:
    return UnknownLanguageError(
        f"{reprlib.repr(tag)} is not the tag of a language; use BCP 47 tags or ISO 639 codes. "
        "Write for example en, he, zh or zh-Hant."
    )


def _shortest(full: langcodes.Language) -> str:
    # CLDR's "remove likely subtags", preferring to keep the script: for text it says more than the region.
    likely = full.maximize()
    for script, territory in ((None, None), (likely.script, None), (None, likely.territory)):
        short = langcodes.Language.make(language=full.language, script=script, territory=territory).maximize()
        if (short.script, short.territory) == (likely.script, likely.territory):
            break
    else:
        script, territory = likely.script, likely.territory
    return langcodes.Language.make(
        language=full.language,
        script=script,
        territory=territory,
        variants=full.variants,
        extensions=full.extensions,
        private=full.private,
    ).to_tag()
