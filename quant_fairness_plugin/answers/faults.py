"""What is wrong with an answer whatever it says, in any language, without knowing the language. No torch.

A text in the right script that is wrong, rude or in another language of the same script passes.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from quant_fairness_plugin.artifacts import Fault

REPEATS = 3
"""So often a piece must stand behind itself to count as a loop; the last time may be cut off."""
SHARE = 0.5
"""Of an answer's characters that a loop fills, and of its letters that are in the prompt's script."""
_ONE_SCRIPT = {"HIRAGANA": "CJK", "KATAKANA": "CJK", "IDEOGRAPHIC": "CJK"}
"""Japanese is written in all of these at once."""


def find_faults(answer: str, prompts: Sequence[str]) -> tuple[Fault, ...]:
    """Return the faults of an answer.

    Args:
        answer: what a model wrote.
        prompts: all prompts of the language, whose script is expected.
    """
    if not any(map(str.isalnum, answer)):
        return ("empty",)
    faults: list[Fault] = []
    if repeats_itself(answer):
        faults.append("repeats itself")
    if in_other_script(answer, prompts):
        faults.append("other script")
    return tuple(faults)


def repeats_itself(text: str) -> bool:
    """Return whether one piece, `REPEATS` times or more behind itself, fills at least `SHARE` of a text.

    >>> repeats_itself("It is an invisible, invisible, invisible, invi"), repeats_itself("Fish eat plants and fish.")
    (True, False)
    """
    characters = " ".join(text.split()).casefold()
    periods = range(1, len(characters) // REPEATS + 1)
    return any(_loop(characters, p) >= max(REPEATS * p, SHARE * len(characters)) for p in periods)


def _loop(text: str, period: int) -> int:
    """Return the length of the longest part of a text that repeats itself after so many characters."""
    longest = run = 0
    for i in range(period, len(text)):
        run = run + 1 if text[i] == text[i - period] else 0
        longest = max(longest, run)
    return longest + period if longest else 0


def in_other_script(text: str, prompts: Sequence[str]) -> bool:
    """Return whether fewer than `SHARE` of a text's letters are in the script that most letters of the prompts are in.

    >>> in_other_script("Рыбы едят fish", ["Что едят рыбы?"]), in_other_script("fish", ["Что едят рыбы?"])
    (False, True)
    """
    expected = Counter(_scripts(prompts)).most_common(1)
    scripts = list(_scripts([text]))
    return bool(expected and scripts) and scripts.count(expected[0][0]) < SHARE * len(scripts)


def _scripts(texts: Iterable[str]) -> Iterator[str]:
    """Yield the script of every letter: the first word of its name in Unicode, such as `LATIN`."""
    for character in unicodedata.normalize("NFKC", "".join(texts)):
        if character.isalpha():
            script = unicodedata.name(character, "UNKNOWN").replace("-", " ").split()[0]
            yield _ONE_SCRIPT.get(script, script)
